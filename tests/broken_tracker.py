"""A tracker of a user's own that fails in every call."""

from __future__ import annotations

from experiment.trackers import NoTracker


class Broken(NoTracker):
    """Raises whatever it is told."""

    def start(self, *_: object) -> None:
        """Raise."""
        raise OSError("the wire was cut")

    log = image = curve = finish = describe = abandon = start
