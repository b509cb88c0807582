"""mode=calibrate: what samplers want to know of a trained model, found out once."""

from __future__ import annotations

from pathlib import Path

import torch

from experiment.batches import trained_units
from experiment.conditions import Conditions, score_of_rows
from experiment.data import Dataset
from experiment.fitted import fitted, keep_variance
from experiment.measured import as_trained
from experiment.progress import say
from experiment.run import Run
from experiment.seeds import stream
from experiment.shards import alone
from likelihood import calibrate_variance
from score_models import ScoreModel
from sde_lib import probability_flow, validation
from sde_lib.reverse_variance import AnalyticVariance
from sde_lib.samplers import FlowAdams

NUM_SAMPLES, LEVELS = 2000, 100


def calibrate(run: Run, *, num_samples: int = NUM_SAMPLES, levels: int = LEVELS) -> None:
    """Measure the noise error of the newest checkpoint, or of ``checkpoint=PATH``, on training
    data at each of ``levels`` steps of log(sigma/alpha), and fit the grid of the default sampler.

    Kept in ``fitted/`` of the run by the digest of the weights: ``sampler=analytic_ddpm`` and
    ``analytic_ddim`` ask for the first, ``flow_adams`` for the second.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
        num_samples: Of the training set, the first.
        levels: How many, 2 or more; the cost is one evaluation of each sample at each.
    """
    alone("calibrate")
    num_samples = validation.count("mode=calibrate", "num_samples", num_samples)
    levels = validation.count("mode=calibrate", "levels", levels, at_least=2)
    data: Dataset = run.build("data")
    run, model, path, _ = run.trained()
    data = as_trained(data, run.config)
    variance, kept = calibrated(run, model, data, path, num_samples, levels)
    seen = min(num_samples, len(data.train))
    say(f"analytic variance of {path.name} on {seen} training samples: {kept}")
    say(
        "log(sigma/alpha), mean squared error of the noise estimate (1: it tells nothing of the "
        "noise; above: it is worse than no guess):"
    )
    for i in range(0, levels, max(1, (levels - 1) // 10)):
        say(f"  {float(variance.clock[i]):7.2f}  {float(variance.unresolved[i]):.4f}")
    like = torch.zeros(1, *data.shape, device=run.device())
    where = {"checkpoint": path, "folder": run.fitted, "conditions": Conditions(data, run.seed)}
    fitted(FlowAdams(), model, like, **where)


def calibrated(
    run: Run,
    model: ScoreModel,
    data: Dataset,
    checkpoint: Path,
    num_samples: int = NUM_SAMPLES,
    levels: int = LEVELS,
) -> tuple[AnalyticVariance, Path]:
    """The analytic variance of a model, measured now and kept in ``fitted/`` of the run, and the
    file.

    Args:
        run: With the training that is stored with the model, as ``Run.trained`` returns it.
        model: In evaluation mode.
        data: Its training part is used.
        checkpoint: Of the model.
        num_samples: See :func:`calibrate`.
        levels: See :func:`calibrate`.
    """
    units = trained_units(run.config["training"], data)
    train = units.encode(data.train[:num_samples], stream(run.seed, "calibrate", 0))
    score = score_of_rows(model, data, "train", len(train))
    variance = calibrate_variance(
        probability_flow(model.sde, score),
        train.to(run.device()),
        steps=levels - 1,
        generator=stream(run.seed, "calibrate", 1),
    )
    return variance, keep_variance(variance, checkpoint, run.fitted)
