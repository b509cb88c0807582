"""A run that is killed or stopped at any moment ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import example, names, same
from test_cli import refused, zygote

from benchmarks.kills import MOMENTS, kill_at, newest_digest, state_digest
from experiment.checkpoint import (
    list_checkpoints,
    load_newest,
    remove_partial_files,
    save_checkpoint,
)

TINY = [
    "mode=train",
    "data=arrays",
    "data.path=points.npy",
    "data.test_size=4",
    "network=mlp",
    "network.width=16",
    "training=vectors",
    "training.batch_size=16",
    "training.steps=18",
    "training.log_every=1",
    "training.checkpoint_every=3",
    "likelihood=exact",
    "likelihood.solver.nodes=12",
    "sampler.steps=2",
    "tracking=none",
]


class Started:
    """A run forked off the zygote, which can be killed while it works."""

    def __init__(self, cwd: Path, *choices: str):
        file = cwd / "pid"
        file.unlink(missing_ok=True)
        self.result = None
        self.thread = threading.Thread(target=self._run, args=(cwd, choices, file))
        self.thread.start()
        while not (file.exists() and file.read_text()):
            time.sleep(0.0005)
        self.pid = int(file.read_text())

    def _run(self, cwd: Path, choices: tuple[str, ...], file: Path) -> None:
        self.result = zygote().run([*TINY, *choices], cwd, pid=str(file))

    def poll(self) -> int | None:
        return None if self.thread.is_alive() else self.result.returncode

    def wait(self) -> int:
        self.thread.join(120)
        return self.result.returncode


def trained(folder: Path, *choices: str, before: str = ""):
    """A run in ``folder``, with ``before`` run in its process first."""
    return zygote().run([*TINY, *choices], folder, before=before)


def the_run(folder: Path) -> Path:
    return folder / "runs" / "arrays-vp-mlp"


def recorded(folder: Path) -> list[int]:
    rows = map(json.loads, (the_run(folder) / "metrics.jsonl").read_text().splitlines())
    return [row["train/iteration"] for row in rows if "train/loss" in row]


@pytest.fixture
def place(tmp_path) -> Path:
    """A directory with data to train on."""
    return with_data(tmp_path)


def with_data(folder: Path) -> Path:
    points = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    np.save(folder / "points.npy", points)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> str:
    """The digest of the undisturbed run."""
    folder = with_data(tmp_path_factory.mktemp("straight"))
    result = trained(folder)
    assert result.returncode == 0, result.stderr
    return newest_digest(folder)


def test_after_three_kills_the_state_is_that_of_the_undisturbed_run_to_the_bit(
    place, straight, seeded
):
    for moment, delay in zip(MOMENTS, torch.rand(3, generator=seeded(0)).tolist(), strict=True):
        code = kill_at(Started(place), moment, place, ahead=4, delay=0.01 * delay)
        assert code == -signal.SIGKILL, moment
    result = trained(place)
    assert result.returncode == 0 and "going on from" in result.stdout, result.stderr
    assert newest_digest(place) == straight
    assert recorded(place) == list(range(1, 19)), "each iteration once"


def test_the_digest_sees_each_bit_of_a_nested_state_and_no_text_of_ours():
    state = {"config": "a", "ema": {"0.9": {"w": torch.zeros(3)}}, "t": [torch.tensor(1), 2]}
    digest = state_digest(state)
    assert state_digest(state | {"config": "b"}) == digest
    state["ema"]["0.9"]["w"][1] = -0.0
    assert state_digest(state) != digest
    assert state_digest({"t": [torch.tensor(1), 2]}) != state_digest({"t": [torch.tensor(1.0), 2]})


# faults 17 and 18 within a save: what the process does to itself when it is about to call one of
# os's functions on a path that ends so
AT = """
import os, signal
original, seen = os.{function}, []
def acting(source, *arguments):
    if str((source, *arguments)[-1]).endswith({suffix!r}):
        seen.append(source)
        if len(seen) == {count}:
            os.kill(os.getpid(), signal.{number})
    return original(source, *arguments)
