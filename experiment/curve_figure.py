"""A curve with an axis of its own as a picture, for trackers that draw against the step alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from experiment.canvas import BLUE, new_figure
from experiment.metrics import curve_named


@contextmanager
def curve_picture(name: str, x: Sequence[float], y: Sequence[float]) -> Iterator[Path]:
    """A picture of y over x that is there as long as the block lasts.

    Args:
        name: One of ``metrics.CURVES``, which has its title and labels.
        x: Increasing; logarithmic where it is positive and spans more than two decades.
        y: As many values.
    """
    about = curve_named(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.png"
        with new_figure(path, 6.4, 3.2) as figure:
            axes = figure.subplots()
            axes.plot(x, y, color=BLUE, marker="o", ms=3, lw=1.5)
            axes.set(title=about.title, xlabel=about.x, ylabel=about.y)
            if min(x) > 0 and max(x) > 100 * min(x):
                axes.set_xscale("log")
        yield path
