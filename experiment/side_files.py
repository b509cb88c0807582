"""What stands beside the checkpoints of a run: a damaged file is set aside, the run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from experiment.checkpoint import load_newest, stored_config, write_atomically
from experiment.progress import say

Kind = TypeVar("Kind", dict, list)


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """What the JSON file ``path`` holds; empty if there is none.

    A file that is no JSON, or of another kind, is kept beside it under another name: what it held
    may be found again by hand, and nothing that depends on checkpoints does not need it.

    Raises:
        OSError: If it is there and cannot be read or moved.
    """
    if not path.exists():
        return kind()
    try:
        content = json.loads(path.read_bytes())
    except ValueError:  # no JSON, no UTF-8
        content = None
    if isinstance(content, kind):
        return content
    _set_aside(path)
    return kind()


def read_config(path: Path, checkpoints: Path) -> dict[str, Any] | None:
    """The configuration in ``path``; if it is missing or damaged, that of the newest checkpoint.

    Every checkpoint carries the configuration that it was trained with, so that a run without its
    ``config.yaml`` is still bound to its choices; the file is then written again.

    Args:
        path: ``config.yaml`` of the run.
        checkpoints: Where its checkpoints are.

    Returns:
        None if there is no checkpoint either: nothing was trained yet.

    Raises:
        CheckpointError: If the file is damaged and no checkpoint is whole.
    """
    stored = _read_yaml(path)
    if stored is not None:
        return stored
    newest = load_newest(checkpoints)
    if newest is None:
        return None
    stored = stored_config(*newest)
    if path.exists():
        _set_aside(path)
    write_config(path, stored)
    say(f"{path} was missing or damaged: written again from {newest[0].name}")
    return stored


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write ``config`` as YAML, in one step."""
    import yaml

    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    write_atomically(path, text.encode())


def _read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in ``path``; None if there is none."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) and content else None


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + ".damaged")
    os.replace(path, aside)
    say(f"warning: {path} is damaged; it is kept as {aside.name}, and the run goes on without it")
