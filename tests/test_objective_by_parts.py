"""Explicit and sliced score matching against denoising, brute force and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from score_models import (
    EDM,
    DenoisingScoreMatching,
    ExplicitScoreMatching,
    Noise,
    OneLevel,
    ScoreModel,
    SlicedScoreMatching,
    maximum_likelihood,
    noise_regression,
)
from score_models.networks import MLP, UNet
from score_models.objectives.weighted import noised
from sde_lib import VPSDE
from sde_lib.sde import expand_like

STD = 0.6
ALL = [DenoisingScoreMatching, ExplicitScoreMatching, SlicedScoreMatching]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saying_something(network: nn.Module) -> nn.Module:
    """With weights that are not those of the start, in float64."""
    for weight in network.parameters():
        scale = max(weight[0].numel(), 4) ** -0.5
        weight.data = scale * torch.randn(weight.shape, generator=seeded(weight.numel()))
    return network.double().eval()


@pytest.fixture
def model() -> ScoreModel:
    return ScoreModel(saying_something(MLP((3,), width=8, blocks=1)), VPSDE(), EDM(STD))


@pytest.mark.parametrize("weight", [noise_regression, maximum_likelihood])
@pytest.mark.parametrize("by_parts", [ExplicitScoreMatching, SlicedScoreMatching])
def test_values_and_gradients_are_those_of_denoising_in_expectation(by_parts, weight, sde, model):
    """The same draws under both: what they differ by has mean zero, value and gradient alike."""
    model.sde, times = sde, OneLevel(noise_ratio=0.7)
    names = ("enter.weight", "leave.2.weight")
    weights = [dict(model.network.named_parameters())[name] for name in names]
    differences = []
    for key in range(40):
        x0 = (STD * torch.randn(50, 3, generator=seeded(key))).double()
        pair = (objective(weight, times) for objective in (by_parts, DenoisingScoreMatching))
        loss, other = (one(model, x0, seeded(1000 + key)).mean() for one in pair)
        slopes = torch.autograd.grad(loss - other, weights)
        differences.append(torch.cat([(loss - other)[None], *(s.flatten() for s in slopes)]))
    found = torch.stack(differences).detach()
    error = found.std(0) / math.sqrt(len(found))
    # Student's t with 39 degrees of freedom: 6.5 is passed once in 1e7
    assert bool((found.mean(0).abs() < 6.5 * error + 1e-12).all())
    assert float(error[0]) > 0


@pytest.mark.parametrize("objective", ALL)
def test_each_is_least_at_the_exact_score_of_a_gaussian(objective):
    r"""eps_hat = a z has a quadratic loss: its least a is E[z eps] = rho / sqrt(rho² + s²)."""
    sde, n, dims = VPSDE(), 20_000, 4

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x, noise_level, cond=None):
            return self.a * x

    x0 = STD * torch.randn(n, dims, generator=seeded(0), dtype=torch.float64)
    made, model, slopes = objective(times=OneLevel(noise_ratio=0.5)), None, []
    for a in (0.0, 1.0):
        model = ScoreModel(Linear(), sde, Noise(STD))
        model.network.a.data.fill_(a)
        made(model, x0, seeded(1)).mean().backward()
        slopes.append(float(model.network.a.grad))
    least = slopes[0] / (slopes[0] - slopes[1])
    # a = E[z eps] / E[z²], either mean over n · dims numbers of variance 2 at most, E[z²] = 1
    bound = 5 * 2 * math.sqrt(2 / (n * dims))
    assert least == pytest.approx(0.5 / math.hypot(0.5, STD), abs=bound)


def test_the_explicit_trace_is_that_of_the_jacobian(model):
    x0 = torch.randn(5, 3, generator=seeded(0), dtype=torch.float64)
    objective = ExplicitScoreMatching()
    draws = objective.draw(model.sde, x0.shape, seeded(1))
    level = model.sde.level(draws["t"])
    x = noised(level, x0, draws["noise"].double())
    wanted = []
    for i in range(5):
        t = draws["t"][i : i + 1]
        jacobian = torch.func.jacrev(lambda y, t=t: model.score(y[None], t)[0])(x[i])
        score = model.score(x[i : i + 1], t)
        published = jacobian.trace() + 0.5 * score.square().sum()
        wanted.append(2 * level.sigma[i] ** 2 * published / 3 + 1)
    assert_close(objective.loss(model, x0, draws), torch.stack(wanted), rtol=1e-6, atol=1e-9)


def test_sliced_is_unbiased_for_explicit_and_probes_divide_its_variance(model):
    x0 = torch.randn(1, 3, generator=seeded(0), dtype=torch.float64)
    explicit = ExplicitScoreMatching(times=OneLevel(noise_ratio=0.7))
    draws = explicit.draw(model.sde, x0.shape, seeded(1))
    exact = float(explicit.loss(model, x0, draws).detach())
    n, spread, noise = 4000, {}, 0.0
    many = {name: d.expand(n, *d.shape[1:]) for name, d in draws.items()}
    for probes in (1, 4):
        sliced = SlicedScoreMatching(times=explicit.times, probes=probes)
        signs = sliced.draw(model.sde, (n, 3), seeded(2))["probes"]
        assert signs.shape == (n, probes, 3) and bool((signs.abs() == 1).all())
        found = sliced.loss(model, x0.expand(n, 3), many | {"probes": signs}).detach()
        assert abs(float(found.mean()) - exact) < 5 * float(found.std()) / math.sqrt(n)
        spread[probes] = float(found.var())
        kurtosis = float(((found - found.mean()) / found.std()).pow(4).mean())
        noise += (kurtosis - 1) / n  # squared relative error of a variance
    assert spread[1] / spread[4] == pytest.approx(4.0, rel=5 * math.sqrt(noise))


class Attending(nn.Module):
    """A network whose attention is torch's fused one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(1, 24)
        self.leave = nn.Linear(8, 1)

    def forward(self, x, noise_level, cond=None):
        q, k, v = self.qkv(x[:, None, :, None]).chunk(3, -1)
        return self.leave(F.scaled_dot_product_attention(q, k, v))[:, 0, :, 0]


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (MLP((3,), width=8, blocks=1), (3,)),
        (UNet((1, 8, 8), width=8, multipliers=(1, 2), blocks=1, heads=2), (1, 8, 8)),
        (Attending(), (6,)),
    ],
    ids=["mlp", "unet", "fused attention"],
)
def test_the_gradient_of_sliced_score_matching_is_its_slope(network, shape):
    """Second derivatives, against the difference of two losses along a random direction."""
    model = ScoreModel(saying_something(network), VPSDE(), EDM(STD))
    objective, weights = SlicedScoreMatching(), list(network.parameters())
    x0 = torch.randn(3, *shape, generator=seeded(0), dtype=torch.float64)
    draws = objective.draw(model.sde, x0.shape, seeded(1))
    slopes = torch.autograd.grad(
        objective.loss(model, x0, draws).mean(), weights, materialize_grads=True, allow_unused=True
    )
    ways = [torch.randn(w.shape, generator=seeded(2), dtype=w.dtype) for w in weights]
    losses = []
    for step in (1e-5, -2e-5):
        for weight, way in zip(weights, ways, strict=True):
            weight.data += step * way
        losses.append(float(objective.loss(model, x0, draws).mean().detach()))
    slope = sum(float((s * way).sum()) for s, way in zip(slopes, ways, strict=True))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


