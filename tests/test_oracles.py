"""The oracles are right: densities, scores, samples and flows against something independent."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import SDE, VPSDE, PerSample
from sde_lib.oracles import Gaussian, GaussianMixture, Oracle
from sde_lib.samplers import AdaptiveODE

COVARIANCE = torch.tensor(
    [[2.0, 0.6, 0.1], [0.6, 1.0, -0.3], [0.1, -0.3, 0.5]], dtype=torch.float64
)


def build_oracles() -> dict[str, Oracle]:
    """One oracle of each kind, with samples of 0 to 3 axes."""
    images = torch.linspace(-1, 1, 3 * 8).reshape(3, 2, 2, 2)
    return {
        "scalar": Gaussian(0.5, 2.0),
        "diagonal": Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0])),
        "full": Gaussian(torch.tensor([0.5, -1.0, 2.0]), covariance=COVARIANCE),
        "image": Gaussian(torch.full((1, 2, 2), 0.3), 0.5),
        "mixture": GaussianMixture(
            torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([0.5, 0.7])
        ),
        "axes": GaussianMixture(
            torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.5, 1.0], [0.2, 0.7]])
        ),
        "images": GaussianMixture(
            images, torch.tensor([0.2, 0.4, 0.3]), torch.tensor([1.0, 2.0, 3.0])
        ),
    }


ORACLES = build_oracles()


@pytest.fixture(params=ORACLES.values(), ids=ORACLES.keys())
def oracle(request: pytest.FixtureRequest) -> Oracle:
    """Each oracle."""
    return request.param


def test_score_is_the_gradient_of_the_log_density(oracle: Oracle, any_sde: SDE) -> None:
    t = torch.linspace(0.02, 0.9, 5, dtype=torch.float64) * any_sde.t_max
    x = torch.randn(
        5, *oracle.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    x.requires_grad_()

    (gradient,) = torch.autograd.grad(oracle.log_prob(x, any_sde, t).sum(), x)

    assert_close(oracle.score(any_sde)(x, t), gradient)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_density_of_two_dimensions_integrates_to_one(
    mixture: GaussianMixture, sde: SDE, fraction: float
) -> None:
    t = max(fraction * sde.t_max, sde.t_min)
    scale = torch.tensor(t, dtype=torch.float64)
    half = float(4 * sde.alpha(scale) + 8 * (sde.alpha(scale) ** 2 + sde.sigma(scale) ** 2).sqrt())
    axis = torch.linspace(-half, half, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)

    mass = mixture.log_prob(grid, sde, t).exp().sum() * (axis[1] - axis[0]) ** 2

    assert float(mass) == pytest.approx(1, abs=1e-6)


def test_density_of_the_data_is_that_at_noise_zero(mixture: GaussianMixture) -> None:
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)),
        torch.distributions.Independent(
            torch.distributions.Normal(
                torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64),
                torch.tensor([[0.5], [0.7]]).double(),
            ),
            1,
        ),
    )

    assert_close(mixture.log_prob(x), parts.log_prob(x))


def test_full_covariance_density_equals_that_of_torch(any_sde: SDE) -> None:
    data, t = ORACLES["full"], torch.tensor(0.3 * any_sde.t_max, dtype=torch.float64)
    alpha, sigma = any_sde.alpha(t), any_sde.sigma(t)
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    noised = torch.distributions.MultivariateNormal(
        alpha * mean, alpha**2 * COVARIANCE + sigma**2 * torch.eye(3, dtype=torch.float64)
    )
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    assert_close(data.log_prob(x, any_sde, t), noised.log_prob(x))


def test_one_component_is_a_gaussian(sde: SDE) -> None:
    single = GaussianMixture(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3, 2.0]]))
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.2, dtype=torch.float64)

    assert_close(single.score(sde)(x, t), ORACLES["diagonal"].score(sde)(x, t))
    assert_close(single.log_prob(x, sde, t), ORACLES["diagonal"].log_prob(x, sde, t))


def test_samples_of_a_mixture_have_its_mean_and_variance(
    mixture: GaussianMixture,
    assert_moments: Callable[..., None],
    seeded: Callable[[int], torch.Generator],
) -> None:
    x = mixture.sample(20_000, generator=seeded(0))

    assert_moments(x, mixture.mean(), mixture.variance())
    assert mixture.mean().tolist() == pytest.approx([0.3 * -2 + 0.7 * 2, 0.7])
    second = 0.3 * (0.25 + 4) + 0.7 * (0.49 + 4)
    assert float(mixture.variance()[0]) == pytest.approx(second - 0.8**2)


def test_noised_samples_have_the_moments_of_the_marginal(
    mixture: GaussianMixture,
    sde: SDE,
    assert_moments: Callable[..., None],
    seeded: Callable[[int], torch.Generator],
) -> None:
    t = torch.tensor(0.3 * sde.t_max, dtype=torch.float64)

    x = mixture.sample(20_000, generator=seeded(0), sde=sde, t=t)

    alpha, sigma = sde.alpha(t), sde.sigma(t)
    assert_moments(x, alpha * mixture.mean(), alpha**2 * mixture.variance() + sigma**2)


def test_samples_of_a_full_covariance_have_it(seeded: Callable[[int], torch.Generator]) -> None:
    n = 40_000
    x = ORACLES["full"].sample(n, generator=seeded(0)).double()

    error = torch.cov(x.T) - COVARIANCE
    spread = (COVARIANCE**2 + COVARIANCE.diag()[:, None] * COVARIANCE.diag()).sqrt() / math.sqrt(n)
    assert bool((error.abs() < 5 * spread).all())


def test_samples_have_the_shape_of_the_data(oracle: Oracle) -> None:
    x = oracle.sample(5, generator=PerSample(range(5)))

    assert x.shape == (5, *oracle.shape)
    assert oracle.log_prob(x).shape == (5,)
    assert torch.equal(oracle.sample(1, generator=PerSample([3]))[0], x[3])


@pytest.mark.parametrize("name", ["full", "image"])
def test_push_is_the_probability_flow(sde: SDE, name: str) -> None:
    data = ORACLES[name]
    z = torch.randn(
        4, *data.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    solver = AdaptiveODE(rtol=1e-8, atol=1e-8, denoise=False)

    end = solver(data.score(sde), sde, data.push(sde, z, sde.t_max))

    assert_close(end, data.push(sde, z, sde.t_min), rtol=1e-6, atol=1e-6)


def test_each_sample_may_have_its_own_time(mixture: GaussianMixture) -> None:
    sde, x = VPSDE(), torch.linspace(-1, 1, 6).reshape(3, 2)
    t = torch.tensor([0.1, 0.5, 0.9])

    rows = [mixture.score(sde)(x[i : i + 1], t[i]) for i in range(3)]

    assert_close(mixture.score(sde)(x, t), torch.cat(rows))


def points(*shape: int) -> Tensor:
    """Some batch of that shape."""
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian(0.0), "either std or covariance, and not both"),
        (
            lambda: Gaussian(0.0, 1.0, covariance=COVARIANCE),
            "either std or covariance, and not both",
        ),
        (lambda: Gaussian(torch.zeros(3), covariance=-COVARIANCE), "needs variances >= 0; got -2"),
        (
            lambda: Gaussian(torch.zeros(2), covariance=COVARIANCE),
            r"\[D, D\] covariance .* D = 2; got shape \(3, 3\)",
        ),
        (
            lambda: GaussianMixture(points(2, 3), 1.0, torch.ones(3)),
            "one positive weight for each of 2 means",
        ),
        (
            lambda: GaussianMixture(points(2, 3), 1.0, torch.tensor([1.0, 0.0])),
            "one positive weight",
        ),
        (lambda: GaussianMixture(points(2, 3), -1.0), "needs stds >= 0; got -1"),
        (
            lambda: Gaussian(0.0, 1.0).log_prob(points(4, 2)),
            r"samples have shape \(\); got a batch of shape \(4, 2\)",
        ),
        (
            lambda: Gaussian(0.0, 1.0).log_prob(points(4), VPSDE()),
            "needs both sde and t; got only one",
        ),
    ],
)
def test_meaningless_oracles_are_refused_with_the_reason(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()
