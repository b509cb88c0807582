"""mode=likelihood: the exact likelihood of the test set under a trained model."""

from __future__ import annotations

import numpy as np

from experiment.data import Dataset
from experiment.evaluation import Likelihood, append_evaluation, evaluate, show
from experiment.progress import say
from experiment.record import Record
from experiment.report import write_report
from experiment.run import Run
from experiment.trackers import Safe


def likelihood(run: Run) -> None:
    """Evaluate the newest checkpoint of the run, or ``checkpoint=PATH``; add it to record and
    report.

    The value of each test sample is kept in ``likelihood-<iteration>.npz``.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
    """
    settings: Likelihood = run.build("likelihood")
    data: Dataset = run.build("data")
    tracker = Safe(run.build("tracking"))
    run, model, path, iteration = run.trained()
    tracker.start(run.path, run.config, run.config["run"]["name"])
    try:
        result = evaluate(model, data, settings, seed=run.seed)
        show(result, data, f"test set under {path}")
        append_evaluation(run.path, result, iteration, model, data, settings, str(path))
        Record(run.path).log(result.as_metrics(), iteration)
        tracker.log(result.as_metrics(), iteration)
    finally:
        tracker.finish()
    values = run.path / f"likelihood-{iteration:08d}.npz"
    np.savez(
        values,
        **{result.metric: result.per_sample.numpy(), "iteration": iteration, "seed": run.seed},
    )
    say(f"each sample: {values}\nreport: {write_report(run.path)}")
