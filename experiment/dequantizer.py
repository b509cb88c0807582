"""The variational dequantization of a model: fitted once, kept beside its likelihoods."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from experiment.checkpoint import write_atomically
from experiment.conditions import score_for
from experiment.data import Dataset
from experiment.data.samples import first_rows
from experiment.progress import say
from experiment.seeds import stream
from experiment.settings import Likelihood
from likelihood import (
    Dequantization,
    DequantizationFlow,
    VariationalDequantization,
    fit_dequantization,
    one_sample_bound,
)
from score_models import ScoreModel
from sde_lib import probability_flow


def dequantizer(
    settings: Likelihood,
    data: Dataset,
    model: ScoreModel,
    folder: Path,
    label: str,
    *,
    seed: int,
    steps: int = 1000,
) -> Dequantization | None:
    """The dequantization that has to be made before the evaluation; None where there is none.

    A variational one is a small flow, fitted to the model with the training data by the bound
    in continuous time; it is kept as ``dequantizer-<label>.pt`` and found again there.

    Args:
        settings: Say which is wanted.
        data: Its training part is fitted.
        model: In evaluation mode; stays as it is.
        folder: Of the run.
        label: Tells the model from others that have one there.
        seed: Of the fit.
        steps: Of the fit.
    """
    if data.levels is None or settings.dequantization != "variational":
        return None
    device = next(model.parameters()).device
    flow_module = DequantizationFlow(data.shape, generator=stream(seed, "dequantizer", 0))
    found = VariationalDequantization(
        data.levels, data.units.low, data.units.high, flow_module=flow_module.to(device)
    )
    other = "-unconditional" if settings.cond == "none" else ""
    path = folder / f"dequantizer-{label}{other}.pt"
    if path.exists():
        flow_module.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return found
    say(f"fitting a variational dequantization ({steps} steps): {path}")
    values = first_rows(data.train).to(device)
    score = score_for(model, data, "train", len(values), settings.cond)
    gains = fit_dequantization(
        found,
        one_sample_bound(probability_flow(model.sde, score)),
        values,
        steps=steps,
        batch_size=min(128, settings.batch_size),
        generator=stream(seed, "dequantizer", 1),
    )
    tenth = max(1, steps // 10)
    say(
        f"    its noisy bound: {gains[:tenth].mean():.4f} nats a dimension at first, "
        f"{gains[-tenth:].mean():.4f} at the end"
    )
    buffer = io.BytesIO()
    torch.save(flow_module.state_dict(), buffer)
    write_atomically(path, buffer.getvalue())
    return found