def test_explicit_score_matching_costs_one_pass_and_refuses_many_dimensions(model):
    passes = []
    model.network.register_forward_hook(lambda *_: passes.append(1))
    x0 = torch.zeros(4, 3, dtype=torch.float64)
    with torch.no_grad():  # where a validation loss is computed
        ExplicitScoreMatching()(model, x0, seeded(0))
        SlicedScoreMatching(probes=3)(model, x0, seeded(0))
    assert len(passes) == 2
    with pytest.raises(ValueError, match="at most max_dims=64; got D=65. Use SlicedScoreMatching"):
        ExplicitScoreMatching().draw(VPSDE(), (2, 5, 13), seeded(0))
    with pytest.raises(ValueError, match="probes"):
        SlicedScoreMatching(probes=0)
    with pytest.raises(ValueError, match="max_dims"):
        ExplicitScoreMatching(max_dims=1.5)


def test_where_the_network_does_not_look_at_its_input_the_trace_is_zero():
    class Constant(nn.Module):
        def forward(self, x, noise_level, cond=None):
            return torch.ones_like(x)

    model = ScoreModel(Constant(), VPSDE(), Noise(STD))
    loss = SlicedScoreMatching()(model, torch.zeros(4, 3), seeded(0))
    assert_close(loss, torch.full((4,), 2.0))  # the squared noise estimate, and the constant
    assert expand_like(loss, torch.zeros(4, 3)).shape == (4, 1)
