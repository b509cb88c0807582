"""The solvers of torchdiffeq and torchsde agree with ours, and fail with a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from sde_lib import SDE, VESDE, VPSDE, Counted, DiscreteSDE, PerSample
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.samplers import AdaptiveODE, Heun, SamplingError, TorchSDE

SeededGenerator = Callable[[int], torch.Generator]


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_torchdiffeq_agrees_with_our_heun(method: str, mixture: GaussianMixture) -> None:
    sde = VPSDE()
    x = sde.prior_sample((8, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = Heun(400)(mixture.score(sde), sde, x)

    theirs = AdaptiveODE(rtol=1e-5, atol=1e-5, method=method)(mixture.score(sde), sde, x)

    assert_close(
        theirs, ours, rtol=0, atol=5e-3
    )  # some hundred steps of 1e-5, amplified at the fork


@pytest.mark.parametrize(
    "sde", [DiscreteSDE.linear_betas(), DiscreteSDE.geometric_sigmas()], ids=["ddpm", "ncsn"]
)
def test_adaptive_solver_meets_the_exact_flow_of_a_gaussian_on_discrete_models_too(
    sde: SDE,
) -> None:
    data = Gaussian(0.5, 0.8)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    solver = AdaptiveODE(rtol=1e-7, atol=1e-7, denoise=False)

    end = solver(data.score(sde), sde, data.push(sde, z, sde.t_max))

    assert_close(end, data.push(sde, z, sde.t_min), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "milstein", "srk", "heun", "midpoint", "euler_heun"])
def test_torchsde_reaches_the_moments_that_ours_reach(
    method: str,
    mixture: GaussianMixture,
    seeded: SeededGenerator,
    assert_moments: Callable[..., None],
) -> None:
    sde, generator = VPSDE(), seeded(0)
    x = sde.prior_sample((4000, 2), generator=generator)

    x0 = TorchSDE(100, method=method)(mixture.score(sde), sde, x, generator=generator)

    assert_moments(x0, mixture.mean(), mixture.variance(), bias=0.04)


@pytest.mark.parametrize("eta", [0.5, 1.5])
def test_torchsde_reaches_the_moments_at_any_amount_of_noise(
    eta: float,
    mixture: GaussianMixture,
    seeded: SeededGenerator,
    assert_moments: Callable[..., None],
) -> None:
    sde, generator = VESDE(), seeded(0)
    x = sde.prior_sample((4000, 2), generator=generator)

    x0 = TorchSDE(150, eta=eta)(mixture.score(sde), sde, x, generator=generator)

    assert_moments(x0, mixture.mean(), mixture.variance(), bias=0.06)


@pytest.mark.parametrize("steps", [1, 7, 15, 100])
def test_torchsde_leaves_no_step_over_by_rounding(sde: SDE, steps: int) -> None:
    """One evaluation a step, one by which torchsde checks shapes, one for the denoise."""
    x = sde.prior_sample((2, 1), generator=torch.Generator().manual_seed(0))
    score = Counted(Gaussian(torch.zeros(1), 1.0).score(sde))

    TorchSDE(steps)(score, sde, x, generator=torch.Generator())

    assert score.nfe == steps + 2


def test_reversible_heun_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match="refuses method='reversible_heun': it is unstable for stiff"
    ):
        TorchSDE(method="reversible_heun")


def test_srk_of_torchsde_keeps_samples_apart_too(mixture: GaussianMixture) -> None:
    sde = VPSDE()
    pair, alone = (
        TorchSDE(10, method="srk")(
            mixture.score(sde), sde, sde.prior_sample((len(s), 2), generator=g), generator=g
        )
        for s, g in (((3, 8), PerSample((3, 8))), ((8,), PerSample((8,))))
    )

    assert torch.equal(pair[1:], alone)


def test_an_adaptive_solve_that_does_not_finish_says_where_it_stopped(
    mixture: GaussianMixture,
) -> None:
    sde = VPSDE()

    with pytest.raises(
        SamplingError, match="not finished after 30 evaluations, at log.*; loosen rtol and atol"
    ):
        AdaptiveODE(rtol=1e-7, max_evaluations=30)(mixture.score(sde), sde, torch.ones(2, 2))


def test_tolerances_below_the_rounding_of_the_states_are_refused_at_the_door() -> None:
    solver, sde = AdaptiveODE(rtol=1e-10), VPSDE()

    solver.check(sde, torch.float64)
    with pytest.raises(ValueError, match="rtol to be a finite number >= 5.96.*got rtol=1e-10"):
        solver.check(sde)
    with pytest.raises(ValueError, match="got rtol=1e-10"):
        solver(lambda x, t: -x, sde, torch.ones(2, 2))
