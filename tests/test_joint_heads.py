"""A head that was trained with its network: from a checkpoint to samplers and to the bound."""

from __future__ import annotations

import json

import torch
from small_models import time, vector_model
from test_cli import TINY, run, the_run
from test_evaluation import gaussian_model, vectors
from torch import nn
from torch.testing import assert_close

from experiment.checkpoint import save_checkpoint
from experiment.estimators import estimate
from experiment.evaluation import evaluate
from experiment.fitted import digest_of, fitted
from experiment.settings import Likelihood
from experiment.variance_heads import (
    OBJECTIVE,
    HeadSettings,
    head_path,
    keep_head,
    learned_variance,
    new_head,
)
from likelihood import Exact, FixedGrid
from score_models import Hybrid, LearnedVariance
from score_models.variance_kinds import interpolated_variance
from sde_lib import VPSDE
from sde_lib.reverse_variance import VARIANCES, AnalyticVariance
from sde_lib.samplers import Ancestral

KINDS = ("learned", "forward", "posterior")


def trained_along(model, shape=(2,)) -> Hybrid:
    """What stands for a trained objective: one whose head says something."""
    torch.manual_seed(0)
    objective = Hybrid(variance=LearnedVariance(width=8, blocks=3))
    objective.prepare(model, torch.zeros(1, *shape))
    nn.init.normal_(objective.bound.variance.head.leave.weight, std=0.3)
    return objective.eval().requires_grad_(False)


def test_a_sampler_finds_the_head_in_the_checkpoint_and_one_trained_later_before_it(tmp_path):
    model = vector_model()
    objective = trained_along(model)
    path = save_checkpoint(tmp_path / "checkpoints", 7, {OBJECTIVE: objective.state_dict()})
    folder, like, x = tmp_path / "fitted", torch.zeros(1, 2), torch.randn(16, 2)
    asked = Ancestral(6, variance="learned")

    def drawn(sampler):
        return sampler(model.score, model.sde, x, generator=torch.Generator().manual_seed(1))

    found = fitted(asked, model, like, checkpoint=path, folder=folder)
    own = interpolated_variance(model, objective.bound.variance.head)
    assert torch.equal(drawn(found), drawn(Ancestral(6, variance=own)))
    assert not torch.allclose(drawn(found), drawn(Ancestral(6, variance="forward")))

    settings, weights = HeadSettings("learned", width=4, blocks=1), digest_of(path)
    later = new_head(model, (2,), settings)  # halfway between the two of DDPM: its output is 0
    analytic = AnalyticVariance(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5]), 1.0)
    kept = head_path("learned", weights, folder)
    keep_head(kept, weights, settings, analytic, later, finished=True)
    variance = learned_variance(path, weights, model, (2,), folder=folder)
    levels = [model.sde.level(time(u)[None]) for u in (-0.5, 0.5)]
    (at,) = variance.at_states(*levels)
    middle = (VARIANCES["posterior"](*levels) * VARIANCES["forward"](*levels)).sqrt()
    later_level = model.sde.level(time(0.5))
    v = at(x, later_level, model.noise(x, later_level.t))
    assert_close(v, middle.float().expand_as(v), rtol=1e-4, atol=0)


def test_the_head_of_another_average_goes_before_that_of_the_checkpoint(tmp_path):
    model = vector_model()
    objectives = [trained_along(model) for _ in range(2)]
    nn.init.normal_(objectives[1].bound.variance.head.leave.weight, std=0.3)
    path = save_checkpoint(tmp_path / "checkpoints", 7, {OBJECTIVE: objectives[0].state_dict()})
    folder, like, x = tmp_path / "fitted" / "ema-0.5", torch.zeros(1, 2), torch.randn(16, 2)
    asked, other = Ancestral(6, variance="learned"), objectives[1].state_dict()

    def drawn(sampler):
        return sampler(model.score, model.sde, x, generator=torch.Generator().manual_seed(1))

    found = fitted(asked, model, like, checkpoint=path, folder=folder, objective=other)
    own, first = (interpolated_variance(model, o.bound.variance.head) for o in objectives[::-1])
    assert torch.equal(drawn(found), drawn(Ancestral(6, variance=own)))
    assert not torch.allclose(drawn(found), drawn(Ancestral(6, variance=first)))


def test_a_checkpoint_without_a_head_has_none(tmp_path):
    for state in ({}, {OBJECTIVE: None}, {OBJECTIVE: {"bound.times.counts": torch.zeros(3)}}):
        path = save_checkpoint(tmp_path / "checkpoints", 7, state)
        found = learned_variance(path, digest_of(path), vector_model(), (2,), folder=tmp_path)
        assert found is None


def test_the_bound_of_mode_likelihood_has_the_learned_variance_beside_the_others():
    """A head that says nothing, in so many steps that all variances are nearly one."""
    data = vectors(40)
    model = gaussian_model(data)
    settings = Likelihood(
        solver=FixedGrid(32, halve=False), divergence=Exact(), batch_size=500, bounds=20
    )
    ode = evaluate(model, data, settings, seed=0)
    forward = VARIANCES["forward"]
    found = estimate(model, data, settings, ode, seed=0, learned=forward)
    assert found.values["VLB, learned variance"] == found.values["VLB, forward variance"]
    without = estimate(model, data, settings, ode, seed=0)
    assert "VLB, learned variance" not in without.values
    assert isinstance(model.sde, VPSDE)


def test_a_training_ends_with_the_bound_by_the_variance_that_it_learned(tmp_path):
    asked = [*TINY, "mode=train", "objective=ddpm_hybrid", "likelihood.bounds=3"]
    printed = run(*asked, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    *_, row = json.loads((the_run(tmp_path) / "likelihood.json").read_text())
    found = [row["bounds"]["values"][f"VLB, {kind} variance"] for kind in KINDS]
    assert len({value for value, _ in found}) == 3  # the learned one is between, and neither
