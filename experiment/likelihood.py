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
    """Evaluate the newest checkpoint of the run, or ``checkpoint=PATH``; add it to the report.

    The value of each sample is kept in ``likelihood-<iteration>*.npz``. What a checkpoint of
    another run gives stands in the table of the report alone.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
    """
    settings: Likelihood = run.build("likelihood")
    data: Dataset = run.build("data")
    tracker = Safe(run.build("tracking"))
    run, model, path, iteration = run.trained()
    run.path.mkdir(parents=True, exist_ok=True)
    own = path.absolute().parent == run.checkpoints.absolute()
    with tracker.watching(run.path, run.config, run.config["run"]["name"]):
        result = evaluate(model, data, settings, seed=run.seed)
        show(result, data, f"test set under {path}")
        name = path.name if own else str(path.absolute())
        append_evaluation(run.path, result, iteration, model, data, settings, name)
        if own:  # the record and its views are those of this run's training
            Record(run.path).log(result.as_metrics(), iteration)
            tracker.log(result.as_metrics(), iteration)
    part = "" if result.num_samples == len(data.test) else f"-first-{result.num_samples}"
    source = "" if own else f"-of-{path.absolute().parents[1].name}"
    values = run.path / f"likelihood-{iteration:08d}{part}{source}.npz"
    np.savez(
        values,
        **{result.metric: result.per_sample.numpy(), "iteration": iteration, "seed": run.seed},
    )
    say(f"each sample: {values}\nreport: {write_report(run.path)}")
