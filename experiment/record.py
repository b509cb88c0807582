"""The record of a run: ``metrics.jsonl``, append-only, one JSON object a line, on disk at once."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.progress import say
from sde_lib.validation import count

ITERATION = "train/iteration"
TIME = "time"
NONFINITE = "nonfinite"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, no quota, a limit of the shell's


class Record:
    """Appends rows to ``metrics.jsonl``; every tracker and figure is a view of this file.

    A row is one line and one write, so a run that is killed loses at most the line it was
    writing. Rows for which the disk has no room wait for the next one, up to ``PATIENCE``.

    JSON has no NaN and no infinity: such a value is stored as ``null`` and spelled out under
    ``"nonfinite"`` (``{"train/loss": null, "nonfinite": {"train/loss": "nan"}}``); ``read`` turns
    it back into a float.

    Args:
        run_dir: Directory of the run; made if it is not there.
    """

    FILE = "metrics.jsonl"
    ORPHANED = "metrics.jsonl.orphaned"
    PATIENCE = 1000

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / self.FILE
        self._waiting: list[bytes] = []

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Append one row and hand it to the operating system before returning.

        Args:
            values: Metric name to number; a tensor or array of one element counts as a number.
            iteration: Optimiser iteration, stored as ``train/iteration``. The row also gets
                ``time``, unix seconds.

        Raises:
            ValueError: If a value is no number or the iteration no whole number >= 0.
            OSError: If the file cannot be written, or the disk was full for too many lines.
        """
        count("Record.log", "iteration", iteration, at_least=0)
        row = {name: _number(name, value) for name, value in values.items()}
        row |= {ITERATION: int(iteration), TIME: time.time()}
        self._waiting.append(_encode(row))
        try:
            while self._waiting:
                _append(self.path, self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            if error.errno not in FULL or len(self._waiting) > self.PATIENCE:
                raise
            if len(self._waiting) == 1:
                say(f"warning: {self.path}: {error.strerror}; its lines wait for room")

    def cut(self, iteration: int) -> int:
        """Drop what a resumed run is going to write again, and what a crash left half written.

        Rows beyond ``iteration`` and unreadable lines move to ``metrics.jsonl.orphaned``. The
        file is replaced in one step: a crash in here leaves the old one or the new one.

        Args:
            iteration: Iteration of the checkpoint from which the run goes on, >= 0.

        Returns:
            How many lines moved.
        """
        count("Record.cut", "iteration", iteration, at_least=0)
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        lines = [line for line in content.split(b"\n") if line.strip()]
        kept = [line for line in lines if _stands(line, iteration)]
        orphaned = [line for line in lines if not _stands(line, iteration)]
        for line in orphaned:
            _append(self.run_dir / self.ORPHANED, line)
        repaired = b"".join(line + b"\n" for line in kept)
        if repaired != content:
            _replace(self.path, repaired)
        return len(orphaned)

    @classmethod
    def read(cls, run_dir: str | Path) -> list[dict[str, Any]]:
        """All rows in the order they were written; empty if there is no record yet.

        A line that a crash cut short is skipped.
        """
        path = Path(run_dir) / cls.FILE
        if not path.exists():
            return []
        rows = (_decode(line) for line in path.read_bytes().split(b"\n"))
        return [row for row in rows if row is not None]


def _number(name: str, value: Any) -> int | float:  # noqa: ANN401
    """``value`` as a plain number; whole numbers stay whole."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises RuntimeError for [2]
        raise ValueError(
            f"Record.log needs one number a metric; got {name}={value!r} "
            f"({type(value).__name__}); reduce it or leave it out."
        ) from error


def _encode(row: Mapping[str, float]) -> bytes:
    odd = {name: str(value) for name, value in row.items() if not math.isfinite(value)}
    clean: dict[str, Any] = {name: None if name in odd else value for name, value in row.items()}
    return json.dumps(clean | ({NONFINITE: odd} if odd else {}), allow_nan=False).encode()


def _decode(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None if the line is blank or torn."""
    try:
        row = json.loads(line)
        odd = row.pop(NONFINITE, {})
        return row | {name: float(word) for name, word in odd.items()}
    except (ValueError, TypeError, AttributeError):  # no JSON, no UTF-8, or not of our making
        return None


def _stands(line: bytes, iteration: int) -> bool:
    row = _decode(line)
    return row is not None and row.get(ITERATION, 0) <= iteration


def _append(path: Path, line: bytes) -> None:
    """One write a line; behind a torn line it starts a fresh one."""
    with open(path, "ab+", buffering=0) as file:
        end = file.tell()
        if end > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        try:
            if file.write(line + b"\n") <= len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)  # half a line would be one more to repair
            raise


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
