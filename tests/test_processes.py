"""The processes: alpha, sigma, f and g against autodiff, closed forms and torchsde."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineSDE,
    DiscreteSDE,
    MarginalSDE,
    SubVPSDE,
    expand_like,
)
from sde_lib.checks import check_sde
from sde_lib.oracles import Gaussian


def times(sde: SDE, n: int = 41) -> Tensor:
    """Times from t_min to t_max, even in log t, float64."""
    steps = torch.linspace(math.log(sde.t_min), math.log(sde.t_max), n, dtype=torch.float64)
    return steps.exp().clamp(sde.t_min, sde.t_max)


def test_every_process_conforms(any_sde: SDE) -> None:
    check_sde(any_sde)


def test_drift_and_diffusion_generate_the_stated_marginals(any_sde: SDE) -> None:
    t = times(any_sde)
    one = torch.ones_like(t)
    log_alpha_rate = torch.func.jvp(lambda s: any_sde.alpha(s).log(), (t,), (one,))[1]
    variance, rate = torch.func.jvp(lambda s: any_sde.sigma(s) ** 2, (t,), (one,))

    assert_close(any_sde.drift_rate(t), log_alpha_rate)
    assert_close(any_sde.diffusion(t) ** 2, rate - 2 * log_alpha_rate * variance)


def test_log_snr_falls_strictly_and_time_at_inverts_it(any_sde: SDE) -> None:
    t = times(any_sde, 1001)
    log_snr = any_sde.log_snr(t)

    assert bool((log_snr.diff() < 0).all())
    assert_close(any_sde.time_at(log_snr), t, rtol=1e-8, atol=0)


def test_general_time_at_agrees_with_the_closed_form(sde: SDE) -> None:
    log_snr = sde.log_snr(times(sde))

    assert_close(SDE.time_at(sde, log_snr), sde.time_at(log_snr), rtol=1e-8, atol=0)


def test_time_at_stays_inside_the_range_beyond_its_ends(any_sde: SDE) -> None:
    t = any_sde.time_at(torch.tensor([100.0, -100.0], dtype=torch.float64))

    assert t.tolist() == [any_sde.t_min, any_sde.t_max]


def test_single_precision_does_not_cancel_near_t_min(any_sde: SDE) -> None:
    t = torch.tensor([any_sde.t_min, 1.5 * any_sde.t_min, 10 * any_sde.t_min])  # float32

    assert any_sde.sigma(t).dtype == torch.float32
    assert_close(any_sde.sigma(t).double(), any_sde.sigma(t.double()), rtol=1e-4, atol=0)
    assert_close(any_sde.diffusion(t).double(), any_sde.diffusion(t.double()), rtol=1e-4, atol=0)


def test_variance_preserving_processes_preserve_unit_variance() -> None:
    for sde in (VPSDE(), CosineSDE(), DiscreteSDE.linear_betas()):
        t = times(sde)
        assert_close(sde.alpha(t) ** 2 + sde.sigma(t) ** 2, torch.ones_like(t))


def test_standard_deviation_of_sub_vp_is_the_variance_of_vp() -> None:
    t = times(VPSDE())

    assert_close(SubVPSDE().sigma(t), VPSDE().sigma(t) ** 2)
    assert_close(SubVPSDE().alpha(t), VPSDE().alpha(t))


def test_processes_take_their_published_values() -> None:
    def at(t: float) -> Tensor:
        return torch.tensor(t, dtype=torch.float64)

    # log alpha(t) = -t² (beta_max - beta_min) / 4 - t beta_min / 2
    assert float(VPSDE().alpha(at(1.0))) == pytest.approx(math.exp(-19.9 / 4 - 0.05), rel=1e-12)
    assert float(VPSDE().diffusion(at(0.5)) ** 2) == pytest.approx(10.05, rel=1e-12)
    assert float(VESDE().sigma(at(0.0))) == pytest.approx(0.01, rel=1e-12)
    assert float(VESDE().sigma(at(1.0))) == pytest.approx(50.0, rel=1e-12)
    assert float(EDMSDE().sigma(at(7.0))) == 7.0
    published = math.cos((0.3 + 0.008) / 1.008 * math.pi / 2) / math.cos(
        0.008 / 1.008 * math.pi / 2
    )
    assert float(CosineSDE().alpha(at(0.3))) == pytest.approx(published, rel=1e-12)


def test_forward_simulation_by_torchsde_reproduces_mean_and_std(
    sde: SDE, assert_moments: Callable[..., None]
) -> None:
    import torchsde

    class Forward:
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t: Tensor, x: Tensor) -> Tensor:
            return sde.drift(x, t)

        def g(self, t: Tensor, x: Tensor) -> Tensor:
            return sde.diffusion(t).expand_as(x)

    n, x0, steps = 4000, torch.tensor([3.0, -1.0], dtype=torch.float64), 512
    start, end = (torch.tensor(t, dtype=torch.float64) for t in (sde.t_min, 0.5 * sde.t_max))
    mean, std = sde.marginal(x0[None], start)
    x = mean + std * torch.randn(
        n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    dt = float(end - start) / steps
    path = torchsde.BrownianInterval(
        float(start),
        float(end),
        size=(n, 2),
        dtype=torch.float64,
        entropy=1,
        dt=dt,
    )

    x = torchsde.sdeint(Forward(), x, torch.stack([start, end]), bm=path, dt=dt, method="euler")[
        -1
    ]

    mean, std = sde.marginal(x0[None], end)
    # Euler's own bias: VE's variance grows by 1.7 % a step, and its left end misses half of that
    assert_moments(x, mean[0], (std**2).expand(2), bias=0.02)


def test_tweedie_is_the_posterior_mean_of_a_gaussian(any_sde: SDE) -> None:
    data, t = Gaussian(0.5, 2.0), times(any_sde, 9)
    x = torch.linspace(-3, 3, 9, dtype=torch.float64)
    level = any_sde.level(t)

    denoised = level.denoised(x, data.score(any_sde)(x, t))

    gain = 4 * level.alpha / (4 * level.alpha**2 + level.sigma**2)
    assert_close(denoised, 0.5 + gain * (x - 0.5 * level.alpha), rtol=1e-6, atol=1e-6)


def test_level_noise_and_denoised_rebuild_the_state(any_sde: SDE) -> None:
    x, score = torch.randn(
        2, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    level = any_sde.level(times(any_sde, 5))

    rebuilt = level.expand_like(x).alpha * level.denoised(x, score)

    assert_close(rebuilt + level.expand_like(x).sigma * level.noise(score), x)


def test_transitions_compose_and_carry_the_marginal_along(any_sde: SDE) -> None:
    early, middle, late = (any_sde.level(t) for t in times(any_sde)[[0, 17, 33]])
    (a1, v1), (a2, v2), (a, v) = (
        early.transition(middle),
        middle.transition(late),
        early.transition(late),
    )
    assert_close(a1 * a2, a)
    assert_close(a2**2 * v1 + v2, v)
    assert_close(a**2 * early.sigma**2 + v, late.sigma**2)
    assert early.transition(early)[1] == 0


def test_the_clock_runs_at_its_stated_rate(any_sde: SDE) -> None:
    t = times(any_sde)
    rate = torch.func.jvp(
        lambda s: (any_sde.sigma(s) / any_sde.alpha(s)).log(), (t,), (torch.ones_like(t),)
    )[1]
    assert_close(any_sde.level(t).clock_rate, rate)


def test_prior_log_prob_equals_that_of_torch(any_sde: SDE) -> None:
    x = any_sde.prior_sample(
        (5, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    prior = torch.distributions.Normal(
        0.0, float(any_sde.sigma(torch.tensor(any_sde.t_max).double()))
    )

    assert_close(any_sde.prior_log_prob(x), prior.log_prob(x).sum((1, 2)))


def test_prior_samples_have_the_standard_deviation_at_t_max(any_sde: SDE) -> None:
    x = any_sde.prior_sample((40_000, 1), generator=torch.Generator().manual_seed(0))
    relative = float(x.std()) / float(any_sde.sigma(torch.tensor(any_sde.t_max)))

    assert abs(relative - 1) < 5 / math.sqrt(2 * x.numel())


def test_marginal_sde_derives_the_drift_and_diffusion_of_the_process_it_is_given(sde: SDE) -> None:
    derived, t = MarginalSDE(sde.alpha, sde.sigma, t_min=sde.t_min, t_max=sde.t_max), times(sde)

    assert_close(derived.drift_rate(t), sde.drift_rate(t))
    assert_close(derived.diffusion(t), sde.diffusion(t))


@pytest.mark.parametrize("shape", [(), (4,)])
def test_marginal_sde_keeps_float32(shape: tuple[int, ...]) -> None:
    t = torch.full(shape, 0.3)
    sde = MarginalSDE(VPSDE().alpha, VPSDE().sigma)

    assert sde.drift_rate(t).dtype == sde.diffusion(t).dtype == torch.float32


@pytest.mark.parametrize("levels", [3, 10, 1000])
def test_ddpm_levels_are_reproduced_exactly(levels: int) -> None:
    betas = torch.linspace(1e-4, 0.02, levels, dtype=torch.float64)
    sde = DiscreteSDE.from_betas(betas)
    alpha_bar = torch.cumprod(1 - betas, 0)

    t = sde.times_of(torch.arange(1, levels + 1))

    assert_close(sde.alpha(t), alpha_bar.sqrt(), rtol=1e-12, atol=0)
    assert_close(sde.sigma(t), (1 - alpha_bar).sqrt(), rtol=1e-10, atol=0)  # 1 - alpha_bar cancels
    assert (sde.t_min, sde.t_max, sde.num_levels) == (1 / levels, 1.0, levels)


def test_ncsn_levels_are_reproduced_exactly_in_either_order() -> None:
    sigmas = torch.tensor([30.0, 7.0, 5.0, 0.3, 0.01], dtype=torch.float64)
    for given in (sigmas, sigmas.flip(0)):
        sde = DiscreteSDE.from_sigmas(given)
        t = sde.times_of(torch.arange(1, 6))
        assert_close(sde.sigma(t), sigmas.flip(0), rtol=1e-12, atol=0)
        assert_close(sde.alpha(t), torch.ones_like(t))


def test_discrete_process_is_monotone_between_uneven_levels() -> None:
    sde = DiscreteSDE.from_sigmas(torch.tensor([0.01, 0.011, 5.0, 5.1, 50.0]))
    t = torch.linspace(sde.t_min, 1, 2001, dtype=torch.float64)

    assert bool((sde.log_snr(t).diff() < 0).all())
    assert_close(sde.time_at(sde.log_snr(t)), t, rtol=1e-8, atol=0)


def test_linear_ddpm_approaches_vp_as_one_thousandth_steps() -> None:
    # beta_i = beta(i / T) / T is VP with betas 0.1 to 20: equal to first order in 1 / T
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)

    assert_close(DiscreteSDE.linear_betas().alpha(t), VPSDE().alpha(t), rtol=0.07, atol=2e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: VPSDE(beta_min=20.0, beta_max=0.1),
            "0 < beta_min < beta_max.*beta_min=20, beta_max=0.1",
        ),
        (lambda: SubVPSDE(beta_min=0.0), "SubVPSDE needs 0 < beta_min < beta_max"),
        (
            lambda: VPSDE(beta_min="0.1"),
            "VPSDE needs beta_min to be a finite number; got beta_min='0.1'",
        ),
        (lambda: VPSDE(beta_max=math.nan), "beta_max to be a finite number"),
        (
            lambda: VESDE(sigma_min=0.0),
            "VESDE needs sigma_min to be a finite number > 0; got sigma_min=0",
        ),
        (lambda: VESDE(sigma_min=60.0), "VESDE needs sigma_min < sigma_max, since noise grows"),
        (lambda: EDMSDE(sigma_min=-1.0), "EDMSDE needs sigma_min to be a finite number > 0"),
        (
            lambda: VPSDE(t_min=1.0),
            "VPSDE needs t_min < t_max, since time runs from data to noise",
        ),
        (lambda: VPSDE(t_min=0.0), "VPSDE needs t_min to be a finite number > 0; got t_min=0"),
        (lambda: CosineSDE(t_max=1.0), "CosineSDE needs t_max to be a finite number < 1"),
        (lambda: CosineSDE(offset=0.0), "CosineSDE needs offset to be a finite number > 0"),
        (
            lambda: MarginalSDE(VPSDE().sigma, VPSDE().alpha),
            "needs a log SNR that falls from t_min to t_max",
        ),
        (
            lambda: DiscreteSDE.from_betas(torch.tensor([0.1, 1.2, 0.1])),
            "each in .0, 1.; got .*largest 1.2",
        ),
        (lambda: DiscreteSDE.from_betas(torch.tensor([0.1, 0.2])), "at least three betas"),
        (
            lambda: DiscreteSDE.from_sigmas(torch.tensor([1.0, 1.0, 2.0])),
            "at least three different sigmas",
        ),
        (
            lambda: DiscreteSDE.linear_betas(num_levels=1.5),
            "num_levels to be a whole number >= 3; got",
        ),
        (
            lambda: DiscreteSDE.geometric_sigmas(sigma_max=0.001),
            "sigma_max to be a finite number > 0.01",
        ),
    ],
)
def test_impossible_processes_are_refused_with_the_reason(
    build: Callable[[], SDE], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_counts_may_be_written_as_people_write_them() -> None:
    assert DiscreteSDE.linear_betas(num_levels=1e3).num_levels == 1000


def test_expand_like_lines_scalars_up_with_the_batch() -> None:
    x = torch.ones(3, 2, 4)

    assert (expand_like(torch.arange(3.0), x) * x)[:, 1, 1].tolist() == [0, 1, 2]
    assert expand_like(torch.tensor(2.0), x).shape == (1, 1, 1)


def test_sde_lib_imports_with_torch_and_numpy_alone() -> None:
    program = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"hydra", "omegaconf", "torchdiffeq", "torchsde", "matplotlib",
                                  "wandb", "sklearn", "PIL", "tqdm", "scipy"}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import sde_lib, sde_lib.samplers, sde_lib.oracles, sde_lib.checks, sde_lib.grids
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
