"""Averages of the weights are those of their stated profile."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_training import SHORT, assert_same, small_state, train
from torch import nn

from experiment.averages import Average, Exponential, Power
from experiment.errors import RunError
from experiment.state import State
from score_models import EDM, DenoisingScoreMatching, ScoreModel
from sde_lib import VPSDE


def averaged(profile, path: torch.Tensor) -> list[float]:
    """Average of one weight, 7 at first, after each of the values of ``path``."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 7.0)
    average, found = Average(profile, module.double().parameters()), []
    for iteration, value in enumerate(path):
        nn.init.constant_(module.weight, float(value))
        average.update(list(module.parameters()), iteration)
        found.append(float(average.weights[0]))
    return found


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_width_is_the_relative_standard_deviation_of_the_profile(width):
    gamma = Power(width).exponent
    tau = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = (gamma + 1) * tau**gamma
    mean = torch.trapezoid(density * tau, tau)
    std = (torch.trapezoid(density * tau**2, tau) - mean**2).sqrt()
    assert float(std) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_a_power_average_weighs_the_iterations_by_a_power_of_their_share(width):
    path = torch.sin(torch.arange(1, 501, dtype=torch.float64) / 40)
    gamma = Power(width).exponent
    # the recurrence gives iteration i the weight (F(i) - F(i - 1)) / F(n), F(i) the product of the
    # rest: for kept = (1 - 1/i)^(gamma + 1) that is (i^g1 - (i - 1)^g1) / n^g1 with g1 = gamma + 1
    edges = torch.arange(0, 501, dtype=torch.float64) ** (gamma + 1)
    weights = edges.diff() / edges[-1]
    assert averaged(Power(width), path)[-1] == pytest.approx(float(weights @ path), abs=1e-10)
    share = torch.arange(1, 501, dtype=torch.float64) / 500
    smooth = (gamma + 1) * share**gamma / 500
    assert float((weights - smooth).abs().max()) < 0.5 * (gamma + 1) * gamma / 500**2 * 1.05


def test_an_exponential_average_forgets_its_start_and_warms_up():
    path = torch.cos(torch.arange(50, dtype=torch.float64))
    mean, expected = 7.0, []
    for n, value in enumerate(path.tolist()):
        kept = min(0.9, (1 + n) / (10 + n))
        mean = kept * mean + (1 - kept) * value
        expected.append(mean)
    assert averaged(Exponential(0.9), path) == pytest.approx(expected, abs=1e-12)


def test_a_constant_path_is_its_own_average():
    for profile in (Exponential(0.5), Power(0.1)):
        found = averaged(profile, torch.full((200,), 3.0, dtype=torch.float64))
        assert found[-1] == pytest.approx(3.0, abs=1e-12)


@pytest.mark.parametrize("width", [0.0, 0.3, -1.0, math.nan, "wide"])
def test_widths_that_no_power_has_are_refused(width):
    with pytest.raises(ValueError, match="power_ema"):
        Power(width)


class Counting(nn.Module):
    """A network with one buffer that is replaced in each pass, and one that has two homes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.inner.register_buffer("shared", torch.ones(2))
        self.register_buffer("too", self.inner.shared)

    def forward(self, x: torch.Tensor, noise_level: torch.Tensor, cond=None) -> torch.Tensor:
        self.passes = self.passes + 1
        return self.inner(x)


def test_averages_hold_the_newest_buffers_whether_replaced_or_shared():
    model, objective = ScoreModel(Counting(), VPSDE(), EDM(0.5)), DenoisingScoreMatching()
    state = State(model, objective, [Exponential(), Power()], {"lr": 1e-3})
    for number in (1, 2, 3):
        loss = objective(model, torch.ones(2, 1)).mean()
        loss.backward()
        model.network.inner.shared.fill_(number)
        state.update(loss.detach(), 1e-3, 1.0)
        for average in (state.average(0), state.average(1)):
            assert float(average.model.network.passes) == number
            assert average.model.network.too.tolist() == [number, number]


def after(settings, changed, stop, folder):
    """Of a run with averages as ``settings`` say, stopped at ``stop``, the rest as ``changed``."""
    state = small_state(settings)
    train(state, folder, settings, should_stop=lambda: state.iteration == stop)
    stored = state.state_dict() | {"iteration": state.iteration}
    state = small_state(changed)
    state.load(stored)
    train(state, folder, changed)
    return state.state_dict()["averages"]


def test_a_run_may_go_on_with_fewer_averages_and_these_are_what_they_were(tmp_path):
    more = replace(SHORT, ema=[0.9, 0.5], power_ema=[0.05, 0.1])
    fewer = replace(SHORT, ema=0.5, power_ema=[0.1])
    whole, rest = after(more, more, 3, tmp_path), after(more, fewer, 3, tmp_path)
    assert list(rest) == ["ema-0.5", "power-0.1"]
    assert_same(rest, {name: whole[name] for name in rest})


def test_a_power_average_cannot_begin_within_a_run_and_a_decay_says_that_it_does(tmp_path, capsys):
    few, more = replace(SHORT, power_ema=[0.1]), replace(SHORT, power_ema=[0.1, 0.2])
    with pytest.raises(RunError, match=r"width 0.2, .*none up to iteration 3\. .*power:0.2 can"):
        after(few, more, 3, tmp_path)
    assert "average" not in capsys.readouterr().out
    late = after(few, replace(few, ema=[0.999, 0.5]), 3, tmp_path)
    assert "the average ema-0.5 was not kept so far and begins at iteration 3" in (
        capsys.readouterr().out
    )
    assert list(late) == ["ema-0.999", "ema-0.5", "power-0.1"]


class Tied(nn.Module):
    """A network whose two layers are one, which has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.outer = self.inner

    def forward(self, x: torch.Tensor, noise_level: torch.Tensor, cond=None) -> torch.Tensor:
        return self.outer(self.inner(x))


def test_a_weight_of_two_names_is_stored_as_its_average_under_both():
    model, objective = ScoreModel(Tied(), VPSDE(), EDM(0.5)), DenoisingScoreMatching()
    state = State(model, objective, [Exponential(0.9)], {"lr": 1e-1})
    for _ in range(3):
        loss = objective(model, torch.ones(8, 1)).mean()
        loss.backward()
        state.update(loss.detach(), 1e-1, 1.0)
    stored, average = state.state_dict(), state.average(0).model.state_dict()
    for name in ("network.inner.weight", "network.outer.weight"):
        assert torch.equal(stored["ema"][name], average[name]), name
        assert not torch.equal(stored["ema"][name], stored["model"][name]), name
    again = State(
        ScoreModel(Tied(), VPSDE(), EDM(0.5)), objective, [Exponential(0.9)], {"lr": 1e-1}
    )
    again.load(stored | {"iteration": 3})
    assert_same(again.average(0).model.state_dict(), average)
