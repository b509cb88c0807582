"""`torchrun run.py mode=train` as a user meets it: one run, whatever happens to a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from test_cli import ENVIRONMENT, ROOT, TINY, run, wait_until

from experiment.checkpoint import list_checkpoints, load_checkpoint

CHOICES = [*TINY, "training.log_every=1"]


@pytest.fixture
def start(tmp_path):
    """Starts two processes of `torchrun run.py mode=train ARGUMENTS` in ``tmp_path``."""
    started = []

    def two(*arguments):
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *together, str(ROOT / "run.py"), "mode=train"]
        started.append(
            subprocess.Popen(
                [*command, *CHOICES, *arguments],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
            )
        )
        return started[-1]

    yield two
    for process in started:
        if process.poll() is None:
            process.terminate()  # it ends its own
        process.communicate(timeout=60)


def ended(process):
    """Exit code, stdout and stderr, once it ends."""
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def losses(folder):
    path = folder / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {row["train/iteration"]: row["train/loss"] for row in rows if "train/loss" in row}


def children(process):
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = (line.split(maxsplit=2) for line in listed.stdout.splitlines())
    return [int(pid) for pid, parent, args in rows if parent == str(process.pid)]


def test_two_processes_make_one_run_with_the_curve_of_one_and_one_goes_on(tmp_path, start):
    # a time in the name, to the microsecond, differs between processes
    code, printed, complaints = ended(start("run.name='two-${now:%f}'"))
    assert code == 0, complaints
    (two,) = (tmp_path / "runs").iterdir()
    assert printed.count("iteration 6: test set") == 1 and printed.count("report:") == 1
    assert len(json.loads((two / "likelihood.json").read_text())) == 1

    alone = run("mode=train", *CHOICES, "run.name=one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    one = losses(tmp_path / "runs/one")
    assert losses(two) == {i: pytest.approx(loss, rel=1e-5) for i, loss in one.items()}
    assert len(one) == 6

    more = run("mode=train", *CHOICES, f"run.name={two.name}", "training.steps=7", cwd=tmp_path)
    assert more.returncode == 0 and "going on from" in more.stdout
    assert list(losses(two)) == list(range(1, 8))


def test_a_process_that_is_killed_ends_all_and_the_same_command_goes_on_by_fsdp(tmp_path, start):
    endless = start("training.steps=100000", "training.checkpoint_every=4")
    home = tmp_path / "runs/digits-vp-unet"
    wait_until(lambda: len(losses(home)) > 5)
    os.kill(children(endless)[1], signal.SIGKILL)
    code, _, complaints = ended(endless)
    assert code != 0 and 'File "/run.py' not in complaints
    newest = load_checkpoint(list_checkpoints(home / "checkpoints")[-1])["iteration"]
    assert newest >= 4 and newest % 4 == 0

    steps = f"training.steps={newest + 2}"
    code, printed, complaints = ended(start(steps, "distributed=fsdp"))
    assert code == 0, complaints
    assert f"going on from runs/digits-vp-unet/checkpoints/step-{newest:08d}.pt" in printed
    assert list(losses(home)) == list(range(1, newest + 3))


def test_sigterm_saves_and_stops_all_and_a_locked_directory_ends_all_with_one_line(
    tmp_path, start
):
    endless = start("training.steps=100000", "training.checkpoint_every=100000")
    home = tmp_path / "runs/digits-vp-unet"
    wait_until(lambda: losses(home))

    code, _, complaints = ended(start())
    assert code != 0
    said = [line for line in complaints.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "is locked by" in said[0]

    endless.send_signal(signal.SIGTERM)
    _, printed, _ = ended(endless)
    assert "the same command goes on from there" in printed
    (saved,) = list_checkpoints(home / "checkpoints")
    assert load_checkpoint(saved)["iteration"] == max(losses(home))
    assert json.loads((home / "run.json").read_text())["state"] == "stopped"
