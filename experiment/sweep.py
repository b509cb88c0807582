"""Several runs by one command: what tells them apart, and what became of each."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from experiment.checkpoint import write_atomically
from experiment.errors import EXPECTED, RunError, one_line
from experiment.ledger import newest
from experiment.progress import say

LONGEST = 80  # characters of a name that choices add
WORK = ("mode", "sampler", "likelihood", "tracking", "checkpoint", "device", "threads")
"""What the other modes do with a run, as opposed to which run they do it with."""


class Override(Protocol):
    """A choice of the command line as hydra reads it."""

    input_line: str

    def get_key_element(self) -> str: ...
    def is_sweep_override(self) -> bool: ...
    def is_discrete_sweep(self) -> bool: ...
    def sweep_string_iterator(self) -> Iterator[str]: ...


def jobs(overrides: Sequence[Override]) -> list[list[str]]:
    """The command line of each job, in their order; of two choices of a key the last counts."""
    last = {override.get_key_element(): values(override) for override in overrides}
    return [[*job] for job in itertools.product(*last.values())]


def values(override: Override) -> list[str]:
    """An override for each value that it goes through; itself if it is no sweep.

    Raises:
        RunError: If these cannot be listed.
    """
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        raise RunError(f"{override.input_line} is no list of values; write {key}=A,B,C.")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def suffix(chosen: Mapping[str, str]) -> str:
    """What choices that differ within a sweep add to a name: ``-lr_0.003-seed_1``.

    Values are shortened to letters that need no quotes anywhere; a digest then keeps names apart.
    """
    if not chosen:
        return ""
    short = [key.rpartition(".")[2] for key in chosen]
    keys = short if len({*short}) == len(short) else [*chosen]
    exact = "".join(f"-{key}_{value}" for key, value in zip(keys, chosen.values(), strict=True))
    plain = re.sub(r"[^\w.+-]+", "_", re.sub(r"[\[\]{}()'\" ]", "", exact), flags=re.ASCII)
    if plain == exact and len(plain) <= LONGEST:
        return plain
    digest = hashlib.sha256(json.dumps([*chosen.items()]).encode()).hexdigest()[:6]
    return f"{plain[: LONGEST - 7]}-{digest}"


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        folder: Of the sweep, for the note of what became of it.
        number: From 0, in the order of the sweep.
        overrides: The choices of this one, ``key=value``.
        constant: Keys that are the same in all jobs.
    """

    folder: Path
    number: int
    overrides: Sequence[str]
    constant: Collection[str]

    def name(self, name: str, template: str, config: Mapping[str, Any]) -> str:
        """Name of the run with what tells it from the other jobs.

        Args:
            name: As the configuration has it.
            template: The same before the choices of groups were put in: those tell it apart
                already.
            config: The whole configuration; a checkpoint has its own directory.
        """
        pairs = (override.lstrip("+").partition("=")[::2] for override in self.overrides)
        swept = {key: value for key, value in pairs if key not in self.constant}
        training = mode_of(config) == "train"
        out = ("mode", "run.name") if training else ("run.name", *WORK)
        chosen = {
            key: value
            for key, value in swept.items()
            if not any(f"{key}.".startswith(f"{one}.") for one in out)
            and f"choices.{key}}}" not in template
        }
        return name if config["checkpoint"] else name + suffix(chosen)

    def carry_out(
        self, action: Callable[[], None], config: Mapping[str, Any], directory: Path
    ) -> None:
        """Do it; however it ends, the other jobs have their turn, but for a signal to stop."""
        choices = differing(self.overrides, self.constant)
        say(f"job {self.number}: {choices} -> {directory}")
        note = {"number": self.number, "choices": choices, "directory": str(directory)}
        # what stands if nothing of this process is left to say otherwise
        self._keep(note | {"result": "died", "good": False})
        ended = self._ended(action, note)
        if ended["good"] and mode_of(config) in ("train", "likelihood"):
            ended["result"] = newest(directory) or ended["result"]
        self._keep(note | ended)

    def _ended(self, action: Callable[[], None], note: Mapping[str, Any]) -> dict[str, Any]:
        try:
            action()
        except SystemExit as leaving:
            if leaving.code:  # of a signal
                self._keep({**note, "result": "stopped", "good": False})
                raise
            return {"result": "stopped", "good": True}  # its time was over
        except EXPECTED as error:
            print(f"error: job {self.number}: {one_line(error)}", file=sys.stderr, flush=True)
            return {"result": f"failed: {one_line(error)}", "good": False}
        except Exception as error:  # a mistake of ours: the other jobs need not have it
            traceback.print_exc()
            return {"result": f"failed: {type(error).__name__}", "good": False}
        return {"result": "finished", "good": True}

    def _keep(self, note: Mapping[str, Any]) -> None:
        content = json.dumps(note | {"time": time.time()}, indent=1).encode()
        write_atomically(self.folder / f"job-{self.number:04d}.json", content)


def differing(overrides: Sequence[str], constant: Collection[str]) -> str:
    """The choices of a job without those that all jobs have."""
    return " ".join(o for o in overrides if o.partition("=")[0].lstrip("+~") not in constant)


def mode_of(config: Mapping[str, Any]) -> str:
    """The function that is the mode."""
    return str(config["mode"].get("_target_")).rpartition(".")[2]


class Sweep:
    """The jobs of one command, wherever they run; says in the end what became of each.

    Args:
        root: Directory of the runs; what is noted of the sweep goes to ``sweeps`` in it.
        overrides: Of the command line, as hydra reads them.

    Raises:
        RunError: If the sweep would scatter over several places.
    """

    def __init__(self, root: Path, overrides: Sequence[Override]) -> None:
        self.folder = root / "sweeps" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        swept = {o.get_key_element().lstrip("+~"): o.is_sweep_override() for o in overrides}
        self.constant = [key for key, several in swept.items() if not several]
        if swept.get("run.root"):
            raise RunError("run.root is one place for a whole sweep; sweep over run.name instead.")

    def choices(self, job: Sequence[str]) -> str:
        """What tells a job from the others."""
        return differing(job, self.constant)

    @property
    def arguments(self) -> list[str]:
        """What hydra is told, and jobs in other processes by it."""
        keys = ",".join(f"'{key}'" for key in self.constant)
        return [
            f"hydra.sweep.dir='{self.folder}'",
            f"hydra.job.config.override_dirname.exclude_keys=[{keys}]",
        ]

    def __enter__(self) -> Sweep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        notes = [json.loads(path.read_bytes()) for path in sorted(self.folder.glob("job-*.json"))]
        if notes:
            say(table(notes))
        if kind is None and not all(note["good"] for note in notes):
            raise SystemExit(1)


def table(notes: Sequence[Mapping[str, Any]]) -> str:
    """Job, what became of it, where it is, and with which choices."""
    rows = [("job", "result", "directory", "choices")]
    for note in notes:
        result = note["result"] if len(note["result"]) <= 40 else f"{note['result'][:37]}..."
        rows.append((str(note["number"]), result, note["directory"], note["choices"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)
