"""TensorBoard: event files below the run directory, for which nothing leaves the machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import metrics
from experiment.record import ITERATION, Record
from experiment.trackers.base import Tracker, look_for


class TensorBoardTracker(Tracker):
    """Event files in ``tensorboard`` below the run directory.

    A run that goes on hides what it is going to write again, so that no curve has two branches: it
    goes by the record, which is cut at the checkpoint first. The likelihood has a margin chart of
    one standard error each way under *Custom scalars*.
    """

    FOLDER = "tensorboard"

    def __init__(self) -> None:
        self._writer: Any = None
        self._folder = Path()

    def check(self) -> None:
        look_for("tensorboard", "tensorboard")

    def start(self, run_dir: str | Path, config: Mapping[str, Any], name: str) -> None:
        """Begin another event file, and write the configuration and the layout of the charts."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = Path(run_dir) / self.FOLDER
        iterations = [row.get(ITERATION, -1) for row in Record.read(run_dir)]
        self._writer = SummaryWriter(str(self._folder), purge_step=max(iterations, default=-1) + 1)
        self._writer.add_custom_scalars(layout())
        text = json.dumps(dict(config), indent=1, ensure_ascii=False, default=str)
        self._writer.add_text("config", f"{name}\n\n```json\n{text}\n```")
        self._writer.flush()

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Report metrics of one optimiser iteration; on disk when this returns."""
        if self._writer is not None:
            for name, value in metrics.with_limits(values).items():
                self._writer.add_scalar(name, value, iteration)
            self._writer.flush()

    def image(self, name: str, path: str | Path, iteration: int) -> None:
        """Report a picture file."""
        if self._writer is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(name, pixels, iteration, dataformats="HWC")

    def curve(self, name: str, x: Sequence[float], y: Sequence[float], iteration: int) -> None:
        """Report a curve as a picture: TensorBoard has no chart with an axis of one's own."""
        if self._writer is not None:
            from experiment.curve_figure import curve_picture

            with curve_picture(name, x, y) as path:
                self.image(name, path, iteration)

    def finish(self, exit_code: int = 0) -> None:
        """Note how the run ended, and close the event file."""
        if self._writer is not None:
            state = "finished" if exit_code == 0 else f"failed ({exit_code})"
            self._writer.add_text("state", state)
            self._writer.close()
            self._writer = None

    def describe(self) -> str:
        """The command that shows it."""
        where = shlex.quote(str(self._folder))
        return f"tensorboard, look:  tensorboard --logdir {where}"


def layout() -> dict[str, dict[str, list[Any]]]:
    """The page *Custom scalars*: a chart a metric; of an estimate with its band."""
    charts: dict[str, dict[str, list[Any]]] = {}
    for metric in metrics.NUMBERS:
        kind = "Margin" if metric.estimate else "Multiline"
        charts.setdefault(metric.section, {})[metric.title] = [kind, list(metric.series)]
    return charts
