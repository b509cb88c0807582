"""What a tracker is, and the wrapper under which it cannot end a run."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiment.errors import EXTRAS, PACKAGES, RunError, to_install
from sde_lib import validation

log = logging.getLogger(__name__)


class Tracker(ABC):
    """Somebody who is told how a run goes.

    A tracker may raise in any call: training goes through ``Safe``, which makes that harmless.
    """

    def check(self) -> None:  # noqa: B027
        """Before anything else: refuse what cannot be had; without effect unless overridden.

        Raises:
            RunError: If there is such a thing, for example a package that is missing.
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

    def curve(  # noqa: B027
        self, name: str, x: Sequence[float], y: Sequence[float], iteration: int
    ) -> None:
        """Report a whole curve, for example diagnose/loss; without effect unless overridden.

        Args:
            name: One of ``metrics.CURVES``, which has its title and labels.
            x: Where, increasing.
            y: Values, as many.
            iteration: Of the model that it is a curve of.
        """

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

    def curve(self, name: str, x: Sequence[float], y: Sequence[float], iteration: int) -> None:
        """Pass on, unless the tracker has failed before."""
        self._call("curve", self.tracker.curve, name, x, y, iteration)

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
            one_line(error),
        )
        with suppress(Exception):
            self.tracker.abandon()


def look_for(choice: str, package: str) -> None:
    """Refuse ``tracking=choice`` at the door, without an import, which may be long or say things.

    Raises:
        RunError: If its package is not there.
    """
    try:
        validation.installed(package)
    except ModuleNotFoundError as error:
        raise missing(choice, error) from error


def missing(choice: str, error: ModuleNotFoundError) -> RunError:
    """What to say where ``tracking=choice`` was asked for and its package is not there."""
    module = (error.name or choice).partition(".")[0]
    remedy = to_install(EXTRAS.get(module, choice))
    return RunError(
        f"tracking={choice} needs the package {PACKAGES.get(module, module)}: {remedy}, or choose "
        "tracking=auto, which goes on without."
    )


def one_line(error: Exception) -> str:
    """Kind and message of ``error``, short enough for a warning."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
