"""mode=likelihood: the exact likelihood of the test set under a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from experiment.data import Dataset
from experiment.dequantizer import dequantizer
from experiment.errors import RunError
from experiment.estimators import estimate, show_estimates
from experiment.evaluation import evaluate, show
from experiment.fitted import digest_of
from experiment.ledger import append_evaluation, keep_bounds, keep_samples
from experiment.measured import as_trained
from experiment.progress import say
from experiment.record import Record
from experiment.report import renew_report
from experiment.run import Run
from experiment.settings import Likelihood
from experiment.shards import first_alone, rank
from experiment.trackers.first_process import in_first_process
from experiment.variance_heads import learned_variance
from sde_lib.samplers import SamplingError


def likelihood(run: Run) -> None:
    """Evaluate the newest checkpoint of the run, or ``checkpoint=PATH``; add it to the report.

    The value of each sample and its errors are kept in ``likelihood-<iteration>*.npz``, its bounds
    in ``bounds-<iteration>*.npz``. What a checkpoint of another run gives stands in the table of
    the report alone.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
    """
    settings: Likelihood = run.build("likelihood")
    data: Dataset = run.build("data")
    tracker = in_first_process(lambda: run.build("tracking"))
    run, model, path, iteration = run.trained()
    run.warn()
    data = as_trained(data, run.config)
    training = run.config["training"]
    settings.check(
        data,
        on_centres=not training.get("dequantize", True),
        label_dropout=training.get("label_dropout", 0.0),
    )
    run.path.mkdir(parents=True, exist_ok=True)
    own = path.absolute().parent == run.checkpoints.absolute()
    label = f"{iteration:08d}" + ("" if own else f"-of-{path.absolute().parents[1].name}")
    label += run.average.suffix
    with tracker.watching(run.path, run.config, run.config["run"]["name"]):
        try:
            made = first_alone(
                lambda: dequantizer(settings, data, model, run.path, label, seed=run.seed)
            )
            result = evaluate(model, data, settings, seed=run.seed, dequantization=made)
            if rank() == 0:  # before the bounds, which may take longer
                show(result, data, f"test set under {path}")
                part = (
                    "" if result.num_samples == len(data.test) else f"-first-{result.num_samples}"
                )
                values = keep_samples(run.path, result, label + part, run.seed)
                say(f"each sample: {values}")
            bounds = None
            if settings.bounds:
                where = {"folder": run.fitted, "objective": run.average.objective}
                learned = learned_variance(path, digest_of(path), model, data.shape, **where)
                more = {"dequantization": made, "learned": learned}
                bounds = estimate(model, data, settings, result, seed=run.seed, **more)
        except SamplingError as error:
            raise _kept(error, run.path, label) from error
        if rank() > 0:
            return  # the first process has all results and writes them
        if bounds is not None:
            show_estimates(bounds)
            say(f"bounds of each sample: {keep_bounds(values, bounds)}")
        name = path.name if own else str(path.absolute())
        more = {"bounds": bounds, "average": run.average.as_row(), "caveat": run.caveat}
        append_evaluation(run.path, result, iteration, model, data, settings, name, **more)
        # the record and its views are of this run's training
        if own and not run.average.name and settings.cond == "own":
            Record(run.path).log(result.as_metrics(), iteration)
            tracker.log(result.as_metrics(), iteration)
    say(renew_report(run.path))


def _kept(error: SamplingError, folder: Path, label: str) -> RunError:
    """The error, once what was found of the other samples is on disk."""
    partial = getattr(error, "partial", None)
    if partial is None or rank() > 0:
        return RunError(str(error))
    path = folder / f"likelihood-{label}-partial.npz"
    np.savez(path, per_sample=partial.numpy())
    bad = int((~torch.isfinite(partial)).sum())
    return RunError(f"{error} {bad} of {len(partial)} samples failed; the others are in {path}.")
