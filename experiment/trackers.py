"""Where a run can be watched: views of the record, never the record itself.

Names of metrics, one prefix a section of the dashboard:

======================================  ===============================================
train/loss, train/grad_norm, train/lr   training; loss as optimised, norm before clipping
eval/bits_per_dim, ..._stderr           test set, bits per dimension of discrete data
eval/nll, eval/nll_stderr               test set, nats per sample of continuous data
eval/nfe                                network evaluations of that likelihood
samples/grid                            image
perf/images_per_s                       training speed
train/iteration                         the axis of all of them
======================================  ===============================================
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiment.errors import RunError
from experiment.record import ITERATION
from sde_lib.validation import choice

log = logging.getLogger(__name__)


class Tracker(ABC):
    """Somebody who is told how a run goes.

    A tracker may raise in any call: training goes through ``Safe``, which makes that harmless.
    """

    @abstractmethod
    def start(self, run_dir: str | Path, config: Mapping[str, Any], name: str) -> None:
        """Begin, or go on with, the run that lives in ``run_dir``.

        Args:
            run_dir: Directory of the run; local files of the tracker go below it.
            config: The composed configuration as plain dicts, lists and numbers.
            name: What people call the run.

        Raises:
            RunError: If the user insisted on something that cannot be had.
        """

    @abstractmethod
    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Report metrics of one optimiser iteration."""

    @abstractmethod
    def image(self, name: str, path: str | Path, iteration: int) -> None:
        """Report the picture in the file ``path`` under ``name``, for example samples/grid."""

    @abstractmethod
    def finish(self, exit_code: int = 0) -> None:
        """Close the run; any code but 0 marks it as failed."""

    @abstractmethod
    def describe(self) -> str:
        """Where to look, in one or two lines; empty if there is nothing to look at."""

    def abandon(self) -> None:  # noqa: B027
        """Let go of threads and processes after a failure; no other call follows."""


class NoTracker(Tracker):
    """Tells nobody; the record in the run directory is kept all the same."""

    def start(self, run_dir: str | Path, config: Mapping[str, Any], name: str) -> None:
        """Do nothing."""

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Do nothing."""

    def image(self, name: str, path: str | Path, iteration: int) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""

    def describe(self) -> str:
        """Nothing to look at."""
        return ""


class Safe(Tracker):
    """Keeps a run alive whatever ``tracker`` does: one warning, then the tracker is left alone.

    Only a ``RunError`` of ``start`` passes: there the user asked for what cannot be had, and
    nothing is lost yet.

    Args:
        tracker: Any tracker.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.alive = True

    def start(self, run_dir: str | Path, config: Mapping[str, Any], name: str) -> None:
        """Start the tracker.

        Raises:
            RunError: As the tracker does.
        """
        try:
            self.tracker.start(run_dir, config, name)
        except RunError:
            raise
        except Exception as error:
            self._give_up("start", error)

    @contextmanager
    def watching(
        self, run_dir: str | Path, config: Mapping[str, Any], name: str
    ) -> Iterator[None]:
        """Start, and finish however the block ends: as failed if it raises.

        Raises:
            RunError: As ``start`` does.
        """
        self.start(run_dir, config, name)
        exit_code = 1
        try:
            yield
            exit_code = 0
        finally:
            self.finish(exit_code)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Pass on, unless the tracker has failed before."""
        self._call("log", self.tracker.log, values, iteration)

    def image(self, name: str, path: str | Path, iteration: int) -> None:
        """Pass on, unless the tracker has failed before."""
        self._call("image", self.tracker.image, name, path, iteration)

    def finish(self, exit_code: int = 0) -> None:
        """Pass on, unless the tracker has failed before."""
        self._call("finish", self.tracker.finish, exit_code)

    def describe(self) -> str:
        """Where to look, also after a failure; empty if the tracker cannot say."""
        try:
            return self.tracker.describe()
        except Exception:
            return ""

    def _call(self, name: str, call: Callable[..., None], *args: Any) -> None:  # noqa: ANN401
        if not self.alive:
            return
        try:
            call(*args)
        except Exception as error:
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self.alive = False
        log.warning(
            "%s failed in %s (%s) and is switched off; metrics.jsonl goes on.",
            type(self.tracker).__name__,
            name,
            _one_line(error),
        )
        with suppress(Exception):
            self.tracker.abandon()


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

    Raises:
        ValueError: If the mode is none of the three.
    """

    MODES = ("auto", "online", "offline")
    TIMEOUTS = {"init_timeout": 15.0, "login_timeout": 3.0, "finish_timeout": 30.0}  # seconds

    def __init__(self, project: str = "score-sde", mode: str = "auto") -> None:
        self.project = project
        self.mode = choice("WandbTracker", "mode", mode, self.MODES)
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
        self._run = self._online(wandb, arguments) or self._offline(wandb, arguments)
        # step= would drop what a resumed run logs again; an axis of our own shows the overlap
        self._run.define_metric(ITERATION)
        self._run.define_metric("*", step_metric=ITERATION)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Report metrics of one optimiser iteration."""
        if self._run is not None:
            self._run.log({**values, ITERATION: iteration})

    def image(self, name: str, path: str | Path, iteration: int) -> None:
        """Report a picture file."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path)), ITERATION: iteration})

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
            self._insist(f"wandb cannot go online: {_one_line(error)}; try again", error)
            log.warning("wandb cannot go online (%s): tracking offline.", _one_line(error))
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

    def _settings(self, wandb: Any) -> Any:  # noqa: ANN401
        return wandb.Settings(
            **self.TIMEOUTS, console="off", silent=True, disable_git=True, disable_code=True
        )

    def _insist(self, reason: str, cause: Exception | None = None) -> None:
        if self.mode == "online":
            raise RunError(f"{reason}, or choose tracking=auto, which goes on without.") from cause


def wandb_id(run_dir: Path) -> str:
    """The id under which wandb knows the run in ``run_dir``: made once, then read."""
    path = run_dir / "wandb-id"
    stored = path.read_text(errors="replace").strip() if path.exists() else ""
    if re.fullmatch(r"[a-z0-9]{8}", stored):
        return stored
    fresh = secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fresh + "\n")
    return fresh


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
