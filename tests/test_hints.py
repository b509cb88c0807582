"""What may be asked for and is likely not meant is said once, and only then."""

from __future__ import annotations

import pytest
import torch
from test_cli import TINY, run

from experiment.hints import cores_here, tell_many_threads, tell_slow_precision


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_float16_is_told_of_on_a_cpu_alone(precision, device, capsys):
    tell_slow_precision(precision, torch.device(device))
    told = "precision=float16 is for GPUs" in capsys.readouterr().out
    assert told == ((precision, device) == ("float16", "cpu"))


def test_threads_are_told_of_beyond_the_cores(capsys):
    tell_many_threads(cores_here())
    assert not capsys.readouterr().out
    tell_many_threads(cores_here() + 1)
    assert f"threads={cores_here() + 1} on {cores_here()} core" in capsys.readouterr().out


def test_a_run_says_so_once_and_goes_on(tmp_path):
    many = f"threads={cores_here() + 1}"
    for threads, *more in (
        ("threads=1", "speed.precision=float16", "training.steps=1"),
        (many, "mode=sample", "mode.precision=float16", "mode.num_samples=2"),
    ):
        result = run(*TINY, "device=cpu", threads, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("hint: threads=") == (threads == many)
        assert result.stdout.count("hint: precision=float16") == 1
