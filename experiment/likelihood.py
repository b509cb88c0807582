"""mode=likelihood: the exact likelihood of the test set under a trained model."""

from __future__ import annotations

import numpy as np

from experiment.data import Dataset
from experiment.evaluation import Evaluation, Likelihood, append_evaluation, evaluate
from experiment.record import Record
from experiment.report import write_report
from experiment.run import Run


def likelihood(run: Run) -> None:
    """Evaluate the newest checkpoint of the run, or ``checkpoint=PATH``; add it to record and
    report.

    The value of each test sample is kept in ``likelihood-<iteration>.npz``.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
    """
    settings: Likelihood = run.build("likelihood")
    data: Dataset = run.build("data")
    run, model, path, iteration = run.trained()
    result = evaluate(model, data, settings, seed=run.seed)
    show(result, data, f"test set under {path}")
    run.path.mkdir(parents=True, exist_ok=True)
    append_evaluation(run.path, result, iteration, model, data, settings, path.name)
    Record(run.path).log(result.as_metrics(), iteration)
    values = run.path / f"likelihood-{iteration:08d}.npz"
    np.savez(
        values,
        **{result.metric: result.per_sample.numpy(), "iteration": iteration, "seed": run.seed},
    )
    print(f"each sample: {values}\nreport: {write_report(run.path)}")


def show(result: Evaluation, data: Dataset, what: str) -> None:
    """Print one evaluation with its error bar and what it cost."""
    print(
        f"{what}: {result}  ({result.num_samples} samples, {result.nfe:.0f} evaluations each, "
        f"{result.seconds:.0f} s)",
        flush=True,
    )
    if data.entropy is not None and result.metric == "nll":
        gap = result.value - data.entropy
        print(
            f"    entropy of the source {data.entropy:.4f} nats: {gap:+.4f} ± "
            f"{result.standard_error:.4f} above it",
            flush=True,
        )
