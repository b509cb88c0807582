"""Work on a test set: halved where memory runs out, shared by processes, the same numbers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_evaluation import SLANTED, GaussianNoise, levels_data, model_of, slanted_model
from torch.testing import assert_close

from experiment import shards
from experiment.errors import RunError
from experiment.estimators import estimate
from experiment.evaluation import evaluate
from experiment.settings import Likelihood
from likelihood import FixedGrid, Hutchinson

SETTINGS = Likelihood(solver=FixedGrid(16), divergence=Hutchinson(2), draws=2, batch_size=10)


class Small(GaussianNoise):
    """A network for which more than ``most`` rows at once are too many."""

    most = 6

    def forward(self, x, noise_level, cond=None):
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return super().forward(x, noise_level, cond)


def small_model():
    return model_of(Small(torch.zeros(3), SLANTED))


def test_batches_that_do_not_fit_are_halved_and_every_sample_stays_the_same(capsys):
    data = levels_data(11)
    whole = evaluate(slanted_model(), data, SETTINGS, seed=1)
    halved = evaluate(small_model(), data, SETTINGS, seed=1)
    assert_close(halved.per_sample, whole.per_sample, rtol=0, atol=1e-5)
    assert halved.nfe == whole.nfe and halved.passes == whole.passes
    assert "out of memory with 10 samples at once" in capsys.readouterr().out


def test_a_plan_and_a_calibration_are_halved_as_well():
    data = levels_data(11)
    settings = replace(SETTINGS, budget=0.2, draws=1, bounds=4)
    whole, halved = (
        evaluate(model, data, settings, seed=1) for model in (slanted_model(), small_model())
    )
    assert halved.how == whole.how
    assert_close(halved.per_sample, whole.per_sample, rtol=0, atol=1e-5)
    one, other = (
        estimate(model, data, settings, whole, seed=1)
        for model in (slanted_model(), small_model())
    )
    for name, (value, _) in one.values.items():
        assert other.values[name][0] == pytest.approx(value, abs=1e-5)


def test_a_single_sample_that_does_not_fit_says_what_to_do(monkeypatch):
    monkeypatch.setattr(Small, "most", 0)
    with pytest.raises(MemoryError, match="not even one sample"):
        evaluate(small_model(), levels_data(4), replace(SETTINGS, draws=1), seed=1)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def broken(rows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        shards.halving(broken, range(4))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [2, 10, 11])
def test_shares_are_a_partition(world, count, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    rows = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        rows += shards.share(count)
    assert rows == list(range(count))


@pytest.mark.parametrize(("rank", "wanted"), [(0, ["make", "wait"]), (1, ["wait", "make"])])
def test_the_first_process_makes_what_the_others_find(rank, wanted, monkeypatch):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    waiting = SimpleNamespace(barrier=lambda: seen.append("wait"))
    monkeypatch.setattr(shards, "together", lambda: waiting)
    assert shards.first_alone(lambda: seen.append("make") or 7) == 7
    assert seen == wanted


def test_what_is_not_shared_refuses_several_processes(monkeypatch):
    shards.alone("compare")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="mode=compare runs in one process; got 2"):
        shards.alone("compare")
