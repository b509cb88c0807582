"""check_objective finds what is broken, each kind by its name, and passes what is not."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import run
from experiment.config import choices
from score_models import (
    DenoisingScoreMatching,
    Hybrid,
    LearnedVariance,
    Objective,
    UniformLevels,
)
from score_models.checks import check_objective
from sde_lib import EDMSDE, VESDE, CosineSDE, DiscreteSDE
from sde_lib.checks import ConformanceError
from sde_lib.noise import rand


def test_objectives_of_ours_pass_on_every_kind_of_process():
    for sde in (VESDE(), EDMSDE(), CosineSDE(), DiscreteSDE.linear_betas(num_levels=50)):
        check_objective(DenoisingScoreMatching(), sde, shape=(1, 2, 2))
        check_objective(Hybrid(UniformLevels(levels=50), LearnedVariance(8, 1)), sde)


def test_the_objective_of_the_page_passes_and_the_page_names_every_choice():
    page = (run.CONF.parent / "docs" / "objectives.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    check_objective(names["Huber"]())
    assert all(f"`{choice}`" in page for choice in choices(run.CONF)["objective"])


def test_what_is_checked_is_left_alone():
    objective, before = Hybrid(), torch.get_rng_state()
    check_objective(objective)
    assert objective.bound.variance.head is None
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class DrawsByBatch(DenoisingScoreMatching):
    def draw(self, sde, shape, generator):
        drawn = super().draw(sde, shape, generator)
        return drawn | {"t": drawn["t"].sort().values}


@dataclass(frozen=True)
class DrawsOneNumber(DenoisingScoreMatching):
    def draw(self, sde, shape, generator):
        return super().draw(sde, shape, generator) | {"more": rand((1,), None)}


@dataclass(frozen=True)
class Mean(DenoisingScoreMatching):
    def loss(self, model, x0, draws, cond=None):
        return super().loss(model, x0, draws, cond).mean()


@dataclass(frozen=True)
class Centred(DenoisingScoreMatching):
    def loss(self, model, x0, draws, cond=None):
        loss = super().loss(model, x0, draws, cond)
        return loss - loss.mean()


@dataclass(frozen=True)
class Shrunk(DenoisingScoreMatching):
    """Weight decay of the estimate: what a regulariser does to a proper loss."""

    def loss(self, model, x0, draws, cond=None):
        x = x0 + draws["noise"]
        shrink = model(x, draws["t"], cond).square().flatten(1).mean(1)
        return super().loss(model, x0, draws, cond) + 0.3 * shrink


@dataclass(frozen=True)
class Blind(DenoisingScoreMatching):
    def loss(self, model, x0, draws, cond=None):
        return 0 * super().loss(model, x0, draws, cond)


@dataclass(frozen=True)
class Rooted(DenoisingScoreMatching):
    """The square root of 0 has no slope: finite loss, gradient that is not."""

    def loss(self, model, x0, draws, cond=None):
        loss = super().loss(model, x0, draws, cond)
        return loss + (0 * loss).sqrt()


class Forgetful(Objective, nn.Module):
    """Its state is random."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DenoisingScoreMatching()
        self.register_buffer("seen", torch.zeros(()))

    def draw(self, sde, shape, generator):
        return self.inner.draw(sde, shape, generator)

    def loss(self, model, x0, draws, cond=None):
        return self.inner.loss(model, x0, draws, cond)

    def observe(self, draws, losses):
        self.seen += torch.rand(())


@pytest.mark.parametrize(
    ("objective", "complaint"),
    [
        (DrawsByBatch(), "should not depend on which others are drawn; t does"),
        (DrawsOneNumber(), r"one row a sample, 12 here; more is \(1,\)"),
        (Mean(), r"one number a sample, \[12\]; got \(\)"),
        (Centred(), "should not depend on its batch mates; alone it differs by"),
        (Shrunk(), "the mean gradient should vanish; in direction"),
        (Blind(), "the gradient of the model is zero"),
        (Rooted(), "the gradients should be finite"),
        (Forgetful(), "its state should be a function of .*; seen is not"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_each_break_of_the_contract_is_told(objective, complaint):
    with pytest.raises(ConformanceError, match=f"{type(objective).__name__}: .*{complaint}"):
        check_objective(objective)