os.{function} = acting
"""


def test_killed_within_a_save_it_goes_on_from_the_checkpoint_before(place, straight):
    saved = 0
    for function, suffix in (("replace", ".sha256"), ("replace", ".pt"), ("unlink", ".pt")):
        killing = AT.format(function=function, suffix=suffix, count=2, number="SIGKILL")
        result = trained(place, before=killing)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert (f"step-{saved:08d}.pt, iteration {saved}" in result.stdout) == (saved > 0)
        reached = max(recorded(place))
        saved = reached if function == "unlink" else reached - 3
    result = trained(place)
    assert result.returncode == 0, result.stderr
    assert f"step-{saved:08d}.pt, iteration {saved}" in result.stdout
    assert newest_digest(place) == straight
    assert recorded(place) == list(range(1, 19)), "each iteration once"
    assert not list(place.rglob("*.partial"))


def test_signals_within_a_save_end_the_run_behind_it_each_with_its_code(place, straight):
    for count, number in ((1, "SIGUSR1"), (2, "SIGINT"), (1, "SIGTERM")):
        asking = AT.format(function="replace", suffix=".pt", count=count, number=number)
        result = trained(place, before=asking)
        assert result.returncode == 128 + getattr(signal, number), result.stdout + result.stderr
        assert "the same command goes on from there" in result.stdout
        assert json.loads((the_run(place) / "run.json").read_text())["state"] == "stopped"
        _, state = load_newest(the_run(place) / "checkpoints")
        assert recorded(place)[-1] == state["iteration"]
    assert trained(place).returncode == 0
    assert newest_digest(place) == straight


def test_a_signal_in_the_final_evaluation_says_what_is_left_to_do(place, straight):
    asking = AT.format(function="replace", suffix="likelihood.json", count=1, number="SIGUSR1")
    result = trained(place, before=asking)
    assert result.returncode == 138, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    assert last == "stopped by SIGUSR1 during the evaluation; the same command evaluates."
    assert json.loads((the_run(place) / "run.json").read_text())["state"] == "not evaluated"
    again = trained(place)
    assert again.returncode == 0 and "going on from" not in again.stdout
    assert newest_digest(place) == straight
    assert (the_run(place) / "likelihood.json").is_file()


def test_a_second_ctrl_c_stops_at_once(place):
    # the first comes within a save; the second before the next iteration is done
    twice = AT.format(function="replace", suffix=".sha256", count=1, number="SIGINT")
    twice += "\nimport time\nbefore = os.replace\n"
    twice += "def again(*arguments):\n    before(*arguments)\n"
    twice += "    if len(seen) == 1:\n        seen.append('once')\n"
    twice += "        os.kill(os.getpid(), signal.SIGINT)\n"
    twice += "os.replace = again\n"
    result = trained(place, before=twice)
    assert result.returncode == 130, result.stdout + result.stderr
    assert "goes on from there" not in result.stdout, "it did not wait for the save"
    assert "left at once by SIGINT, the second signal" in result.stdout
    assert not list_checkpoints(the_run(place) / "checkpoints")


def test_killed_before_any_operation_of_a_save_one_whole_checkpoint_remains(tmp_path):
    save_checkpoint(tmp_path, 1, example(1))
    save_checkpoint(tmp_path, 2, example(2))
    before = names(tmp_path)
    killed = 0
    while _killed_at_operation(killed, tmp_path):
        killed += 1
        path, state = load_newest(tmp_path)
        iteration = int(path.stem.partition("-")[2])
        assert iteration in (2, 3) and same(state["model"], example(iteration)["model"])
        remove_partial_files(tmp_path)
        assert len(list_checkpoints(tmp_path)) >= 2
        (tmp_path / "step-00000003.pt").unlink(missing_ok=True)
        remove_partial_files(tmp_path)
        if not (tmp_path / "step-00000001.pt").exists():
            save_checkpoint(tmp_path, 1, example(1))
        assert names(tmp_path) == before
    assert killed == 8, "two files opened, flushed, renamed; the oldest and its digest dropped"


def _killed_at_operation(number: int, folder: Path) -> bool:
    """Save in a child that kills itself before its operation ``number``; False if it has fewer."""
    child = os.fork()
    if child == 0:
        import builtins

        done = iter(range(1000))

        def deadly(function):
            def call(*arguments, **keywords):
                if next(done) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        builtins.open = deadly(open)
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        save_checkpoint(folder, 3, example(3))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_a_directory_whose_checkpoints_cannot_be_made_is_refused_before_the_first_step(place):
    the_run(place).mkdir(parents=True)
    (the_run(place) / "checkpoints").write_text("in the way")
    refused(trained(place), "run directory", "cannot be used", "run.name=NAME")
    assert not (the_run(place) / "metrics.jsonl").exists()


def test_a_time_limit_saves_and_leaves_with_0_and_the_same_command_goes_on(place, straight):
    jump = "import time\nfor name in ('time', 'time_ns'):\n    setattr(time, name, lambda: 0)\n"
    result = trained(place, "training.max_seconds=1e-6", before=jump)
    assert result.returncode == 0, result.stderr
    assert "stopped at iteration 1 by the time limit; the same command goes on" in result.stdout
    assert json.loads((the_run(place) / "run.json").read_text())["state"] == "stopped"
    assert trained(place).returncode == 0
    assert newest_digest(place) == straight


def test_the_code_for_a_requeue_can_be_chosen(place):
    asking = AT.format(function="replace", suffix=".pt", count=1, number="SIGUSR1")
    assert trained(place, "mode.requeue_code=99", before=asking).returncode == 99


def test_after_three_saves_in_a_row_that_the_disk_refused_one_more_ends_the_run(place, straight):
    full = """
import os
original = os.replace
def full(source, target):
    if str(target).endswith(".pt") and not str(target).endswith("3.pt"):
        raise OSError(28, "No space left on device")
    return original(source, target)
os.replace = full
"""
    result = trained(place, before=full)
    refused(result, "iteration 15 not written", "the last of 4 in a row", "step-00000003.pt")
    assert result.stdout.count("the one before it stays") == 3
    assert not list(place.rglob("*.partial"))
    assert trained(place).returncode == 0
    assert newest_digest(place) == straight


@pytest.mark.parametrize("lacking", ["optimizer", "model"])
def test_a_whole_checkpoint_that_lacks_a_part_is_told_in_one_line(place, lacking):
    assert trained(place, "training.steps=3").returncode == 0
    (path,) = list_checkpoints(the_run(place) / "checkpoints")
    state = torch.load(path, weights_only=True)
    state.pop(lacking)
    save_checkpoint(path.parent, 3, state)
    refused(trained(place), str(path.name), "does not fit this run", lacking, "run.fresh=true")
