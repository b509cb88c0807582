"""What all figures share: colours, style, and a file that is never half written.

Colours are those of Okabe and Ito, told apart with any colour vision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8A8F98"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555",
    "axes.labelcolor": "#222",
    "xtick.color": "#555",
    "ytick.color": "#555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "legend.frameon": False,
    "savefig.dpi": 144,
    "figure.facecolor": "white",
}


@contextmanager
def new_figure(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in inches that is written to ``path`` on the way out; no pyplot, no state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        write_picture(path, lambda partial: figure.savefig(partial, format="png"))


def write_picture(path: str | Path, save: Callable[[Path], object]) -> Path:
    """Let ``save`` write under another name, then rename; makes the folder.

    The name is a new one each time: training and an evaluation may write one report at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{token_hex(4)}.partial")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
