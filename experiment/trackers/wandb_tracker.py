"""Weights & Biases: online where that is possible, files below the run directory elsewhere."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import metrics
from experiment.errors import RunError, to_install
from experiment.record import ITERATION
from experiment.trackers import dashboard
from experiment.trackers.base import Tracker, one_line
from experiment.trackers.run_id import run_id
from sde_lib.validation import choice, flag

log = logging.getLogger(__name__)


class WandbTracker(Tracker):
    """Weights & Biases, with or without an account, a network or the package.

    Nothing here waits for a person. ``mode="auto"`` is online where credentials are found and the
    server takes them, otherwise offline: files below the run directory that ``wandb leet`` shows
    and ``wandb sync`` uploads later. Crash reports to wandb stay off unless
    WANDB_ERROR_REPORTING=true. A resumed run keeps its id, which is stored in ``wandb-id``.

    Args:
        project: Project on the server.
        mode: ``auto``; ``online`` fails with the reason instead of going offline; ``offline``
            does not even look for credentials.
        dashboard: Whether a run that is online also lays out a workspace on the server, once for
            all runs of the project below one ``run.root``. Where that fails, or the run is not
            online, one line says so and the run goes on.

    Raises:
        ValueError: If the mode is none of the three, or dashboard neither true nor false.
    """

    MODES = ("auto", "online", "offline")
    TIMEOUTS = {"init_timeout": 15.0, "login_timeout": 3.0, "finish_timeout": 30.0}  # seconds

    def __init__(
        self, project: str = "score-sde", mode: str = "auto", dashboard: bool = False
    ) -> None:
        self.project = project
        self.mode = choice("WandbTracker", "mode", mode, self.MODES)
        self.dashboard = flag("WandbTracker", "dashboard", dashboard)
        self._run: Any = None
        self._where = ""

    def start(self, run_dir: str | Path, config: Mapping[str, Any], name: str) -> None:
        """Begin the run, or go on with the one whose id stands in ``run_dir``.

        Raises:
            RunError: With ``mode="online"``, if wandb is missing, has no credentials or no server.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
        if self.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            self._where = "wandb: disabled by WANDB_MODE"
            return
        try:
            import wandb
        except ImportError as error:
            self._insist("wandb is not installed; run `pip install wandb`", error)
            self._where = "wandb is not installed; `pip install wandb` adds a dashboard"
            log.info("%s.", self._where)
            return
        arguments = {
            "project": self.project,
            "name": name,
            "id": wandb_id(Path(run_dir)),
            "dir": str(run_dir),
            "config": dict(config),
            "resume": "allow",
        }
        online = self._online(wandb, arguments)
        self._run = online or self._offline(wandb, arguments)
        # step= would drop what a resumed run logs again; an axis of our own shows the overlap
        self._run.define_metric(ITERATION)
        self._run.define_metric("*", step_metric=ITERATION)
        if self.dashboard:
            self._lay_out(online, Path(run_dir))

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Report metrics of one optimiser iteration."""
        if self._run is not None:
            self._run.log({**metrics.with_limits(values), ITERATION: iteration})

    def image(self, name: str, path: str | Path, iteration: int) -> None:
        """Report a picture file."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path)), ITERATION: iteration})

    def curve(self, name: str, x: Sequence[float], y: Sequence[float], iteration: int) -> None:
        """Report a curve as a chart with a table of its own."""
        if self._run is not None:
            import wandb

            about = metrics.curve_named(name)
            pairs = [[float(a), float(b)] for a, b in zip(x, y, strict=True)]
            table = wandb.Table(columns=[about.x, about.y], data=pairs)
            chart = wandb.plot.line(table, about.x, about.y, title=about.title)
            self._run.log({name: chart, ITERATION: iteration})

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; waits at most ``finish_timeout`` for uploads."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None

    def abandon(self) -> None:
        """Drop the service process, which would otherwise be asked again when Python exits."""
        import wandb

        wandb.teardown()

    def describe(self) -> str:
        """The address of the run, or how to look at its local files and upload them."""
        return self._where

    def _online(self, wandb: Any, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """The run on the server, or None if there is no way to it."""
        if self.mode == "offline":
            return None
        try:
            wandb.setup(settings=self._settings(wandb))
            if not wandb.login(prompt=False):
                self._insist(
                    "no wandb credentials, or WANDB_MODE says offline; "
                    "run `wandb login`, set WANDB_API_KEY"
                )
                log.info("no wandb credentials: tracking offline.")
                return None
            run = wandb.init(**arguments, mode="online", settings=self._settings(wandb))
        except RunError:
            raise
        except Exception as error:  # bad key, no network, server refuses, malformed address
            wandb.teardown()
            self._insist(f"wandb cannot go online: {one_line(error)}; try again", error)
            log.warning("wandb cannot go online (%s): tracking offline.", one_line(error))
            return None
        self._where = f"wandb: {run.url}"
        return run

    def _offline(self, wandb: Any, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
        run = wandb.init(**arguments, mode="offline", settings=self._settings(wandb))
        folder = shlex.quote(str(Path(run.dir).parent))
        self._where = (
            f"wandb (offline), look:    wandb leet {folder}\n"
            f"wandb (offline), upload:  wandb sync {folder}"
        )
        return run

    def _lay_out(self, online: Any, run_dir: Path) -> None:  # noqa: ANN401
        """Make the workspace of the project, or say in one line why there is none."""
        if online is None:
            log.warning("tracking.dashboard=true needs a run that is online: no dashboard.")
            return
        try:
            self._where += f"\ndashboard: {dashboard.lay_out(online, run_dir)}"
        except ModuleNotFoundError:
            log.warning(
                "tracking.dashboard=true needs the package wandb-workspaces: no dashboard; "
                f"{to_install('dashboard')} adds it."
            )
        except Exception as error:  # of the server, of the network, of a preview that has changed
            log.warning("no dashboard (%s); the run goes on.", one_line(error))

    def _settings(self, wandb: Any) -> Any:  # noqa: ANN401
        return wandb.Settings(
            **self.TIMEOUTS, console="off", silent=True, disable_git=True, disable_code=True
        )

    def _insist(self, reason: str, cause: Exception | None = None) -> None:
        if self.mode == "online":
            raise RunError(f"{reason}, or choose tracking=auto, which goes on without.") from cause


def wandb_id(run_dir: Path) -> str:
    """The id under which wandb knows the run in ``run_dir``."""
    return run_id(run_dir / "wandb-id")
