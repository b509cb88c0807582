"""The figure of mode=diagnose: errors against the noise level, and who looks where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.canvas import BLUE, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREEN, PURPLE = "#009E73", "#CC79A7"

Found = Mapping[str, Any]


def plot_diagnosis(found: Found, path: str | Path) -> Path:
    """Write two panels over the noise level: errors of noise estimates, and densities of levels.

    Left: the error of the best linear denoiser and the least known without training; of a trained
    model its error on test samples, bars of two standard errors, and on training samples. Right:
    the levels that the data ask for and those that the objective draws; of a trained model also
    the share of each level in the mean squared gradient.

    Args:
        found: As it stands in ``diagnose.json``.
        path: Where to.
    """
    with new_figure(path, 9.6, 3.9) as figure:
        left, right = figure.subplots(1, 2)
        _errors(left, found)
        _densities(right, found)
        for axes in (left, right):
            axes.set(xscale="log", xlabel="noise, sigma / alpha")
            axes.set_xlim(*_ends(found))
            _legend(axes)
    return Path(path)


def _errors(axes: Axes, found: Found) -> None:
    levels, model = found["levels"], found["model"]
    line = {"color": GREY, "ls": "--", "lw": 1.3, "zorder": 3}  # seen where the other is the same
    axes.plot(_ratio(levels), levels["gaussian"], label="linear", **line)
    least = levels["floor"] or levels["best"]
    label = "least possible" if levels["floor"] else "linear or kernel"
    axes.plot(_ratio(levels), _gaps(least), color=ORANGE, lw=1.5, label=label)
    if model:
        _model(axes, model)
    axes.set(ylim=(-0.03, 1.08), ylabel="E |eps_hat - eps|² / D")
    axes.set_title("Error of the noise estimate")


def _model(axes: Axes, model: Found) -> None:
    """Test samples as points with bars, training samples as a line."""
    style = {"ls": "", "marker": "o", "ms": 3, "lw": 1, "color": BLUE}
    ratio, bars = _ratio(model), [2 * error for error in model["test_error"]]
    axes.plot(ratio, model["train"], color=GREEN, lw=1.5, label="model, training set")
    axes.errorbar(ratio, model["test"], bars, label="model, test set", **style)


def _densities(axes: Axes, found: Found) -> None:
    row = found["model"] or found["levels"]
    source = "model" if found["model"] else "data"
    label = f"asked for by the {source}: {row['wanted_mean']:.2f} ± {row['wanted_std']:.2f}"
    axes.fill_between(_ratio(row), row["wanted"], color=ORANGE, alpha=0.2, lw=0)
    axes.plot(_ratio(row), row["wanted"], color=ORANGE, lw=1.5, label=label)
    if row.get("own") is not None:
        axes.plot(_ratio(row), row["own"], color=BLUE, lw=1.5, label="drawn by the objective")
    if row.get("gradient_share"):
        step = row["clock"][1] - row["clock"][0]
        share = [value / step for value in row["gradient_share"]]
        label = "share of the squared gradient"
        axes.plot(_ratio(row), share, color=PURPLE, lw=1.3, ls="--", label=label)
    axes.set(ylim=(0, None), ylabel="per e-fold of noise", title="Where training looks")


def _legend(axes: Axes) -> None:
    """Below the panel: no curve leaves a corner free for sure."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize="small")


def _ratio(row: Found) -> list[float]:
    return [math.exp(u) for u in row["clock"]]


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _ends(found: Found) -> tuple[float, float]:
    """From the first to the last level of the process chosen."""
    chosen = found["processes"][0]
    return chosen["first"], chosen["last"]
