"""Figures of points in the plane: density, score field, samples, the way from noise to data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiment.canvas import BLUE, GREY, ORANGE, new_figure
from sde_lib.validation import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Extent = tuple[float, float, float, float]  # x from, x to, y from, y to


def plot_density(
    log_prob_fn: Callable[[Tensor], Tensor],
    samples: Tensor,
    truth_samples: Tensor,
    score_fn: Callable[[Tensor], Tensor],
    truth_log_density: Callable[[Tensor], Tensor] | None,
    extent: Extent,
    path: str | Path,
    *,
    resolution: int = 80,
) -> Path:
    """Write what a model of 2-D data has learnt: density, truth, score field, samples.

    Args:
        log_prob_fn: Log density of the model in nats, [B, 2] -> [B]; called with at most 4096
            points, float32 on the CPU.
        samples: Samples of the model [N, 2].
        truth_samples: Data [M, 2].
        score_fn: Score at a small noise level, [B, 2] -> [B, 2].
        truth_log_density: As ``log_prob_fn``, for the data; None if nobody knows it.
        extent: x from, x to, y from, y to.
        path: Where to.
        resolution: Points along each side of the density pictures.

    Raises:
        ValueError: If the resolution is below 2.
    """
    resolution = count("plot_density", "resolution", resolution, at_least=2)
    densities = {"Density, model": _density(log_prob_fn, extent, resolution)}
    if truth_log_density is not None:
        densities["Density, truth"] = _density(truth_log_density, extent, resolution)
    rows, columns, width = (2, 2, 7.2) if len(densities) == 2 else (1, 3, 10.2)
    with new_figure(path, width, rows * _panel_height(extent)) as figure:
        panels = figure.subplots(rows, columns).flat
        _density_panels(panels[: len(densities)], densities, extent)
        _score_panel(panels[-2], score_fn, densities["Density, model"], extent)
        _sample_panel(panels[-1], samples, truth_samples, extent)
    return Path(path)


def plot_path(
    states: Sequence[Tensor],
    path: str | Path,
    labels: Sequence[str] | None = None,
    *,
    truth: Sequence[Tensor] | None = None,
) -> Path:
    """Write the way from noise to data for points in the plane: one panel a state.

    Args:
        states: Points [N, 2], one batch a state, noise first. Each panel has its own range, as
            the noise of a VE process is far wider than the data; it is written below.
        path: Where to.
        labels: A title a panel, for example ``t = 0.5``.
        truth: Where the data are at the same noise, [M, 2] a state: grey, behind the points.
            Without it a panel of one point has no range, and its coordinates are written.

    Raises:
        ValueError: If there is no state, or one does not hold points in the plane.
    """
    if not states or any(state.ndim != 2 or state.shape[1] != 2 for state in states):
        raise ValueError(
            f"plot_path needs points [N, 2] a state; got shapes "
            f"{[tuple(state.shape) for state in states]}."
        )
    with new_figure(path, 1.9 * len(states), 2.1) as figure:
        panels = figure.subplots(1, len(states), squeeze=False)[0]
        for index, (axes, state) in enumerate(zip(panels, states, strict=True)):
            if truth is not None:
                _scatter(axes, truth[index], GREY)
            _scatter(axes, state, BLUE)
            axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
            axes.spines[:].set_visible(True)
            axes.set_title(
                labels[index] if labels else f"state {index + 1} of {len(states)}", fontsize=9
            )
            everything = state if truth is None else torch.cat([state, truth[index].to(state)])
            axes.set_xlabel(_written_range(everything), fontsize=9)
    return Path(path)


def _density_panels(panels: Sequence[Axes], densities: dict[str, Tensor], extent: Extent) -> None:
    """One colour scale for all; it ends at the truth, if known, so that a spike saturates."""
    top = float(list(densities.values())[-1].max())
    for axes, (title, density) in zip(panels, densities.items(), strict=True):
        image = axes.imshow(
            density.numpy(),
            origin="lower",
            extent=extent,
            cmap="viridis",
            vmin=0,
            vmax=top,
            interpolation="bilinear",
        )
        _plane(axes, extent, title)
        axes.grid(False)
    axes.figure.colorbar(
        image,
        ax=list(panels),
        shrink=0.8,
        pad=0.01,
        extend="max" if len(densities) > 1 else "neither",
        label="probability per unit area",
    )


def _score_panel(
    axes: Axes, score_fn: Callable[[Tensor], Tensor], density: Tensor, extent: Extent
) -> None:
    """Arrows whose length grows with log(1 + |score|): far from the data scores are huge."""
    points = _mesh(extent, 19)
    score = score_fn(points).detach().cpu().nan_to_num()
    norm = score.norm(dim=1, keepdim=True)
    arrows = score / norm.clamp_min(1e-12) * torch.log1p(norm)
    axes.imshow(
        density.numpy(),
        origin="lower",
        extent=extent,
        cmap="Greys",
        alpha=0.35,
        interpolation="bilinear",
    )
    axes.quiver(*points.numpy().T, *arrows.numpy().T, color=BLUE, pivot="mid", width=0.004)
    _plane(axes, extent, "Score, length ~ log(1 + |score|)")
    axes.grid(False)


def _sample_panel(axes: Axes, samples: Tensor, truth: Tensor, extent: Extent) -> None:
    _scatter(axes, truth, GREY, label="data")
    _scatter(axes, samples, ORANGE, label="model")
    _plane(axes, extent, "Samples")
    legend = axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),  # beside the title: within, it would hide points
        ncols=2,
        handletextpad=0.0,
        columnspacing=0.8,
        borderpad=0.0,
    )
    for handle in legend.legend_handles:
        handle.set_sizes([30.0])


def _panel_height(extent: Extent) -> float:
    """Inches of a panel about three inches wide, with its title and ticks."""
    x0, x1, y0, y1 = extent
    return 2.9 * min(2.0, max(0.3, (y1 - y0) / (x1 - x0))) + 0.6


def _mesh(extent: Extent, number: int) -> Tensor:
    """Cell centres [number², 2], x fastest: imshow draws cells, not corners."""
    x0, x1, y0, y1 = extent
    centres = (torch.arange(number) + 0.5) / number
    y, x = torch.meshgrid(y0 + (y1 - y0) * centres, x0 + (x1 - x0) * centres, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def _density(log_prob_fn: Callable[[Tensor], Tensor], extent: Extent, resolution: int) -> Tensor:
    """Density at the cell centres [resolution, resolution], y first; 0 where it is not finite."""
    points = _mesh(extent, resolution).split(4096)
    log_prob = torch.cat([log_prob_fn(chunk).detach().cpu() for chunk in points])
    return log_prob.exp().nan_to_num(posinf=0.0).reshape(resolution, resolution)


def _scatter(axes: Axes, points: Tensor, color: str, label: str | None = None) -> None:
    size = min(12.0, max(1.0, 4000 / max(1, len(points))))
    axes.scatter(
        *points.detach().cpu().numpy().T, s=size, color=color, alpha=0.6, lw=0, label=label
    )


def _written_range(points: Tensor) -> str:
    """From the smallest to the largest finite coordinate along x; of one point, where it is."""
    x = points[:, 0][points[:, 0].isfinite()]
    if len(points) == 1:
        return "({:.3g}, {:.3g})".format(*points[0].tolist())
    low, high = (float(x.min()), float(x.max())) if len(x) else (math.nan, math.nan)
    return f"{low:.3g} to {high:.3g}"


def _plane(axes: Axes, extent: Extent, title: str) -> None:
    axes.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", title=title)
