"""What a run is: its configuration and who ran it, kept in its directory and held to."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiment.checkpoint import write_atomically
from experiment.config import differences, walk
from experiment.errors import RunError
from experiment.measured import refuse_other_data
from experiment.progress import say
from experiment.side_files import read_config, read_json, write_config


@dataclass(frozen=True)
class Identity:
    """``config.yaml``, which binds a run to its choices, and ``run.json``, which says who ran it.

    Args:
        folder: Directory of the run.
        config: Plain nested dicts; ``resume.allow_change`` lists keys that may be others than the
            run was begun with.
        changeable: Keys that may always change, with all below them.
        command: The arguments of Python that make this run; None: those it was started with.
    """

    folder: Path
    config: Mapping[str, Any]
    changeable: Sequence[str] = ()
    command: Sequence[str] | None = None

    def check(self, *, begun: bool) -> None:
        """Of a run that has ``begun``, hold the configuration to that of the run.

        Raises:
            RunError: If the directory belongs to a run with other choices; they are listed.
        """
        stored = self._stored(begun)
        if stored is not None:
            self._refuse_changes(stored)

    def write(self, *, begun: bool) -> None:
        """Write both; of a run that has ``begun``, hold the configuration to that of the run.

        A directory without a checkpoint yet, left by a run that was refused, is taken over. What
        ``resume.allow_change`` lets pass is noted in ``run.json``.

        Raises:
            RunError: If the directory belongs to a run with other choices; they are listed.
        """
        stored = self._stored(begun)
        if stored is not None:
            self._go_on_with(stored)
            return
        about = {
            "name": self.config["run"]["name"],
            "created": _now(),
            "command": shlex.join(["python", *(self.command or sys.argv)]),
            "versions": versions(),
            "state": "training",
        }
        self._write_about(about)
        write_config(self._config_path, self.config)

    def set_state(self, state: str) -> None:
        """Note in ``run.json`` how far the run is: training, stopped, finished or failed.

        Once it got somewhere with other choices than it was begun with, it is held to these.
        """
        self._write_about(self._about() | {"state": state})
        stored = read_config(self._config_path, self.folder / "checkpoints")
        if state != "failed" and differences(stored or {}, self.config, self.changeable):
            write_config(self._config_path, self.config)

    def _stored(self, begun: bool) -> dict[str, Any] | None:
        return read_config(self._config_path, self.folder / "checkpoints") if begun else None

    def _go_on_with(self, stored: Mapping[str, Any]) -> None:
        self._refuse_changes(stored)
        about = self._about()
        _tell_versions(about.get("versions"))
        changed = differences(stored, self.config, self.changeable)
        if changed:
            say(f"going on with other choices: {'; '.join(changed)}")
            about[f"changed {_now()}"] = changed
        self._write_about(about | {"versions": versions()})

    def _refuse_changes(self, stored: Mapping[str, Any]) -> None:
        refuse_other_data(self.folder, stored.get("measured"), self.config.get("measured"))
        ignored = (*self.changeable, *self._allowed(stored))
        changed = differences(stored, self.config, ignored)
        if changed:
            keys = ",".join(change.partition(":")[0] for change in changed)
            raise RunError(
                f"run directory {self.folder} holds a run with other choices "
                f"({'; '.join(changed)}); choose another directory with run.name=NAME, set the "
                "earlier run aside with run.fresh=true, or go on with the new values by "
                f'"resume.allow_change=[{keys}]".'
            )

    def _allowed(self, stored: Mapping[str, Any]) -> list[str]:
        """The keys of ``resume.allow_change``, each of which has to exist."""
        allowed = self.config.get("resume", {}).get("allow_change", [])
        known = {key for config in (stored, self.config) for key, _ in walk(config)}
        if isinstance(allowed, list) and all(key in known for key in allowed):
            return allowed
        raise RunError(
            "resume.allow_change lists keys of the configuration whose values may differ from "
            f'those of the run, as in "resume.allow_change=[training.lr]"; got {allowed}.'
        )

    @property
    def _config_path(self) -> Path:
        return self.folder / "config.yaml"

    def _about(self) -> dict[str, Any]:
        name = {"name": self.config["run"]["name"]}
        return name | read_json(self.folder / "run.json", dict)

    def _write_about(self, about: Mapping[str, Any]) -> None:
        write_atomically(self.folder / "run.json", json.dumps(about, indent=1).encode())


def versions() -> dict[str, str]:
    """Of all that decides the last bits of a number."""
    import numpy

    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
    }


def _tell_versions(before: object) -> None:
    """Say that a run which goes on with other versions is not the same to the bit."""
    old = before if isinstance(before, dict) else {}
    changed = [f"{k} {old[k]} -> {v}" for k, v in versions().items() if old.get(k, v) != v]
    if changed:
        say(
            f"versions differ from those before ({', '.join(changed)}): what follows is "
            "statistically the same, not bit for bit"
        )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
