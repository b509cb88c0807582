"""Batches made ahead, by a thread or by workers, are those made when they are asked for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from test_training import OBJECTIVE, levels_data

from experiment.batches import Recipe
from experiment.errors import RunError
from experiment.feed import Feed
from sde_lib import VPSDE

CPU = torch.device("cpu")


def recipe(data=None) -> Recipe:
    data = data or levels_data()
    return Recipe(data, data.units, OBJECTIVE, VPSDE(), batch_size=16, seed=3)


def same(a, b) -> bool:
    return torch.equal(a.x0, b.x0) and all(torch.equal(a.draws[k], b.draws[k]) for k in a.draws)


def test_rows_do_not_depend_on_the_rows_made_beside_them():
    whole = recipe()(4, range(16))
    for rows in (range(0, 8), range(8, 16), range(5, 6)):
        assert same(recipe()(4, rows), whole[slice(rows.start, rows.stop)])
    assert not torch.equal(whole.x0, recipe()(5, range(16)).x0)


@pytest.mark.parametrize("ahead, workers", [(0, 0), (1, 0), (3, 0), (0, 1), (3, 2)], ids=str)
def test_batches_made_ahead_are_the_same(ahead, workers):
    expected = recipe()
    feed = Feed(recipe(), range(4, 12), CPU, ahead=ahead, workers=workers)
    with feed.running():
        for iteration in (2, 3, 4, 9, 10, 0):  # a jump starts anew
            assert same(feed(iteration), expected(iteration, range(4, 12)))


def test_a_worker_that_dies_is_replaced_once(capsys):
    feed = Feed(recipe(), range(16), CPU, ahead=1, workers=1)
    with feed.running():
        first = feed(0)
        for iteration in (1, 2):
            for process in list(feed._pool._processes.values()):
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            if iteration == 2:
                with pytest.raises(RunError, match="died twice, the second time at iteration"):
                    [feed(iteration + later) for later in range(4)]
                break
            later = [feed(iteration + more) for more in range(3)]
            assert same(first, recipe()(0, range(16)))
            assert same(later[-1], recipe()(3, range(16)))
    assert "a worker died" in capsys.readouterr().out


class Damaged:
    """Samples of which one cannot be read."""

    shape, dtype = (40, 2), torch.int64

    def __len__(self):
        return 40

    def __getitem__(self, rows):
        raise RunError("sample-7.png cannot be read")


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_cannot_be_read_is_named_where_the_batch_is_used(ahead):
    made = recipe()
    object.__setattr__(made.data, "train", Damaged())
    feed = Feed(made, range(16), CPU, ahead=ahead, workers=0)
    with feed.running(), pytest.raises(RunError, match="sample-7.png"):
        feed(0)


def test_workers_leave_when_the_process_that_trains_is_killed(tmp_path):
    told = tmp_path / "worker"

    def train_a_little():
        feed = Feed(recipe(), range(16), CPU, ahead=1, workers=1)
        feed(0)
        told.write_text(str(next(iter(feed._pool._processes))))
        os.kill(os.getpid(), signal.SIGKILL)

    trainer = multiprocessing.get_context("fork").Process(target=train_a_little)
    trainer.start()
    trainer.join(120)
    worker, end = int(told.read_text()), time.monotonic() + 30
    while time.monotonic() < end and Path(f"/proc/{worker}").exists():
        time.sleep(0.2)
    assert not Path(f"/proc/{worker}").exists()
