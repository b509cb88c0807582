"""trackio: a local database for all runs side by side, and a page that it serves."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import metrics
from experiment.trackers.base import Tracker, look_for
from experiment.trackers.run_id import run_id


class TrackioTracker(Tracker):
    """A database in ``.trackio`` beside the run directories, so that runs can be compared.

    TRACKIO_DIR names another place. Nothing leaves the machine unless TRACKIO_SPACE_ID or
    TRACKIO_SERVER_URL is set. A resumed run keeps its name, which ends in the id that is stored
    in ``trackio-id``; what it logs again is shown twice.

    Args:
        project: Under which name the runs stand together.
    """

    def __init__(self, project: str = "score-sde") -> None:
        self.project = project
        self._run: Any = None
        self._where = ""

    def check(self) -> None:
        look_for("trackio", "trackio")

    def start(self, run_dir: str | Path, config: Mapping[str, Any], name: str) -> None:
        """Begin the run, or go on with the one whose id stands in ``run_dir``."""
        beside = Path(run_dir).absolute().parent / ".trackio"
        os.environ.setdefault("TRACKIO_DIR", str(beside))  # read when trackio is imported
        import trackio

        remote = [k for k in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(k)]
        with _quiet() if remote else _alone():
            self._run = trackio.init(
                project=self.project,
                name=f"{name}-{run_id(Path(run_dir) / 'trackio-id')}",
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        shown = f"TRACKIO_DIR={shlex.quote(os.environ['TRACKIO_DIR'])} trackio show"
        local = f"trackio, look:  {shown} --project {shlex.quote(self.project)}"
        self._where = f"trackio: sent to where {remote[0]} says" if remote else local

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Report metrics of one optimiser iteration."""
        if self._run is not None:
            self._run.log(metrics.with_limits(values), step=iteration)

    def image(self, name: str, path: str | Path, iteration: int) -> None:
        """Report a picture file."""
        if self._run is not None:
            import trackio

            self._run.log({name: trackio.Image(str(path))}, step=iteration)

    def curve(self, name: str, x: Sequence[float], y: Sequence[float], iteration: int) -> None:
        """Report a curve as a picture: trackio draws against the step alone."""
        if self._run is not None:
            from experiment.curve_figure import curve_picture

            with curve_picture(name, x, y) as path:
                self.image(name, path, iteration)

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, with an alert if it failed; waits at most half a minute."""
        if self._run is not None:
            import trackio

            with _quiet():
                if exit_code != 0:
                    error = trackio.AlertLevel.ERROR
                    self._run.alert(title="failed", text=f"exit code {exit_code}", level=error)
                trackio.finish()
            self._run = None

    def describe(self) -> str:
        """The command that shows it, or where it was sent."""
        return self._where


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what trackio prints, partly in colours: ``describe`` says it in a line."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Quiet, and without the request to a hub by which trackio finds out a user's name."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        with _quiet():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
