"""Parameterizations: four scalars that make a denoised estimate of a network's output."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from score_models import EDM, Data, Noise, Score, ScoreModel, Velocity
from sde_lib import EDMSDE, VESDE, VPSDE, CosineSDE, DiscreteSDE, SubVPSDE
from sde_lib.oracles import Gaussian
from sde_lib.sde import expand_like

KINDS = [Noise, Data, Score, Velocity, EDM]
PROCESSES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE(), CosineSDE(), DiscreteSDE.linear_betas()]


class Truth(nn.Module):
    """A network that outputs just what its parameterization asks for, given x_0 and noise."""

    def __init__(self, target) -> None:
        super().__init__()
        self.target = target

    def forward(self, x, noise_level, cond=None):
        return self.target(expand_like(noise_level.exp(), x))


def targets(kind, x0, eps):
    """Each parameterization's target, written out from its definition."""
    if kind is Noise:
        return lambda rho: eps
    if kind is Data:
        return lambda rho: x0
    if (
        kind is Score
        # of z = (x0 + rho eps) / sqrt(1 + rho²) given x0: deviation over variance rho² / (1 +
        # rho²)
    ):
        return lambda rho: -eps * (1 + rho**2).sqrt() / rho
    if kind is Velocity:
        return lambda rho: (eps - rho * x0) / (1 + rho**2).sqrt()
    s = 0.7  # EDM: (x0 - c_skip y) / c_out
    return lambda rho: (
        (x0 - s**2 / (rho**2 + s**2) * (x0 + rho * eps)) * (rho**2 + s**2).sqrt() / (rho * s)
    )


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_gives_back_data_noise_and_score_exactly(kind, sde):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 9, 3, 4, dtype=torch.float64, generator=generator)
    t = torch.linspace(sde.t_min * 1.5, sde.t_max, 9, dtype=torch.float64)
    alpha, sigma = expand_like(sde.alpha(t), x0), expand_like(sde.sigma(t), x0)
    model = ScoreModel(Truth(targets(kind, x0, eps)), sde, kind(data_std=0.7))
    x = alpha * x0 + sigma * eps

    assert_close(model.denoised(x, t), x0, rtol=1e-6, atol=1e-6)
    assert_close(model.noise(x, t) * sigma, eps * sigma, rtol=1e-6, atol=1e-9)
    assert_close(model.score(x, t) * sigma**2, -eps * sigma, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sees_inputs_of_unit_variance(kind):
    seen = []

    class Spy(nn.Module):
        def forward(self, x, noise_level, cond=None):
            seen.append(x)
            return x

    sde, n = VPSDE(), 20_000
    model = ScoreModel(Spy(), sde, kind(data_std=0.3))
    for t in (1e-4, 0.1, 0.9):
        x = Gaussian(torch.zeros(2), 0.3).sample(
            n, generator=torch.Generator().manual_seed(1), sde=sde, t=t
        )
        model.denoised(x, torch.tensor(t))

    for x in seen:
        assert (
            abs(x.var() - 1) < 5 * (2 / (2 * n)) ** 0.5
        )  # variance of a sample variance, 2 n numbers


@pytest.mark.parametrize("kind", KINDS)
def test_edm_targets_have_unit_variance_and_the_others_do_not_need_to(kind):
    s, n = 0.7, 50_000
    generator = torch.Generator().manual_seed(2)
    x0 = s * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    eps = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    variances = [
        float(targets(kind, x0, eps)(torch.tensor(rho)).var()) for rho in (0.01, 0.7, 30.0)
    ]
    expected = {EDM: [1, 1, 1], Noise: [1, 1, 1], Data: [s**2] * 3}.get(kind)
    if expected:
        assert variances == pytest.approx(expected, rel=5 * (2 / n) ** 0.5)
    else:
        assert all(v > 0 for v in variances)


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_the_process_leaves_the_denoised_output_unchanged(kind):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, noise_level, cond=None):
            return self.layer(torch.cat([x, noise_level[:, None]], 1))

    network = Net().double()
    y = torch.randn(5, 3, dtype=torch.float64)
    log_snr = torch.linspace(-4, 6, 5, dtype=torch.float64)
    outputs = []
    for sde in PROCESSES:
        t = sde.time_at(log_snr)
        outputs.append(
            ScoreModel(network, sde, kind(0.5))
            .denoised(expand_like(sde.alpha(t), y) * y, t)
            .detach()
        )

    for other in outputs[1:]:
        assert_close(other, outputs[0], rtol=1e-9, atol=1e-9)


def test_noise_does_not_cancel_in_float32_at_the_smallest_time():
    sde, kind = VPSDE(), EDM(data_std=0.5)
    x0, eps = torch.full((1, 4), 0.8), torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    t = torch.tensor([sde.t_min], dtype=torch.float64)
    alpha, sigma = sde.alpha(t).float(), sde.sigma(t).float()

    class Constant(nn.Module):
        def forward(self, x, noise_level, cond=None):
            rho, s = sde.level(t).noise_ratio, 0.5
            y = (alpha * x0 + sigma * eps).double() / sde.alpha(t)
            return ((x0 - s**2 / (rho**2 + s**2) * y) * (rho**2 + s**2).sqrt() / (rho * s)).float()

    noise = ScoreModel(Constant(), sde, kind).noise(alpha * x0 + sigma * eps, t)

    # x itself holds eps to 6e-8 * 0.8 / sigma = 5e-5 and no better; the difference of two
    # estimates would double that
    assert_close(noise, eps, rtol=0, atol=3e-4)


def test_a_network_of_the_wrong_shape_is_named():
    class Wrong(nn.Module):
        def forward(self, x, noise_level, cond=None):
            return x[:, :1]

    with pytest.raises(ValueError, match="Wrong must return the shape of its input; got"):
        ScoreModel(Wrong(), VPSDE(), EDM()).score(torch.zeros(2, 3), torch.tensor(0.5))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "a"])
def test_data_std_must_be_positive(value):
    with pytest.raises(ValueError, match="data_std"):
        EDM(data_std=value)
