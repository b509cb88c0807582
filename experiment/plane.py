"""What a model of 2-D data has learnt: density, score field and samples, in data units."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiment.data import Dataset
from experiment.figures import plot_density, plot_path
from likelihood import Exact, log_likelihood
from score_models import ScoreModel
from sde_lib import probability_flow

SHOWN_NOISE = (
    0.1  # sigma / alpha at which the score field is drawn: small, and smooth enough to see
)


def draw_plane(
    folder: Path, iteration: int, model: ScoreModel, data: Dataset, states: list[Tensor]
) -> Path:
    """Write ``density-<iteration>.png`` and ``path-<iteration>.png`` into ``folder``.

    Args:
        folder: Made if it is not there.
        iteration: In the names.
        model: In evaluation mode.
        data: 2-D.
        states: The way from noise to samples in model units, each [N, 2].
    """
    units, device = data.units, next(model.parameters()).device
    flow = probability_flow(model.sde, model.score)
    time = model.sde.time_at(torch.tensor(SHOWN_NOISE, dtype=torch.float64).log() * -2)

    def log_prob(values: Tensor) -> Tensor:
        x = units.encode(values).to(device)
        return units.log_prob(
            log_likelihood(flow, x, divergence=Exact(), rtol=1e-3, atol=1e-3).log_prob.cpu(), (2,)
        )

    @torch.no_grad()
    def score(values: Tensor) -> Tensor:
        return model.score(units.encode(values).to(device), time).cpu() / units.scale

    low, high = data.test.amin(0), data.test.amax(0)
    margin = 0.08 * float((high - low).max())
    extent = (
        float(low[0]) - margin,
        float(high[0]) + margin,
        float(low[1]) - margin,
        float(high[1]) + margin,
    )
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"density-{iteration:08d}.png"
    plot_density(
        log_prob,
        units.decode(states[-1].cpu()),
        data.test[: len(states[-1])],
        score,
        data.log_density,
        extent,
        picture,
    )
    shown = states[:: max(1, len(states) // 5)]
    plot_path(
        [units.decode(state[:400].cpu()) for state in shown], folder / f"path-{iteration:08d}.png"
    )
    return picture
