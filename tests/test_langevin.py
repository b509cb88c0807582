"""Langevin dynamics: correctors, from level to level, and at one level."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from sde_lib import SDE, VESDE, DiscreteSDE
from sde_lib.grids import Subsequence
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.samplers import (
    DDIM,
    DEIS,
    Ancestral,
    AnnealedLangevin,
    DPMSolverPP,
    EulerMaruyama,
    FixedStepSampler,
    Heun,
    Langevin,
    LangevinCorrector,
    NoPredictor,
    PredictorCorrector,
    ReverseDiffusion,
)

SeededGenerator = Callable[[int], torch.Generator]


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_annealed_langevin_finds_both_modes_of_a_mixture(
    mixture: GaussianMixture, seeded: SeededGenerator, assert_moments: Callable[..., None]
) -> None:
    sde, generator = VESDE(), seeded(0)
    x = sde.prior_sample((4000, 2), generator=generator)

    x0 = AnnealedLangevin(100, inner_steps=20, step_size=0.1)(
        mixture.score(sde), sde, x, generator=generator
    )

    assert_moments(
        x0, mixture.mean(), mixture.variance(), bias=0.08
    )  # 1 / (20 * 0.1 * 12), and half a step


def test_a_langevin_step_has_the_stated_size(sde: SDE) -> None:
    level = sde.level(torch.tensor(0.4, dtype=torch.float64))
    zeros, ones = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    corrector, size = LangevinCorrector(snr=0.1), 2 * (0.1 * level.sigma) ** 2

    pulled = corrector.step(lambda x, t: ones, zeros, level, level, lambda: zeros)
    shaken = corrector.step(lambda x, t: zeros, zeros, level, level, lambda: ones)

    assert_close(pulled, size * ones)
    assert_close(shaken, torch.sqrt(2 * size) * ones)


def test_a_step_by_norms_has_their_ratio_of_each_sample_or_of_the_batch(sde: SDE) -> None:
    level = sde.level(torch.tensor(0.4, dtype=torch.float64))
    x = torch.zeros(2, 3, 4, dtype=torch.float64)
    pull, fresh = (torch.randn(x.shape, generator=seed(k), dtype=x.dtype) for k in (0, 1))
    pull = pull * torch.tensor([1.0, 4.0])[:, None, None] / level.sigma
    norms = [((0.1 * z.norm() / s.norm()) ** 2).item() for s, z in zip(pull, fresh, strict=True)]
    means = 0.1 * sum(z.norm() for z in fresh) / sum(s.norm() for s in pull)

    for size, wanted in (("sample", norms), ("batch", [means.item() ** 2] * 2)):
        corrector = LangevinCorrector(snr=0.1, scale=size)
        moved = corrector.step(lambda x, t: pull, x, level, level, lambda: fresh)
        for i, epsilon in enumerate(2 * torch.tensor(wanted, dtype=x.dtype)):
            assert_close(moved[i], epsilon * pull[i] + torch.sqrt(2 * epsilon) * fresh[i])


@pytest.mark.parametrize("size", ["sigma", "sample", "batch"])
def test_a_score_of_zero_makes_no_step_longer_than_the_level_is_wide(size: str, sde: SDE) -> None:
    level = sde.level(torch.tensor(0.4, dtype=torch.float64))
    zeros, ones = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)

    corrector = LangevinCorrector(scale=size)
    moved = corrector.step(lambda x, t: zeros, zeros, level, level, lambda: ones)

    assert float(moved.max()) <= 1.4 * float(level.sigma) + 1e-12


PREDICTORS = [
    NoPredictor(),
    EulerMaruyama(),
    EulerMaruyama(eta=0.0),
    ReverseDiffusion(),
    Ancestral(),
    Ancestral(eta=3.0),
    Ancestral(variance="forward"),
    DDIM(),
    Heun(),
    Heun(churn=5.0),
    DEIS(),
    DPMSolverPP(eta=1.0),
]


@pytest.mark.parametrize("scale", ["sigma", "sample", "batch"])
@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: f"{type(p).__name__}")
def test_predictor_and_corrector_stay_finite_at_any_number_of_steps(
    predictor: FixedStepSampler, scale: str, any_sde: SDE, mixture: GaussianMixture
) -> None:
    x = any_sde.prior_sample((8, 2), generator=seed(0))
    for steps in (1, 2, 3, 10):
        sampler = PredictorCorrector(
            steps, predictor=predictor, corrector=LangevinCorrector(0.5, scale), corrections=2
        )
        end = sampler(mixture.score(any_sde), any_sde, x, generator=seed(1))
        assert bool(torch.isfinite(end).all())


def test_annealed_langevin_is_that_of_ncsn_at_its_levels(mixture: GaussianMixture) -> None:
    """y_i <- y_i + a_i / 2 s + sqrt(a_i) z, a_i = e sigma_i² / sigma_L², written out."""
    sigmas, epsilon = torch.tensor([10.0, 3.0, 1.0, 0.3], dtype=torch.float64), 0.02
    sde = DiscreteSDE.from_sigmas(sigmas.flip(0))
    score, x = mixture.score(sde), sde.prior_sample((16, 2), generator=seed(0)).double()
    step_size = float(epsilon / (2 * sigmas[-1] ** 2))

    found = AnnealedLangevin(3, Subsequence(), False, inner_steps=5, step_size=step_size)(
        score, sde, x, generator=seed(9)
    )

    noise = seed(9)
    for i, sigma in enumerate(sigmas):
        a = epsilon * sigma**2 / sigmas[-1] ** 2
        t = torch.tensor((4 - i) / 4, dtype=torch.float64)
        for _ in range(5):
            z = torch.randn(x.shape, generator=noise, dtype=x.dtype)
            x = x + a / 2 * score(x, t) + a.sqrt() * z
    assert_close(found, x)


def test_plain_langevin_keeps_to_the_density_of_its_level(sde: SDE) -> None:
    """The stationary variance of a step a on N(0, v) is v / (1 - a / 2v)."""
    time = float(sde.time_at(torch.tensor(0.0, dtype=torch.float64)))  # sigma = alpha
    level = sde.level(torch.tensor(time, dtype=torch.float64))
    x = sde.prior_sample((40_000, 1), generator=seed(0), dtype=torch.float64)

    found = Langevin(60, t=time, step_size=0.2, denoise=False)(
        Gaussian(torch.full((1,), 0.5), 0.8).score(sde), sde, x, generator=seed(1)
    )

    v, a = float(0.64 * level.alpha**2 + level.sigma**2), 0.2 * float(level.sigma) ** 2
    wanted = v / (1 - a / (2 * v))
    kept = (1 - a / v) ** 60  # of the start, whose mean is 0 and whose variance is below twice v
    alpha, n = float(level.alpha), len(found)
    assert float(found.mean()) == pytest.approx(
        0.5 * alpha, abs=0.5 * alpha * kept + 5 * math.sqrt(wanted / n)
    )
    assert float(found.var()) == pytest.approx(wanted, rel=2 * kept**2 + 5 * math.sqrt(2 / n))
