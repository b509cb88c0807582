"""What a model of 2-D data has learnt: density, score field and samples, in data units."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiment.conditions import Conditions, Score
from experiment.data import Dataset
from experiment.data.samples import first_rows
from experiment.figures import plot_density, plot_path
from experiment.plane_figures import Extent
from experiment.way import Frame, labels
from likelihood import Exact, FixedGrid, log_likelihood
from likelihood.standardize import Standardization
from score_models import ScoreModel
from sde_lib import probability_flow

# sigma / alpha at which the score field is drawn: small, and smooth enough to see
SHOWN_NOISE = 0.1
PANELS = 6  # of the way from noise to samples
SHOWN = 10_000  # test points at most
DRAWN = 400  # points in each
# points along a side; each costs a likelihood, so that twice as many take four times as long
RESOLUTION = 64
# the density is off by some hundredths of its largest value, which no eye sees
ROUGH = FixedGrid(24, halve=False)


def draw_plane(
    folder: Path, name: str, model: ScoreModel, conditions: Conditions, way: list[Frame]
) -> Path:
    """Write ``density-<name>.png`` and ``path-<name>.png`` into ``folder``; of samples without a
    density of their own, such as guided ones, the latter alone. The first that is written.

    Args:
        folder: Made if it is not there.
        name: What the names of the files end with.
        model: In evaluation mode.
        conditions: Of the samples, and the 2-D data. Of K levels, level v is drawn as its bin
            [v, v + 1].
        way: From noise to samples, states [N, 2] in model units.
    """
    data = conditions.data
    units = _affine(data)
    generator = torch.Generator().manual_seed(0)
    encoded = data.units.encode(first_rows(data.test, SHOWN), generator)
    test, samples = units.decode(encoded), units.decode(way[-1].x.cpu())
    shared, picture = conditions.density(model), folder / f"density-{name}.png"
    if shared is None:
        picture = folder / f"path-{name}.png"
    else:
        _draw_density(picture, model, shared, data, units, samples, test)
    last = len(way) - 1
    shown = [way[i] for i in sorted({round(i * last / (PANELS - 1)) for i in range(PANELS)})]
    data_on_the_way = [
        units.decode(noised(encoded[:DRAWN], model, frame, generator)) for frame in shown[:-1]
    ]
    plot_path(
        [units.decode(frame.x[:DRAWN].cpu()) for frame in shown],
        folder / f"path-{name}.png",
        [*(f"sigma/alpha {label}" for label in labels(shown)[:-1]), "samples"],
        truth=[*data_on_the_way, test[:DRAWN]],
    )
    return picture


def _draw_density(
    picture: Path,
    model: ScoreModel,
    shared: Score,
    data: Dataset,
    units: Standardization,
    samples: Tensor,
    test: Tensor,
) -> None:
    """What the score function ``shared`` of all samples has learnt, in data units."""
    flow, device = probability_flow(model.sde, shared), next(model.parameters()).device
    time = model.sde.time_at(torch.tensor(SHOWN_NOISE, dtype=torch.float64).log() * -2)

    def log_prob(values: Tensor) -> Tensor:
        x = units.encode(values).to(device)
        result = log_likelihood(flow, x, divergence=Exact(), solver=ROUGH)
        return units.log_prob(result.log_prob.cpu(), (2,))

    @torch.no_grad()
    def score(values: Tensor) -> Tensor:
        return shared(units.encode(values).to(device), time).cpu() / units.scale

    plot_density(
        log_prob,
        samples,
        test[: len(samples)],
        score,
        data.log_density,
        _extent(test),
        picture,
        resolution=RESOLUTION,
    )


def noised(x0: Tensor, model: ScoreModel, frame: Frame, generator: torch.Generator) -> Tensor:
    """Data ``x0`` [N, ...] at the noise of ``frame``."""
    level = model.sde.level(torch.tensor(frame.t, dtype=torch.float64))
    noise = torch.randn(x0.shape, generator=generator)
    return (level.alpha * x0 + level.sigma * noise).to(x0.dtype)


def _affine(data: Dataset) -> Standardization:
    """The units in which data are drawn, without bins: a point in the bin of level v is v + u."""
    if data.levels is None:
        return data.units
    width = data.units.bin_width
    return Standardization(torch.tensor([-data.units.low / width]), torch.tensor([1 / width]))


def _extent(points: Tensor) -> Extent:
    """The box around ``points`` [N, 2] and a little more."""
    (x0, y0), (x1, y1) = points.amin(0).tolist(), points.amax(0).tolist()
    margin = 0.08 * max(x1 - x0, y1 - y0)
    return x0 - margin, x1 + margin, y0 - margin, y1 + margin
