"""Kills a training run again and again and compares what it ends with to an undisturbed run's.

python benchmarks/kills.py                    ten kills by SIGKILL, a few minutes
python benchmarks/kills.py --kills 30 --seed 1
python benchmarks/kills.py data=digits        other choices for the command line

Moments are drawn: some time after the start, at some iteration, and as soon as a checkpoint is
seen half written. Each line says which; the last ones compare the SHA-256 of weights, averages and
the optimiser's state.
"""

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parents[1]
CHOICES = [
    "mode=train",
    "data=eight_gaussians",
    "data.train_size=2000",
    "data.test_size=20",
    "network.width=64",
    "training.batch_size=64",
    "training.steps=1000",
    "training.checkpoint_every=5",
    "training.log_every=1",
    "training.evaluate_every=10000",
    "likelihood.solver.nodes=12",
    "sampler.steps=2",
    "tracking=none",
    "threads=1",
]
MOMENTS = ("start", "iteration", "save")


class Process(Protocol):
    """What is killed: a Popen will do."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""

    def wait(self) -> int:
        """The exit code, once it has ended."""


def state_digest(state: Any) -> str:  # noqa: ANN401
    """SHA-256 of all tensors and numbers in nested dicts and lists, with their names and types.

    What may differ between equal runs is left out: the text of the configuration, which names the
    directory, and the version.
    """
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:  # noqa: ANN401
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                add(f"{name}/{key}", value[key])
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                add(f"{name}/{place}", item)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{name} {value!r}\n".encode())

    add("", {key: value for key, value in state.items() if key not in ("config", "torch")})
    return digest.hexdigest()


def newest_digest(root: Path) -> str:
    """The digest of the newest checkpoint of the only run in ``root``."""
    newest = max(root.glob("runs/*/checkpoints/step-*.pt"))
    return state_digest(torch.load(newest, map_location="cpu", weights_only=True))


def reached(root: Path) -> int:
    """The last iteration that the run in ``root`` has recorded, 0 before the first."""
    text = b"".join(file.read_bytes() for file in root.glob("runs/*/metrics.jsonl"))
    found = re.findall(rb'"train/iteration": (\d+)', text)
    return int(found[-1]) if found else 0


def saved(root: Path) -> int:
    """The iteration of its newest checkpoint, 0 if there is none."""
    found = [path.stem for path in root.glob("runs/*/checkpoints/step-*.pt")]
    return int(max(found).partition("-")[2]) if found else 0


def half_written(root: Path) -> bool:
    """Whether a checkpoint of the run in ``root`` is being written right now."""
    return any(root.glob("runs/*/checkpoints/*.partial"))


def wait_for(process: Process, holds: Callable[[], bool]) -> None:
    """Return as soon as it ``holds`` or the process has ended."""
    while process.poll() is None and not holds():
        time.sleep(0.0002)


def kill_at(process: Process, moment: str, root: Path, ahead: int, delay: float) -> int:
    """Send SIGKILL at ``moment``; the exit code, -9 if it was in time.

    Args:
        process: A run of the command line in ``root``.
        moment: ``start``: ``delay`` seconds after the start; ``iteration``: that long after it has
            recorded ``ahead`` iterations beyond its newest checkpoint; ``save``: as soon as a
            checkpoint behind that is seen half written.
        root: Its directory.
        ahead: Iterations.
        delay: Seconds.
    """
    target = max(saved(root) + ahead, reached(root) + 1)  # what was recorded before is still there
    if moment != "start":
        wait_for(process, lambda: reached(root) >= target)
    deadline = time.monotonic() + delay
    wait_for(process, lambda: time.monotonic() >= deadline)
    if moment == "save":
        wait_for(process, lambda: half_written(root))
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    return process.wait()


def command_line(choices: list[str], root: Path) -> subprocess.Popen:
    """``python run.py CHOICES`` in ``root``."""
    command = [sys.executable, str(ROOT / "run.py"), *choices]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)


def main() -> int:
    """Run both and compare; the exit code is 0 if they agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked, choices = parser.parse_known_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight, disturbed = Path(folder) / "straight", Path(folder) / "disturbed"
        straight.mkdir()
        disturbed.mkdir()
        if command_line(CHOICES + choices, straight).wait():
            return 1
        print(f"undisturbed: {newest_digest(straight)}", flush=True)
        for number in range(asked.kills):
            moment = draw.choice(MOMENTS)
            ahead, delay = draw.randint(1, 150), draw.uniform(0, 8 if moment == "start" else 0.02)
            process = command_line(CHOICES + choices, disturbed)
            code = kill_at(process, moment, disturbed, ahead, delay)
            within = "within a save" if half_written(disturbed) else "between saves"
            print(
                f"kill {number + 1}: {moment} + {delay:.3f} s, exit code {code}, {within}, at "
                f"iteration {reached(disturbed)}, newest checkpoint {saved(disturbed)}",
                flush=True,
            )
        if command_line(CHOICES + choices, disturbed).wait():
            return 1
        same = newest_digest(straight) == newest_digest(disturbed)
        print(f"after {asked.kills} kills: {newest_digest(disturbed)}")
        print("the same" if same else "DIFFERENT")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
