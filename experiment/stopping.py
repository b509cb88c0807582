"""When training ends before its last iteration: signals and a time limit."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

from sde_lib import validation

REQUEUE = 128 + signal.SIGUSR1


class Stopping:
    """SIGTERM, SIGINT, SIGUSR1 or the end of the time ask for a stop; within ``with``.

    The loop asks :meth:`wanted` after each iteration, saves and leaves. A second signal leaves at
    once, as does the first once :attr:`saved` is set: all is on disk then, and the same command
    does the rest again.

    ====================  =================  ====================================================
    what                  exit code          meant for
    ====================  =================  ====================================================
    SIGTERM               143                a scheduler that takes the machine away
    SIGINT (Ctrl-C)       130                a person
    SIGUSR1               ``requeue_code``   SLURM: ``--signal=USR1@120`` and ``RequeueExit=138``
    ``max_seconds``       0                  a job that is to be as long as it was planned
    ====================  =================  ====================================================

    Args:
        max_seconds: Seconds after which to stop, by a clock that is never set back; None for no
            limit.
        requeue_code: Exit code for SIGUSR1, 1 to 255; 138 by the convention of shells.
    """

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, max_seconds: float | None = None, requeue_code: int = REQUEUE) -> None:
        if max_seconds is not None:
            validation.real("training", "max_seconds", max_seconds, above=0)
        self.requeue_code = validation.count("training", "requeue_code", requeue_code)
        if self.requeue_code > 255:
            raise ValueError(f"an exit code is 1 to 255; got requeue_code={requeue_code}.")
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.signal = 0
        self.saved = False

    def __enter__(self) -> Stopping:
        self.before = {number: signal.signal(number, self.handle) for number in self.CAUGHT}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, or leave."""
        second, self.signal = self.signal != 0, number
        if second or self.saved:
            raise SystemExit(self.exit_code)

    def wanted(self) -> bool:
        """Whether to save and leave."""
        return self.signal != 0 or self._over()

    @property
    def exit_code(self) -> int:
        """What to leave with after a stop; 0 for the time limit."""
        if self.signal == signal.SIGUSR1:
            return self.requeue_code
        return 128 + self.signal if self.signal else 0

    @property
    def reason(self) -> str:
        """What asked for the stop, for the message."""
        return signal.Signals(self.signal).name if self.signal else "the time limit"

    @property
    def farewell(self) -> str:
        """What to say after :class:`SystemExit`; a handler may not print."""
        if self.saved:
            return f"stopped by {self.reason} during the evaluation; the same command evaluates."
        return (
            f"left at once by {self.reason}, the second signal; the same command goes on from the "
            "newest checkpoint."
        )

    def _over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline
