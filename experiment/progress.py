"""Progress bars: drawn on stderr when a person watches, silent otherwise."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Progress(Generic[T]):
    """An iterable that shows how far it is.

    Args:
        items: What to go through.
        bar: A tqdm bar, or None to stay silent.
    """

    def __init__(self, items: Iterable[T], bar: Any = None) -> None:  # noqa: ANN401
        self.items = items
        self.bar = bar

    def __iter__(self) -> Iterator[T]:
        try:
            for item in self.items:
                yield item
                if self.bar is not None:
                    self.bar.update()
        finally:
            if self.bar is not None:
                self.bar.close()

    def note(self, text: str) -> None:
        """Show ``text`` behind the bar, for example the newest loss."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)


def progress(work: Iterable[T] | int, description: str) -> Progress[T]:
    """``work`` with a bar on stderr, if stderr is a terminal.

    Into a pipe, a file, a closed stream or a dumb terminal nothing is written. The bar has no
    colours and moves by carriage return alone, one within another too, so NO_COLOR holds without
    being asked. Without tqdm the loop runs silently.

    Args:
        work: An iterable, or a number n for ``range(n)``.
        description: Shown in front of the bar.
    """
    items: Iterable[Any] = range(work) if isinstance(work, int) else work
    if not _watched():
        return Progress(items)
    try:
        from tqdm import tqdm
    except ImportError:
        return Progress(items)
    total = len(items) if isinstance(items, Sized) else None
    known = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # not within some containers
    return Progress(
        items,
        tqdm(
            total=total,
            desc=description,
            file=sys.stderr,
            dynamic_ncols=known,
            ncols=None if known else 80,
            ascii=True if os.environ.get("NO_COLOR") else None,  # None: by the encoding of stderr
            mininterval=0.3,
            position=0,  # else a bar within a bar is placed by escape codes
        ),
    )


def say(text: str) -> None:
    """Print ``text`` as a line of its own: a bar on the terminal makes room and comes back.

    A reader that has gone (``| head``), a closed stdout or a full disk behind it costs the line
    and not the run; a letter that the terminal does not have becomes a question mark.
    Of several processes only the first speaks.
    """
    if _one_of_many():
        return
    try:
        from tqdm import tqdm

        room = tqdm.external_write_mode(sys.stdout)
    except ImportError:
        room = contextlib.nullcontext()
    try:
        with room:
            print(_shown(text), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _one_of_many() -> bool:
    return os.environ.get("RANK", "0") != "0"


def _shown(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _watched() -> bool:
    try:
        return not _one_of_many() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError, OSError):  # stderr is None, or closed
        return False
