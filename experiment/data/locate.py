"""Where data files are looked for, and what is said when they are not there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiment.errors import RunError

VARIABLE = "SCORE_SDE_DATA"


def data_root(root: str | Path | None) -> Path:
    """``root`` if given, else the folder SCORE_SDE_DATA names, else ``data``."""
    return Path(root or os.environ.get(VARIABLE) or "data").expanduser()


def find(names: Sequence[str], folders: Iterable[Path]) -> Path | None:
    """The first of ``names`` in the first of ``folders`` that has one; None if none has."""
    return next(
        (folder / name for folder in folders for name in names if (folder / name).exists()), None
    )


def missing(name: str, files: Sequence[str], folders: Sequence[Path], homepage: str) -> RunError:
    """Says which files are nowhere, where it looked, where to get them, how to point there."""
    looked = ", ".join(str(folder.absolute()) for folder in folders)
    return RunError(
        f"{name}: not found: {', '.join(files)}; looked in {looked}. Get it from {homepage}, "
        f"then pass data.root=PATH, or set {VARIABLE}=PATH, where PATH is the folder that holds "
        "it."
    )
