"""Orders of the samplers, strong and weak, and what they do exactly: no Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import SDE, VESDE, VPSDE
from sde_lib.checks import measured_order
from sde_lib.grids import UniformLogSNR
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.samplers import (
    DDIM,
    DEIS,
    AdaptiveODE,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    DPMSolverPP,
    EulerMaruyama,
    FixedStepSampler,
    FlowAdams,
    Heun,
    LangevinCorrector,
    NoPredictor,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    UniPC,
)
from sde_lib.samplers.base import Step

Make = Callable[[int], Sampler]

FLOW = {
    "ddim": DDIM,
    "heun": Heun,
    "euler": partial(EulerMaruyama, eta=0.0, grid=UniformLogSNR()),
    "deis_1": partial(DEIS, order=1),
    "deis_2": partial(DEIS, order=2),
    "dpm_solver_1": partial(DPMSolver, order=1),
    "dpm_solver_2": partial(DPMSolver, order=2),
    "dpmpp_1": partial(DPMSolverPP, order=1),
    "dpmpp_2m": DPMSolverPP,
    "dpmpp_2s": partial(DPMSolver, order=2, prediction="data"),
    "unipc_1": partial(UniPC, order=1),
    "unipc_2": UniPC,
    "unipc_noise": partial(UniPC, prediction="noise"),
    "flow_adams_1": partial(FlowAdams, order=1, grid=UniformLogSNR()),
}
MANY_STEPS = {  # until the leading term of the error leads; on a Gaussian
    "dpm_solver_3": (DPMSolver, 3),
    "dpm_solver_3_full": (partial(DPMSolver, lower_order_final=False), 3),
    "dpmpp_3s": (partial(DPMSolver, prediction="data", lower_order_final=False), 3),
    "flow_adams_2": (partial(FlowAdams, order=2, grid=UniformLogSNR()), 2),
    "flow_adams_3": (partial(FlowAdams, order=3, grid=UniformLogSNR()), 3),
}
LOW_START = {  # on a Gaussian their first steps, of lower order, decide
    "deis_3": (DEIS, 3),
    "dpmpp_3m": (partial(DPMSolverPP, order=3), 3),
}
STOCHASTIC = {
    "euler_maruyama": EulerMaruyama,
    "euler_maruyama_half": partial(EulerMaruyama, eta=0.5),
    "reverse_diffusion": ReverseDiffusion,
    "reverse_diffusion_half": partial(ReverseDiffusion, eta=0.5),
    "ancestral": Ancestral,
    "ancestral_half": partial(Ancestral, eta=0.5),
    "ancestral_beyond": partial(Ancestral, eta=1.5),
}


def of(samplers: dict[str, Make]) -> pytest.MarkDecorator:
    """Parametrize over the values of ``samplers``, named by their keys."""
    return pytest.mark.parametrize("make", samplers.values(), ids=samplers.keys())


@of(FLOW)
def test_deterministic_sampler_converges_at_its_stated_order_on_a_gaussian(
    make: Make, sde: SDE
) -> None:
    assert measured_order(make, sde) == pytest.approx(make(3).converges, abs=0.2)


@of(FLOW)
def test_deterministic_sampler_converges_at_its_stated_order_on_a_mixture(
    make: Make, sde: SDE, mixture: GaussianMixture
) -> None:
    coarse, fine = mixture_errors(make, sde, mixture, (240, 960))

    assert math.log(coarse / fine, 4) == pytest.approx(make(3).converges, abs=0.2)


@of(MANY_STEPS)
def test_third_orders_are_reached_on_a_gaussian(make: tuple[Make, int], sde: SDE) -> None:
    build, order = make
    assert measured_order(build, sde, (240, 480, 960)) == pytest.approx(order, abs=0.2)


@of(LOW_START)
def test_third_orders_of_multistep_rules_are_reached_on_a_mixture(
    make: tuple[Make, int], mixture: GaussianMixture, sde: SDE
) -> None:
    build, order = make
    errors = mixture_errors(build, sde, mixture, (240, 960))
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.35)  # 2.67 on VE


@of({"unipc_3": partial(UniPC, order=3), "flow_adams_4": partial(FlowAdams, order=4)})
def test_fourth_orders_gain_more_than_a_third_order_could(
    make: Make, mixture: GaussianMixture
) -> None:
    sde = VPSDE()
    errors = mixture_errors(partial(make, grid=UniformLogSNR()), sde, mixture, (240, 480, 960))
    assert all(math.log2(coarse / fine) > 3.7 for coarse, fine in pairwise(errors))


def mixture_errors(
    make: Make, sde: SDE, mixture: GaussianMixture, steps: tuple[int, ...]
) -> list[float]:
    """RMS distances from a converged solve."""
    score = mixture.score(sde)
    x = sde.prior_sample((16, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = AdaptiveODE(rtol=1e-11, atol=1e-11, method="dopri8")(score, sde, x)
    ends = (make(n)(score, sde, x) for n in steps)
    return [float((end - exact).square().mean().sqrt()) for end in ends]


def zero(x: Tensor) -> Tensor:
    """No noise."""
    return torch.zeros_like(x)


def gaussian_moments(sampler: FixedStepSampler, sde: SDE, data: Gaussian) -> tuple[float, float]:
    """Exact mean and variance at t_min of a sampler started in the marginal of Gaussian data.

    For such data the whole trajectory is affine in its start and in each draw of noise: the
    moments follow, without samples, from one path that sees nothing and one for each of these.
    """
    paths = 2 + 2 * len(sampler.plan(sde).moves)
    x, drawn = torch.zeros(paths, dtype=torch.float64), 1
    x[1] = 1.0

    def noise() -> Tensor:
        nonlocal drawn
        drawn += 1
        return (torch.arange(paths) == drawn).double()

    for move, now, nxt in sampler.plan(sde):
        x = move(data.score(sde), x, now, nxt, noise)
    assert drawn < paths
    first = sde.level(torch.tensor(sde.t_max, dtype=torch.float64))
    mean = first.alpha * data.mean[0]
    variance = first.alpha**2 * data.variances[0] + first.sigma**2
    gains = x - x[0]
    spread = gains[1] ** 2 * variance + gains[2:].square().sum()
    return float(x[0] + gains[1] * mean), float(spread)


def wanted_moments(sde: SDE, data: Gaussian) -> tuple[float, float]:
    """Mean and variance of the marginal at t_min."""
    last = sde.level(torch.tensor(sde.t_min, dtype=torch.float64))
    return float(last.alpha * data.mean[0]), float(
        last.alpha**2 * data.variances[0] + last.sigma**2
    )


def weak_order(make: Make, sde: SDE) -> float:
    """Order at which mean and variance approach those of the marginal."""
    data = Gaussian(0.5, 0.8)
    wanted = wanted_moments(sde, data)
    coarse, fine = (math.dist(gaussian_moments(make(n), sde, data), wanted) for n in (256, 512))
    return math.log2(coarse / fine)


@of(STOCHASTIC)
def test_stochastic_sampler_is_weakly_of_order_one(make: Make, sde: SDE) -> None:
    assert weak_order(make, sde) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("churn", [10.0, 40.0])
def test_churned_heun_is_weakly_of_order_two(sde: SDE, churn: float) -> None:
    assert weak_order(partial(Heun, churn=churn), sde) == pytest.approx(2, abs=0.2)


def test_raising_the_noise_keeps_the_marginal_exactly(sde: SDE) -> None:
    t = torch.tensor([0.3, 0.4], dtype=torch.float64) * sde.t_max
    now, nxt = sde.level(t).rows()
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)

    silent = Heun(churn=1.0).raise_noise(None, x, now, nxt, partial(zero, x))
    loud = Heun(churn=1.0).raise_noise(None, x, now, nxt, partial(torch.ones_like, x))

    gain, fresh = silent[1] - silent[0], loud[0] - silent[0]
    assert_close(gain * now.alpha, nxt.alpha)
    assert_close(gain**2 * now.sigma**2 + fresh**2, nxt.sigma**2)


def test_churn_is_edms_gamma_between_its_bounds() -> None:
    sde = VESDE()
    plan = Heun(10, churn=5.0, churn_from=0.1, churn_to=10.0).plan(sde)

    raised = [(float(now.sigma), float(nxt.sigma)) for _, now, nxt in plan if nxt.t > now.t]

    inside = (Heun(10).grid(sde, 10)[:-1].apply_(lambda t: 0.01 * 5000**t) - 5.05).abs() <= 4.95
    assert len(raised) == int(inside.sum()) > 0
    for before, after in raised:
        assert 0.1 <= before <= 10
        assert after / before == pytest.approx(1 + min(5 / 10, math.sqrt(2) - 1))


def test_a_churn_below_rounding_stays_finite(sde: SDE) -> None:
    t = torch.linspace(sde.t_min, 0.99 * sde.t_max, 1000, dtype=torch.float64)
    x = torch.zeros(1000)  # float32, where the variance that is added may round below 0
    now, nxt = (sde.level(s).like(x) for s in (t, t * (1 + 1e-8)))

    raised = Heun(churn=1.0).raise_noise(None, x, now, nxt, partial(torch.ones_like, x))

    assert bool(torch.isfinite(raised).all())


def test_annealed_langevin_keeps_x_over_alpha_between_levels(sde: SDE) -> None:
    t = torch.tensor([0.9, 0.5], dtype=torch.float64) * sde.t_max
    now, nxt = sde.level(t).rows()
    x = torch.ones(3, dtype=torch.float64)

    moved = NoPredictor().step(lambda x, t: zero(x), x, now, nxt, partial(zero, x))

    assert_close(moved / nxt.alpha, x / now.alpha)


@pytest.mark.parametrize(
    "step",
    [LangevinCorrector(snr=0.1).step, AnnealedLangevin(step_size=0.02).plan(VPSDE()).moves[0][0]],
    ids=["corrector", "annealed"],
)
def test_langevin_step_keeps_the_noised_density_to_first_order(step: Step, sde: SDE) -> None:
    """On N(0, v) a step of size a = 0.02 sigma² takes v to (1 - a/v)² v + 2 a = v + a²/v."""
    data, t = Gaussian(0.0, 0.8), torch.tensor(0.3 * sde.t_max, dtype=torch.float64)
    level = sde.level(t)
    v = float(0.64 * level.alpha**2 + level.sigma**2)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)

    silent = step(data.score(sde), x, level, level, partial(zero, x))
    loud = step(data.score(sde), x, level, level, partial(torch.ones_like, x))

    a = 0.02 * float(level.sigma) ** 2
    assert float((silent[1] - silent[0]) ** 2 * v + (loud[0] - silent[0]) ** 2) == pytest.approx(
        v + a**2 / v
    )


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ancestral_is_exact_for_a_point_mass_at_any_step_count(
    sde: SDE, steps: int, eta: float
) -> None:
    point = Gaussian(0.7, 0.0)

    got = gaussian_moments(Ancestral(steps, eta=eta), sde, point)
    x = sde.prior_sample((5,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = Ancestral(steps, eta=eta)(point.score(sde), sde, x)

    assert got == pytest.approx(wanted_moments(sde, point), rel=1e-6)
    assert_close(x0, torch.full_like(x0, 0.7), rtol=1e-6, atol=0)


def test_corrector_improves_on_its_predictor() -> None:
    data, sde = Gaussian(0.5, 0.8), VPSDE()
    variance = wanted_moments(sde, data)[1]
    grid = UniformLogSNR()

    alone = gaussian_moments(ReverseDiffusion(50, grid=grid), sde, data)[1]
    corrected = gaussian_moments(PredictorCorrector(50, grid=grid, corrections=3), sde, data)[1]

    assert abs(corrected - variance) < abs(alone - variance)
