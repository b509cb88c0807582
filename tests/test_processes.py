"""Two processes train what one does: the same loss curve, weights, averages and optimiser."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
from gloo_run import one_of_them
from test_training import leaves
from torch.testing import assert_close

from experiment.checkpoint import list_checkpoints, load_checkpoint
from experiment.errors import RunError
from experiment.processes import DDP, FSDP
from score_models import DenoisingScoreMatching, SlicedScoreMatching


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(
    folder: Path, *, size: int = 2, kind: str = "ddp", batch=16, parts=1, stop=0, what="plain"
) -> dict:
    """What ``size`` processes have stored in the end."""
    port, forks = free_port(), multiprocessing.get_context("fork")
    started = []
    for rank in range(size):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = {name: str(value) for name, value in about.items()}, kind, batch, parts
        started.append(forks.Process(target=one_of_them, args=(*arguments, folder, stop, what)))
        started[-1].start()
    for process in started:
        process.join(240)
    assert [process.exitcode for process in started] == [0] * size
    return load_checkpoint(list_checkpoints(folder)[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("alone"), size=1)


def assert_alike(a: dict, b: dict) -> None:
    """Two states agree but for the order in which float32 sums are taken."""
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if not isinstance(value, torch.Tensor | float):
            assert value == b[key], key
            continue
        assert_close(b[key], value, rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


# 15 rows: the two processes have shares of 7 and 8
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_loss_curve_weights_and_averages_of_one(tmp_path, alone, kind):
    assert_alike(alone, run(tmp_path, kind=kind))


def test_uneven_shares_in_parts_give_the_same_mean_over_the_batch(tmp_path):
    whole = run(tmp_path / "one", size=1, batch=15)
    assert_alike(whole, run(tmp_path / "two", batch=15, parts=3))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, kind):
    stopped = run(tmp_path, kind=kind, stop=3)
    assert stopped["iteration"] == 3 and stopped["done"] is False
    ended = run(tmp_path, size=1)
    for part in ("model", "ema", "averages", "optimizer"):
        assert_alike(alone[part], ended[part])


def test_the_shares_of_the_processes_are_the_rows_of_the_batch():
    for batch, size in ((16, 4), (15, 4), (4, 4), (7, 1)):
        rows = []
        for rank in range(size):
            together = DDP()
            together.rank, together.size = rank, size
            rows += together.share(batch)
        assert rows == list(range(batch))


def test_more_processes_than_rows_are_refused():
    together = DDP()
    together.size = 4
    with pytest.raises(RunError, match="batch_size=3 is of all processes together"):
        together.share(3)


def test_a_gradient_in_parts_is_that_of_the_whole(tmp_path):
    whole, parts = run(tmp_path / "1", size=1), run(tmp_path / "5", size=1, parts=5)
    assert_alike(whole, parts)
    assert any(not torch.equal(a, parts["model"][k]) for k, a in whole["model"].items())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_a_conditional_network_as_one_does(tmp_path, kind):
    alone = run(tmp_path / "one", size=1, what="conditional")
    assert_alike(alone, run(tmp_path / "two", kind=kind, what="conditional"))


def test_what_needs_second_derivatives_is_refused_by_fsdp():
    together = FSDP()
    together.check(SlicedScoreMatching())  # alone it is nothing special
    together.size = 2
    together.check(DenoisingScoreMatching())
    with pytest.raises(RunError, match="distributed=fsdp frees.*Take distributed=ddp"):
        together.check(SlicedScoreMatching())
