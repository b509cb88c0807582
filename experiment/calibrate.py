"""mode=calibrate: what samplers want to know of a trained model, found out once."""

from __future__ import annotations

import torch

from experiment.data import Dataset
from experiment.fitted import fitted, keep_variance
from experiment.progress import say
from experiment.run import Run
from experiment.seeds import stream
from experiment.shards import alone
from likelihood import calibrate_variance
from sde_lib import probability_flow, validation
from sde_lib.samplers import FlowAdams


def calibrate(run: Run, *, num_samples: int = 2000, levels: int = 100) -> None:
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
    device, folder = run.device(), run.path / "fitted"
    train = data.units.encode(data.train[:num_samples], stream(run.seed, "calibrate", 0))
    variance = calibrate_variance(
        probability_flow(model.sde, model.score),
        train.to(device),
        steps=levels - 1,
        generator=stream(run.seed, "calibrate", 1),
    )
    kept = keep_variance(variance, path, folder)
    say(f"analytic variance of {path.name} on {len(train)} training samples: {kept}")
    say(
        "log(sigma/alpha), mean squared error of the noise estimate (1: it tells nothing of the "
        "noise; above: it is worse than no guess):"
    )
    for i in range(0, levels, max(1, (levels - 1) // 10)):
        say(f"  {float(variance.clock[i]):7.2f}  {float(variance.unresolved[i]):.4f}")
    like = torch.zeros(1, *data.shape, device=device)
    fitted(FlowAdams(), model, like, checkpoint=path, folder=folder)
