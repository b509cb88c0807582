"""One tracker a run, however many processes share the work."""

from __future__ import annotations

from collections.abc import Callable

from experiment.shards import rank
from experiment.trackers.base import NoTracker, Safe, Tracker


def in_first_process(build: Callable[[], Tracker]) -> Safe:
    """What ``build`` makes, in the first process; the others tell nobody, and build nothing.

    Raises:
        RunError: If the tracker needs something that is not there.
    """
    tracker = build() if rank() == 0 else NoTracker()
    tracker.check()
    return Safe(tracker)
