"""Second heads: what they learn against closed forms, what they cost, and where they are kept."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import ANALYTIC, SDE, Watched, picture_model, random_model, time, vector_model
from torch import nn
from torch.testing import assert_close

from experiment.variance_heads import (
    HeadSettings,
    new_head,
    variance_of_head,
)
from likelihood import calibrate_variance, discrete_bounds
from score_models import Classes, Noise, ScoreModel, conditioned, faster
from score_models.networks import MLP
from score_models.variance_head import HeadOutput, VarianceHead, head_of
from score_models.variance_kinds import KINDS, head_loss
from sde_lib import Counted, probability_flow
from sde_lib.oracles import GaussianMixture
from sde_lib.reverse_variance import VARIANCES
from sde_lib.samplers import DDIM


@pytest.fixture
def vectors() -> ScoreModel:
    return vector_model()


@pytest.fixture
def pictures() -> ScoreModel:
    return picture_model()


@pytest.mark.parametrize("make", ["vectors", "pictures"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_new_head_starts_at_the_analytic_variance_or_between_the_two_of_ddpm(
    make, kind, request
):
    model = request.getfixturevalue(make)
    shape = (2,) if make == "vectors" else (1, 8, 8)
    settings = HeadSettings(kind, width=8, blocks=1)
    variance = variance_of_head(model, new_head(model, shape, settings), settings, ANALYTIC)
    later, earlier = (SDE.level(time(u)[None]) for u in (0.5, -0.5))
    x = torch.randn(4, *shape)
    level = SDE.level(time(0.5))
    eps_hat = model.noise(x, level.t)
    (at,) = variance.at_states(earlier, later)
    wanted = ANALYTIC(earlier, later)[0]
    if kind == "learned":
        wanted = VARIANCES["posterior"](earlier, later) * VARIANCES["forward"](earlier, later)
        wanted = wanted.sqrt()[0]
    assert_close(at(x, level, eps_hat), wanted.float().expand_as(x), rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", ["vectors", "pictures"])
def test_a_sampler_with_a_head_costs_one_pass_a_step_and_a_sample_is_alone(make, request):
    model = request.getfixturevalue(make)
    model.network = watched = Watched(model.network)
    shape = (2,) if make == "vectors" else (1, 8, 8)
    settings = HeadSettings("npr", width=8, blocks=1)
    head = new_head(model, shape, settings)
    nn.init.normal_(head.leave.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    variance = variance_of_head(model, head, settings, ANALYTIC)
    sampler, score = DDIM(6, variance=variance, data_variance=1.0), Counted(model.score)
    x = torch.randn(4, *shape)
    watched.passes = 0
    sampler(score, SDE, x, generator=torch.Generator().manual_seed(0))
    assert watched.passes == score.nfe == 7
    state, level = torch.randn(4, *shape), SDE.level(time(0.2))
    whole = variance.unresolved(state, level, model.noise(state, level.t))
    alone = variance.unresolved(state[1:2], level, model.noise(state[1:2], level.t))
    assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-6)
    assert float(whole.std()) > 0


def test_a_head_goes_with_a_network_in_half_precision(pictures):
    settings = HeadSettings("npr", width=8, blocks=1)
    head = new_head(pictures, (1, 8, 8), settings)
    nn.init.normal_(head.leave.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    pictures.network = watched = Watched(pictures.network)
    quick = faster(pictures, precision="bfloat16")
    x, level = torch.randn(4, 1, 8, 8), SDE.level(time(0.2))
    found = []
    for model in (pictures, quick):
        variance = variance_of_head(model, head, settings, ANALYTIC)
        watched.passes = 0
        found.append(variance.unresolved(x, level, model.noise(x, level.t)))
        assert watched.passes == 1
    # bfloat16 keeps 8 bits: features miss by some 2^-8, the logarithm of the output by as much
    assert_close(found[1], found[0], rtol=0.05, atol=0)
    assert not torch.equal(found[1], found[0])


def train(kind, model, data, steps, seed=0):
    """A head trained as mode=train_variance does it."""
    torch.manual_seed(seed)
    head = VarianceHead((16,), (2,), width=32)
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for i in range(steps):
        x0 = data.sample(128, generator=generator).float()
        optimizer.zero_grad()
        head_loss(kind, model, head, x0, generator).backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 + math.cos(math.pi * i / steps))
        optimizer.step()
    return head.eval().requires_grad_(False)


def test_trained_heads_find_the_conditional_error_of_an_imperfect_network(mixture, vectors):
    """The network says nothing true: eps_hat is wrong everywhere, and known.

    What is open is then Var[eps | x_t] and the square of what the mean misses, in closed form.
    Starting from the isotropic value, each head has to find most of what varies.
    """
    score, variance = mixture.score(SDE), mixture.noise_variance(SDE)
    train_set = mixture.sample(1000, generator=torch.Generator().manual_seed(7)).float()
    flow = probability_flow(SDE, vectors.score)
    analytic = calibrate_variance(
        flow, train_set, steps=30, generator=torch.Generator().manual_seed(8)
    )
    kind = KINDS["npr"](analytic)
    found = kind.variance(vectors, train(kind, vectors, mixture, 300))
    for u in (-1.0, 0.5, 2.0):
        level = SDE.level(time(u))
        x = mixture.sample(
            2000, sde=SDE, t=level.t, generator=torch.Generator().manual_seed(9)
        ).float()
        eps_hat = vectors.noise(x, level.t)
        miss = level.noise(score(x.double(), level.t)) - eps_hat
        wanted = variance(x.double(), level.t) + miss.square()
        before = (analytic.unresolved_at(torch.tensor([u]).double()) / wanted).log()
        after = (found.unresolved(x, level, eps_hat) / wanted).log()
        assert float(after.square().mean()) < 0.25 * float(before.square().mean())


class ExactNoise(nn.Module):
    """E[eps | x_t] of a mixture, as the first two of some features that say where x_t is."""

    def __init__(self, data: GaussianMixture) -> None:
        super().__init__()
        self.data, self.leave = data, nn.Linear(16, 2, bias=False)
        with torch.no_grad():
            self.leave.weight.copy_(torch.eye(2, 16))

    def forward(self, x, noise_level, cond=None):
        t = SDE.time_at(-2 * noise_level.double())
        level = SDE.level(t).expand_like(x)
        state = x / Noise(0.7).input(level.noise_ratio) * level.alpha
        eps_hat = SDE.level(t).noise(self.data.score(SDE)(state, t)).to(x)
        phases = torch.cat([x, x.flip(1)], 1)[:, :3, None] * torch.tensor([0.5, 1.0])
        waves = torch.cat([phases.sin(), phases.cos()], 1).flatten(1)
        return self.leave(torch.cat([eps_hat, x, waves], dim=1))


@pytest.mark.parametrize(
    ("kind", "iterations", "rivals"),
    [("sn", 200, ("analytic",)), ("learned", 300, ("posterior", "forward"))],
)
def test_with_the_exact_mean_other_heads_gain_over_what_they_start_from(
    kind, iterations, rivals, mixture
):
    model = ScoreModel(ExactNoise(mixture), SDE, Noise(0.7)).eval().requires_grad_(False)
    flow = probability_flow(SDE, model.score)
    generator = torch.Generator().manual_seed(3)
    x, calibration = (mixture.sample(n, generator=generator).float() for n in (600, 1000))
    analytic = calibrate_variance(flow, calibration, steps=50, generator=generator)
    meaning = KINDS[kind](analytic)
    trained = meaning.variance(model, train(meaning, model, mixture, iterations))
    known = {"analytic": analytic, "posterior": "posterior", "forward": "forward"}
    bounds = discrete_bounds(flow, x, known | {kind: trained}, steps=50, generator=generator)
    for rival in rivals:
        gain = bounds[kind].log_prob - bounds[rival].log_prob
        assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(len(x))


@pytest.mark.parametrize("kind", ["npr", "sn"])
def test_the_loss_is_least_at_the_conditional_moment(kind):
    """For noise errors of a known variance; its slope there vanishes within five errors."""
    n = 20000
    generator = torch.Generator().manual_seed(0)
    eps_hat = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    noise = eps_hat + 0.3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    level = SDE.level(time(0.0).expand(n))
    meaning = KINDS[kind](ANALYTIC)
    best = math.log(0.09 / float(ANALYTIC.unresolved_at(torch.zeros(1).double())))
    out = torch.full((n, 1), best, dtype=torch.float64, requires_grad=True)
    meaning.loss(out, noise, eps_hat, level, level).sum().backward()
    assert abs(float(out.grad.mean())) < 5 * float(out.grad.std()) / math.sqrt(n)
    for off in (-0.3, 0.3):
        shifted = (out + off).detach().requires_grad_(True)
        meaning.loss(shifted, noise, eps_hat, level, level).sum().backward()
        error = float(shifted.grad.std()) / math.sqrt(n)
        assert math.copysign(1, off) * float(shifted.grad.mean()) > 2 * error


@pytest.mark.parametrize("kind", ["npr", "sn"])
def test_the_loss_is_twice_the_nats_of_a_normal_density_up_to_a_constant(kind):
    generator = torch.Generator().manual_seed(0)
    noise, eps_hat, out = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    u = torch.linspace(-2, 1, 6, dtype=torch.float64)
    level = SDE.level(SDE.time_at(-2 * u))
    spread = ANALYTIC.unresolved_at(u)[:, None] * out.exp()
    known = {"npr": (eps_hat, spread), "sn": (0 * eps_hat, eps_hat.square() + spread)}
    mean, variance = known[kind]
    nats = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(noise)
    rest = KINDS[kind](ANALYTIC).loss(out, noise, eps_hat, level, level) - 2 * nats
    base = {"npr": ANALYTIC.unresolved_at(u).log()[:, None], "sn": 0.0}[kind]
    assert_close(rest + base, torch.full_like(rest, -math.log(2 * math.pi)))


def test_the_loss_of_the_learned_variance_is_the_kl_of_its_step(mixture):
    later, earlier = (SDE.level(time(u).expand(5)) for u in (0.5, -0.2))
    generator = torch.Generator().manual_seed(0)
    noise, eps_hat, out = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    meaning = KINDS["learned"](ANALYTIC)
    found = meaning.loss(out, noise, eps_hat, earlier, later)

    a, v = earlier.transition(later)
    beta = 1 / (1 / earlier.sigma**2 + a**2 / v)
    forward = v * (earlier.alpha**2 + earlier.sigma**2) / (later.alpha**2 + later.sigma**2)
    w = (out + 1) / 2
    model = torch.exp(w * forward.log()[:, None] + (1 - w) * beta.log()[:, None])
    pull = earlier.alpha * beta / earlier.sigma**2
    apart = (pull * later.noise_ratio)[:, None] * (noise - eps_hat)
    exact = torch.distributions.Normal(torch.zeros_like(apart), beta.sqrt()[:, None])
    other = torch.distributions.Normal(apart, model.sqrt())
    assert_close(found, torch.distributions.kl_divergence(exact, other))


def test_levels_of_training_cover_the_clock_and_neighbours_are_neighbours():
    n = 64
    _, later = KINDS["npr"](ANALYTIC).levels(SDE, n, torch.Generator().manual_seed(0))
    low, high = SDE.log_snr_range()
    cells = ((2 * later.noise_ratio.log() + high) / (high - low) * n).floor().clamp(0, n - 1)
    assert len(cells.unique()) == n
    earlier, later = KINDS["learned"](ANALYTIC, steps=8).levels(
        SDE, n, torch.Generator().manual_seed(0)
    )
    width = later.noise_ratio.log() - earlier.noise_ratio.log()
    assert_close(width, torch.full((n,), (high - low) / 16, dtype=torch.float64))
    assert len(later.t.unique()) == 8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HeadSettings("nrp"), "kind to be one of learned, npr, sn; got kind='nrp'"),
        (lambda: HeadSettings(steps=0), "steps to be a whole number >= 1"),
        (lambda: HeadSettings(lr=0.0), "lr to be a finite number > 0"),
        (lambda: HeadSettings("sn", grid_steps=5), "grid_steps for kind=learned alone"),
        (lambda: HeadSettings("learned", grid_steps=0), "grid_steps to be a whole number >= 1"),
        (lambda: KINDS["learned"](ANALYTIC, steps=0), "steps to be a whole number >= 1"),
        (lambda: VarianceHead((4,), (2,), width=0), "width to be a whole number >= 1"),
    ],
)
def test_impossible_heads_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_head_on_a_conditional_model_goes_with_the_condition_of_the_score():
    watched = Watched(MLP((2,), width=16, blocks=1, cond=Classes(3)))
    model = random_model(watched)
    model.network.cond = Classes(3)
    head = head_of(model, torch.zeros(1, 2), torch.tensor([0]), width=8, blocks=1)
    nn.init.normal_(head.leave.weight, std=0.3)
    output, x, t = HeadOutput(model, head), torch.randn(3, 2), time(0.0)
    for cond in (torch.tensor([0, 1, 2]), torch.tensor([2, 2, 1])):
        wanted = head(model.features(x, t, cond), torch.zeros(3))
        conditioned(model.score, cond)(x, t)
        before = watched.passes
        assert_close(output(x, t), wanted)
        assert watched.passes == before, "no pass of its own"
    with pytest.raises(ValueError, match="takes its condition from the score"):
        output(x.clone(), t)
