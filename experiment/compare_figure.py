"""Quality against cost: one panel a measure, one colour and marker a sampler in all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.canvas import BLUE, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

TITLES = {
    "endpoint_error": "Endpoint error",
    "sliced_w2": "Sliced W2",
    "energy_distance": "Energy distance",
    "mmd_squared": "MMD squared",
}
FLOOR = "training set"  # in the legend
SIGNED = ("energy_distance", "mmd_squared")  # without bias, and so below zero now and then
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

LETTERS = 105  # in a line of the legend

Row = Mapping[str, Any]


def plot_comparison(found: Row, path: str | Path) -> Path:
    """Write what mode=compare has found: each measure against the evaluations of a sample.

    Solid lines are deterministic samplers, broken ones stochastic; bars are 95 % intervals. The
    band is what training samples are from the test set: within it a sampler cannot be told from
    the data. Measures that may be negative have a scale that is linear up to the edge of the band,
    which is labelled, and logarithmic outside.

    Args:
        found: As it stands in ``compare-*.json``.
        path: Where to.

    Raises:
        ValueError: If no sampler gave a result.
    """
    rows = [row for row in found["results"] if "failed" not in row]
    if not rows:
        raise ValueError("plot_comparison needs a result; every sampler failed.")
    names = list(dict.fromkeys(row["sampler"] for row in found["results"]))
    panels = [name for name in TITLES if any(name in row for row in rows)]
    columns = 2 if len(panels) == 4 else len(panels)
    legend: dict[str, Any] = {}
    with new_figure(path, 9.2, 7.2 if columns == 2 else 3.9) as figure:
        grid = figure.subplots(-(-len(panels) // columns), columns)
        for measure, axes in zip(panels, grid.flat, strict=True):
            legend |= _panel(axes, measure, names, rows, found)
        known = [name for name in (*names, FLOOR) if name in legend]
        handles = [legend[name] for name in known]
        beside = min(len(known), max(1, LETTERS // (max(map(len, known)) + 7)))  # 7: its line
        figure.legend(handles, known, loc="outside upper center", ncols=beside)
    return Path(path)


def _panel(
    axes: Axes, measure: str, names: Sequence[str], rows: Sequence[Row], found: Row
) -> dict[str, Any]:
    """One measure of all samplers; what the legend is to explain, by name."""
    shown = {}
    axes.set(xlabel="evaluations a sample", title=TITLES[measure], xscale="log", yscale="log")
    _plain_numbers(
        axes, sorted(map(_nfe, rows))
    )  # first: one number alone has no range of its own
    for index, name in enumerate(names):
        own = [row for row in rows if row["sampler"] == name and measure in row]
        if own:
            # a little beside the others, so that no bar hides another
            beside = 1.1 ** ((index + 0.5) / len(names) - 0.5)
            shown[name] = _curve(axes, sorted(own, key=_nfe), measure, index, beside)
    if measure in found["floor"]:
        shown[FLOOR] = _floor(axes, measure, found["floor"][measure])
    else:
        _doubt(axes, found["reference"]["good_to"])
    return shown


def _nfe(row: Row) -> int:
    return row["nfe"]


def _curve(axes: Axes, rows: Sequence[Row], measure: str, index: int, beside: float) -> Artist:
    """The points of one sampler with their intervals."""
    value, low, high = ([row[measure][end] for row in rows] for end in ("value", "low", "high"))
    return axes.errorbar(
        [row["nfe"] * beside for row in rows],
        value,
        yerr=[
            [v - end for v, end in zip(value, low, strict=True)],
            [end - v for v, end in zip(value, high, strict=True)],
        ],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        mfc="white" if index >= len(COLOURS) else None,  # when the colours begin again
        ms=5,
        lw=1.5,
        elinewidth=1,
        ls="--" if rows[0]["stochastic"] else "-",
    )


def _floor(axes: Axes, measure: str, floor: Row) -> Artist:
    """The band of the training set; the scale is linear within it where values change sign."""
    edge = max(floor["high"], -floor["low"])
    if measure in SIGNED:
        axes.set_yscale("symlog", linthresh=edge)
    band = axes.axhspan(floor["low"], floor["high"], color=GREY, alpha=0.25, lw=0)
    if measure in SIGNED:
        _mark_linear_part(axes, edge)
    return band


def _mark_linear_part(axes: Axes, edge: float) -> None:
    """Labels at 0 and at the ``edge`` of the linear part of the scale, and at what is round
    further out."""
    from matplotlib.ticker import NullLocator

    low, high = axes.get_ylim()
    low, high = min(low, 0.0), max(high, edge)  # else there could be no tick at all
    signed = [0.0, edge, *([-edge] if low <= -edge else [])]
    axes.set_yticks([*signed, *_round_ones(edge, high)])
    axes.set_ylim(low, high)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{float(f'{value:.2g}'):g}")
    for end in signed[1:]:
        axes.axhline(end, color=GREY, lw=0.8, ls=(0, (2, 2)))


def _round_ones(edge: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between ``edge`` and ``high``, or over decades powers alone;
    none so near to the edge that its label would hide that."""
    factors, gap = ((1, 2, 5), 1.4) if high < 30 * edge else ((1,), 2.5)
    decades = range(math.floor(math.log10(edge)), math.floor(math.log10(high)) + 1)
    found = [factor * 10.0**k for k in decades for factor in factors]
    return [value for value in found if gap * edge <= value <= high]


def _doubt(axes: Axes, good_to: float) -> None:
    """The error of the reference itself, where it comes near what is held to it."""
    low, _ = axes.get_ylim()
    if good_to > low / 10:
        axes.axhline(good_to, color=GREY, ls=":", lw=1.2)
        axes.annotate(
            "error of the reference",
            (0.98, good_to),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            color="#555",
        )


def _plain_numbers(axes: Axes, nfe: Sequence[int]) -> None:
    """Evaluations as people write them: those there are, if few and close together; else 1, 2, 5,
    10, ..., or 1, 3, 10 where these would touch."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    close, wide = nfe[-1] < 3 * nfe[0], nfe[-1] >= 50 * nfe[0]
    few = FixedLocator(sorted({nfe[0], nfe[-1]}))
    axes.set_xlim(nfe[0] / 1.25, nfe[-1] * 1.25)
    axes.xaxis.set_major_locator(few if close else LogLocator(subs=(1, 3) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
