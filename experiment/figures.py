"""Pictures of a run: grids of samples, and curves of the record; 2-D data have their own file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiment.canvas import BLUE, ORANGE, new_figure
from experiment.metrics import UNITS
from experiment.plane_figures import plot_density, plot_path
from experiment.record import ITERATION
from experiment.tiles import save_grid, save_strip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_bits",
    "plot_density",
    "plot_information",
    "plot_loss",
    "plot_path",
    "plot_rate_distortion",
    "running_mean",
    "save_grid",
    "save_strip",
    "series",
]


def plot_loss(
    rows: Iterable[Mapping[str, Any]], path: str | Path, floor: float | None = None
) -> Path:
    """Write training loss over iterations: every logged value pale, their running mean dark.

    The mean stops half a window short of both ends: the last value alone would be noise in the
    colour of a result.

    Args:
        rows: Rows of the record; those without a finite train/loss are left out.
        path: Where to.
        floor: The loss of the exact score, where it is known.

    Raises:
        ValueError: If no row has a finite loss.
    """
    iterations, losses = series(rows, "train/loss")
    if not losses:
        raise ValueError("plot_loss needs a row with a finite train/loss; got none.")
    with new_figure(path, 6.4, 3.2) as figure:
        axes = figure.subplots()
        few = len(losses) < 3
        axes.plot(
            iterations,
            losses,
            color=BLUE,
            alpha=0.3,
            lw=1,
            marker="o" if few else None,
            label="logged",
        )
        means = running_mean(losses)
        half = (len(losses) - len(means)) // 2
        middle = iterations[half : half + len(means)]
        axes.plot(middle, means, color=BLUE, lw=2, label="running mean")
        if floor is not None:
            axes.axhline(floor, color=ORANGE, ls="--", lw=1.2, label=f"exact score: {floor:.4g}")
        if min(losses) > 0 and max(losses) > 10 * min(losses):
            _logarithmic(axes, max(losses) / min(losses))
        _iterations(axes)
        axes.set(ylabel="loss", title="Training loss")
        axes.legend()
    return Path(path)


def plot_bits(
    rows: Iterable[Mapping[str, Any]], path: str | Path, floor: float | None = None
) -> Path:
    """Write likelihood over iterations with one standard error up and down.

    Evaluations are drawn in the order of their iterations: an older checkpoint may have been
    evaluated last.

    Args:
        rows: Rows of the record with eval/bits_per_dim, or else eval/nll, and their ..._stderr.
        path: Where to.
        floor: Known entropy of the data, in the unit of the curve.

    Raises:
        ValueError: If no row holds an evaluation.
    """
    rows = sorted(rows, key=lambda row: row.get(ITERATION, 0))
    metric = next((name for name in UNITS if series(rows, name)[1]), None)
    if metric is None:
        raise ValueError(f"plot_bits needs a row with a finite {' or '.join(UNITS)}; got none.")
    iterations, values = series(rows, metric)
    errors = [_error(row, metric) for row in rows if _finite(row.get(metric))]
    with new_figure(path, 6.4, 3.2) as figure:
        axes = figure.subplots()
        axes.errorbar(
            iterations,
            values,
            yerr=errors,
            color=BLUE,
            marker="o",
            ms=4,
            lw=1.5,
            capsize=3,
            label="model, ± 1 standard error",
        )
        if floor is not None:
            axes.axhline(floor, color=ORANGE, ls="--", lw=1.2, label=f"entropy: {floor:.4g}")
        _iterations(axes)
        axes.set(ylabel=f"{UNITS[metric]}, lower is better", title="Test-set likelihood")
        axes.legend()
    return Path(path)


def plot_information(
    clock: Sequence[float], information: Sequence[float], path: str | Path, unit: str
) -> Path:
    """Write where the bits are: information by noise level, and what has been told down to it.

    Args:
        clock: u = log(sigma/alpha), increasing.
        information: Per unit of u, averaged over samples.
        path: Where to.
        unit: Of the information.

    Raises:
        ValueError: If there are fewer than two nodes.
    """
    if len(clock) < 2 or len(clock) != len(information):
        raise ValueError(f"plot_information needs two nodes or more; got {len(clock)}.")
    u, rate = (torch.tensor(values, dtype=torch.float64) for values in (clock, information))
    steps = 0.5 * (rate[1:] + rate[:-1]) * u.diff()
    told = torch.cat([steps.flip(0).cumsum(0).flip(0), torch.zeros(1)])  # from the noise end down
    with new_figure(path, 6.4, 3.2) as figure:
        axes = figure.subplots()
        ratio = u.exp().tolist()
        axes.fill_between(ratio, rate.tolist(), color=BLUE, alpha=0.25, lw=0)
        axes.plot(ratio, rate.tolist(), color=BLUE, lw=1.5, label="at this noise")
        axes.set(xscale="log", xlabel="noise, sigma / alpha", ylabel=f"{unit} per e-fold")
        axes.set_title("Where the bits are")
        axes.invert_xaxis()
        total = axes.twinx()
        total.grid(False)
        label = "sum from the left"
        total.plot(ratio, told.tolist(), color=ORANGE, lw=1.5, ls="--", label=label)
        # it grows without limit as the noise gets finer: a reader took its end for the likelihood
        total.set_ylabel(f"{label}, {unit}\n(not the likelihood)", color=ORANGE)
        total.spines["right"].set_visible(True)
        lines = [*axes.get_lines(), *total.get_lines()]
        axes.legend(lines, [line.get_label() for line in lines], loc="upper left")
    return Path(path)


def plot_rate_distortion(
    curve: Mapping[str, Sequence[float]], path: str | Path, unit: str
) -> Path:
    """Write rate against distortion of progressive coding, with standard errors.

    Args:
        curve: ``rate``, ``rate_error``, ``distortion`` and ``distortion_error``, bits per
            dimension and root mean squared error.
        path: Where to.
        unit: Of the distortion.

    Raises:
        ValueError: If the curve is empty.
    """
    if not curve.get("rate"):
        raise ValueError("plot_rate_distortion needs a curve; got an empty one.")
    with new_figure(path, 6.4, 3.2) as figure:
        axes = figure.subplots()
        axes.errorbar(
            curve["rate"],
            curve["distortion"],
            xerr=curve["rate_error"],
            yerr=curve["distortion_error"],
            color=BLUE,
            lw=1.5,
            elinewidth=0.6,
        )
        axes.set(
            xlabel="rate, bits per dimension",
            ylabel=f"root mean squared error, {unit}",
            title="Progressive coding",
            ylim=(0, None),
        )
    return Path(path)


def series(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Iterations and finite values of the metric ``name``, in the order of the record."""
    pairs = [(row.get(ITERATION, 0), row[name]) for row in rows if _finite(row.get(name))]
    return [x for x, _ in pairs], [y for _, y in pairs]


def running_mean(values: Sequence[float], span: float = 0.05) -> list[float]:
    """Mean over a window that reaches as far back as ahead: a fraction ``span`` of the series.

    A straight line stays a straight line. There is no mean where the window would be cut: the
    result lacks half a window at the beginning and as much at the end.
    """
    half = min(round(span * len(values) / 2), max(0, len(values) - 1) // 2)
    window = 2 * half + 1
    sums = [0.0, *itertools.accumulate(values)]
    return [(after - before) / window for before, after in zip(sums, sums[window:], strict=False)]


def _iterations(axes: Axes) -> None:
    axes.set_xlabel("iteration")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", " "))


def _logarithmic(axes: Axes, ratio: float) -> None:
    """Plain numbers on a logarithmic scale; over a few decades at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")


def _error(row: Mapping[str, Any], metric: str) -> float:
    error = row.get(f"{metric}_stderr")
    return max(0.0, error) if _finite(error) else 0.0


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
