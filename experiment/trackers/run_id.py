"""The id under which a tracker knows a run: made once, then read from the run directory."""

from __future__ import annotations

import re
import secrets
from pathlib import Path


def run_id(path: Path) -> str:
    """The id in the file ``path``, eight characters; made where there is none or it is damaged."""
    stored = path.read_text(errors="replace").strip() if path.exists() else ""
    if re.fullmatch(r"[a-z0-9]{8}", stored):
        return stored
    fresh = secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fresh + "\n")
    return fresh
