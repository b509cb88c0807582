"""`torchrun run.py mode=train` as a user meets it: one run, whatever happens to a process."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cli import ENVIRONMENT, ROOT, TINY, Zygote, refused, run, wait_until
from test_processes import free_port

import experiment.run
import experiment.train
from experiment.checkpoint import list_checkpoints, load_checkpoint
from experiment.errors import RunError
from experiment.processes import DDP
from experiment.run import Run

CHOICES = [*TINY, "training.log_every=1"]
ENDLESS = ["training.steps=100000"]


ZYGOTES = []


def pair(*arguments, cwd):
    """Two processes of `run.py mode=train ARGUMENTS`, started as torchrun does but for the imports
    that others have paid: futures of how they end, and their numbers."""
    while len(ZYGOTES) < 2:
        ZYGOTES.append(Zygote())
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started, files = [], [Path(cwd) / f"pid-{where['MASTER_PORT']}-{rank}" for rank in (0, 1)]
    for rank, (zygote, file) in enumerate(zip(ZYGOTES, files, strict=True)):
        environment = where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        asked = ["mode=train", *CHOICES, *arguments]
        alone = ThreadPoolExecutor(1)
        started.append(alone.submit(zygote.run, asked, cwd, env=environment, pid=str(file)))
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return started, [int(file.read_text()) for file in files]


def torchrun(*arguments, cwd):
    """What two processes of `torchrun run.py mode=train ARGUMENTS` printed."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *together, str(ROOT / "run.py"), "mode=train", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )


def losses(folder):
    path = folder / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {row["train/iteration"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes; a time in the name, to the microsecond, differs between them."""
    folder = tmp_path_factory.mktemp("two")
    result = torchrun(*CHOICES, "run.name='two-${now:%f}'", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_two_processes_make_one_run_with_the_curve_of_one(two, tmp_path):
    folder, printed = two
    (home,) = (folder / "runs").iterdir()
    assert printed.count("iteration 6: test set") == 1 and printed.count("report:") == 1
    assert len(json.loads((home / "likelihood.json").read_text())) == 1

    alone = run("mode=train", *CHOICES, "run.name=one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    one = losses(tmp_path / "runs/one")
    assert losses(home) == {i: pytest.approx(loss, rel=1e-5) for i, loss in one.items()}
    assert len(one) == 6


def test_a_process_that_is_killed_ends_all_and_the_same_command_goes_on_by_fsdp(tmp_path):
    home = tmp_path / "runs/digits-vp-unet"
    ending, numbers = pair(*ENDLESS, "training.checkpoint_every=4", cwd=tmp_path)
    wait_until(lambda: len(losses(home)) > 5)
    os.kill(numbers[1], signal.SIGKILL)
    first, second = (one.result(120) for one in ending)
    assert second.returncode == -signal.SIGKILL
    refused(first, "another process of this run has ended", "the same command goes on")
    newest = load_checkpoint(list_checkpoints(home / "checkpoints")[-1])["iteration"]
    assert newest >= 4 and newest % 4 == 0

    steps = f"training.steps={newest + 2}"
    ending, _ = pair(steps, "distributed=fsdp", "distributed.smallest=2000", cwd=tmp_path)
    first, second = (one.result(120) for one in ending)
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr
    assert f"going on from runs/digits-vp-unet/checkpoints/step-{newest:08d}.pt" in first.stdout
    assert list(losses(home)) == list(range(1, newest + 3))


def test_a_signal_to_one_saves_and_stops_all(tmp_path):
    home = tmp_path / "runs/digits-vp-unet"
    ending, numbers = pair(*ENDLESS, "training.checkpoint_every=100000", cwd=tmp_path)
    wait_until(lambda: losses(home))
    os.kill(numbers[1], signal.SIGUSR1)
    first, second = (one.result(120) for one in ending)
    assert first.returncode == second.returncode == 128 + signal.SIGUSR1
    assert "the same command goes on from there" in first.stdout
    (saved,) = list_checkpoints(home / "checkpoints")
    assert load_checkpoint(saved)["iteration"] == max(losses(home))
    assert json.loads((home / "run.json").read_text())["state"] == "stopped"


def test_where_the_first_is_refused_the_others_end_without_a_traceback(tmp_path):
    home = tmp_path / "runs/digits-vp-unet"
    home.mkdir(parents=True)
    with open(home / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ending, _ = pair(cwd=tmp_path)
        first, second = (one.result(120) for one in ending)
    refused(first, "is locked by")
    refused(second, "another process of this run has ended")
    assert not [path for path in home.rglob("*") if path.is_file() and path.name != "lock"]


def test_processes_of_other_choices_or_without_the_shared_directory_are_refused(monkeypatch):
    config = {"run": {"root": "runs", "name": "a"}, "seed": 0, "device": "cpu", "mode": {}}
    others = config | {"run": {"root": "runs", "name": "b"}, "device": "cuda:1"}
    mine = Run(config, lambda node: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(experiment.run, "from_first", lambda value: others)
    assert mine._agreed().config == config | {"run": others["run"]}
    monkeypatch.setattr(experiment.run, "from_first", lambda value: others | {"seed": 1})
    with pytest.raises(RunError, match="seed: 1 -> 0"):
        mine._agreed()
    monkeypatch.setattr(experiment.train, "from_first", lambda value: Path("runs/a/step-1.pt"))
    with pytest.raises(RunError, match="a directory that all machines share"):
        experiment.train._newest(mine)


def test_a_machine_with_fewer_gpus_than_processes_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="2 processes on .* for 1 GPU.*--nproc-per-node 1"):
        DDP()._settle(torch.device("cuda"))
