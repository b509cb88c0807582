"""The likelihood against the width of the average, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.canvas import BLUE, GREY, new_figure
from experiment.settings import UNITS


def plot_widths(found: Mapping[str, Any], path: str | Path) -> Path:
    """Write the differences from the average of training against the width, with their standard
    errors; kept averages are filled, those put together hollow.

    Args:
        found: What mode=averages has found.
        path: Where to.

    Raises:
        ValueError: If no width gave a result.
    """
    rows = [row for row in found["results"] if "failed" not in row]
    if not rows:
        raise ValueError("plot_widths needs a result; every width failed.")
    with new_figure(path, 6.4, 3.6) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=GREY, lw=1.2, ls="--")
        axes.annotate(
            "average of training",
            (0.99, 0),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            color="#555",
        )
        axes.errorbar(
            [row["width"] for row in rows],
            [row["difference"] for row in rows],
            yerr=[row["difference_error"] for row in rows],
            color=BLUE,
            lw=1.5,
            elinewidth=1,
        )
        for row in rows:
            made = row["average_error"] is not None
            axes.plot(
                row["width"], row["difference"], "o", color=BLUE, mfc="white" if made else BLUE
            )
        axes.set(
            title=f"Test likelihood by width of the average ({found['num_samples']} samples)",
            xlabel="width, as a share of the training",
            ylabel=f"{UNITS[found['metric']]}, difference",
        )
    return Path(path)
