"""The best levels for a number of steps: against brute force, and in the bound itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from experiment.errors import RunError
from experiment.fitted import fitted, keep_variance
from likelihood import calibrate_variance, discrete_bound
from sde_lib import VPSDE, DiscreteSDE, probability_flow
from sde_lib.grids import Grid, Karras, Subsequence, UniformLogSNR, UniformTime
from sde_lib.oracles import GaussianMixture
from sde_lib.reverse_variance import AnalyticVariance, PosteriorVariance, posterior
from sde_lib.samplers import Ancestral, Heun, PredictorCorrector
from sde_lib.sde import Level
from sde_lib.trajectory import OptimalTrajectory, optimal_trajectory, step_costs


def bumpy() -> AnalyticVariance:
    """A share of noise that falls along the clock, unevenly."""
    u = torch.linspace(-9, 6, 60, dtype=torch.float64)
    return AnalyticVariance(u, torch.sigmoid(-2 * u) * (1 + 0.5 * torch.sin(3 * u)), 1.0)


@pytest.mark.parametrize("steps", range(1, 8))
def test_the_way_is_that_of_brute_force(any_sde, steps):
    levels = any_sde.level(UniformLogSNR()(any_sde, 8 - 1))
    costs = step_costs(bumpy(), levels)

    def cost(way):
        return sum(float(costs[i, j]) for i, j in itertools.pairwise(way))

    ways = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]
    found = optimal_trajectory(costs, steps).tolist()
    assert found in [list(way) for way in ways]
    assert cost(found) == pytest.approx(min(map(cost, ways)), rel=1e-12)


def test_costs_are_half_the_log_of_the_variances_and_infinite_upwards():
    sde = VPSDE()
    rows = sde.level(UniformLogSNR()(sde, 5)).rows()
    costs = step_costs(bumpy(), sde.level(UniformLogSNR()(sde, 5)))
    for i, j in itertools.product(range(6), repeat=2):
        if i < j:
            v, low = (q(rows[j], rows[i]) for q in (bumpy(), PosteriorVariance()))
            assert_close(costs[i, j], 0.5 * (v / low).log())
        else:
            assert float(costs[i, j]) == math.inf


def test_as_many_steps_as_levels_are_all_of_them(any_sde):
    grid = OptimalTrajectory(30, UniformLogSNR(), bumpy())
    assert_close(grid(any_sde, 30), UniformLogSNR()(any_sde, 30), rtol=0, atol=0)


def test_levels_of_a_discrete_model_are_chosen_among_its_own():
    sde = DiscreteSDE.linear_betas()
    grid = OptimalTrajectory(50, Subsequence(), bumpy())
    assert set(grid(sde, 7).tolist()) <= set(Subsequence()(sde, 50).tolist())


EVEN = (UniformLogSNR(), UniformTime(), Karras())


@pytest.fixture
def modes() -> GaussianMixture:
    """25 narrow modes: where the levels are matters."""
    ticks = torch.linspace(-1.4, 1.4, 5, dtype=torch.float64)
    return GaussianMixture(torch.cartesian_prod(ticks, ticks), 0.05)


def test_the_expected_bound_is_no_worse_than_on_even_grids_at_any_step_count(modes, seeded):
    sde = VPSDE()
    flow = probability_flow(sde, modes.score(sde))
    train = modes.sample(1000, generator=seeded(0)).double()
    analytic = calibrate_variance(flow, train, steps=200, generator=seeded(2))

    def cost(grid: Grid, steps: int) -> float:
        return float(step_costs(analytic, sde.level(grid(sde, steps))).diagonal(1).sum())

    for steps in (2, 4, 5, 10, 20, 50):
        best = cost(OptimalTrajectory(200, variance=analytic), steps)
        # the first is one of the ways to choose from; the others fall between the levels
        others = [cost(grid, steps) for grid in EVEN]
        assert best <= others[0] + 1e-12
        assert best <= min(others) * 1.01
        if 5 <= steps <= 20:
            assert best < 0.95 * min(others), "and better with few steps"


def test_the_bound_itself_gains_what_its_expectation_says(modes, seeded):
    sde, n = VPSDE(), 1000
    flow = probability_flow(sde, modes.score(sde))
    train, x = (modes.sample(n, generator=seeded(k)).double() for k in (0, 1))
    analytic = calibrate_variance(flow, train, steps=200, generator=seeded(2))
    for steps in (5, 10):
        best, *others = (
            discrete_bound(
                flow, x, times=grid(sde, steps).flip(0), variance=analytic, generator=seeded(3)
            ).log_prob
            for grid in (OptimalTrajectory(200, variance=analytic), *EVEN)
        )
        for other in others:
            gain = best - other
            assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(n) > 0


def test_costs_of_a_limited_variance_are_those_of_its_error(any_sde):
    """Against the divergence of N(0, low) from N(0, v), with the error of the mean on top."""
    levels = any_sde.level(UniformLogSNR()(any_sde, 6))
    limited = replace(bumpy(), data_variance=0.05)
    start, end = (Level(*(c[part] for c in levels)) for part in (slice(0, -1), slice(1, None)))

    v, (low, _) = limited(end, start), posterior(end, start)
    missed = bumpy()(end, start) - low
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(0.0, low.sqrt()), normal(0.0, v.sqrt()))

    assert_close(step_costs(limited, levels).diagonal(1), divergence + 0.5 * missed / v)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimalTrajectory(0), "levels to be a whole number >= 1"),
        (lambda: OptimalTrajectory()(VPSDE(), 3), "mode=calibrate"),
        (lambda: OptimalTrajectory(5, variance=bumpy())(VPSDE(), 6), "pick 6 steps out of 5"),
    ],
)
def test_impossible_trajectories_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "make",
    [
        lambda grid: Ancestral(9, grid=grid, variance="analytic"),
        lambda grid: Heun(9, grid=grid),
        lambda grid: PredictorCorrector(9, grid=grid),
    ],
    ids=["ancestral", "heun", "corrected"],
)
def test_the_grid_of_any_sampler_is_of_the_model(make, mixture: GaussianMixture, tmp_path):
    sde, checkpoint = VPSDE(), tmp_path / "step.pt"
    checkpoint.write_bytes(b"weights")
    asked = make(OptimalTrajectory(40))
    asked.check(sde)
    where = {"like": torch.zeros(1, 2), "checkpoint": checkpoint, "folder": tmp_path}
    model = SimpleNamespace(score=mixture.score(sde), sde=sde)
    with pytest.raises(RunError, match="mode=calibrate"):
        fitted(asked, model, **where)
    keep_variance(bumpy(), checkpoint, tmp_path)
    ready = fitted(asked, model, **where)
    assert_close(ready.levels(sde).t, OptimalTrajectory(40, variance=bumpy())(sde, 9))
    assert ready.wanted == frozenset()
    ready(mixture.score(sde), sde, torch.zeros(2, 2), generator=torch.Generator().manual_seed(0))
