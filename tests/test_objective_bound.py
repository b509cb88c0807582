"""The bound of a T-step model as an objective: against the bound of the likelihood, textbook
formulas, and the gradients of its parts."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import Watched
from torch import nn
from torch.testing import assert_close

from likelihood import BinDecoder, UniformDequantization, discrete_bound
from score_models import (
    EDM,
    DenoisingScoreMatching,
    FixedVariance,
    Hybrid,
    ImportanceTimes,
    LearnedVariance,
    LossAwareLevels,
    ScoreModel,
    UniformLevels,
    UniformTimes,
    VariationalBound,
    maximum_likelihood,
    score_matching_loss,
)
from score_models.networks import MLP
from score_models.objective_checks import STD, probed_model
from score_models.variance_kinds import interpolated_variance
from sde_lib import EDMSDE, VESDE, VPSDE, DiscreteSDE, probability_flow
from sde_lib.decoders import DensityDecoder

T = 6
DDPM = DiscreteSDE.linear_betas(1e-3, 0.6, num_levels=T)
PROCESSES = {"vp": VPSDE(t_min=1e-2), "ve": VESDE(sigma_max=1.0), "edm": EDMSDE(), "ddpm": DDPM}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_model(sde=PROCESSES["vp"], shape=(2,)) -> ScoreModel:
    """In float64, with weights that say something."""
    torch.manual_seed(0)
    network = MLP(shape, width=8, blocks=1)
    for weight in network.parameters():
        nn.init.normal_(weight, std=max(weight[0].numel(), 4) ** -0.5)
    return ScoreModel(network.double(), sde, EDM(STD))


def prepared(objective, model, shape=(2,)):
    """With a head that says something, in float64."""
    torch.manual_seed(1)
    objective.prepare(model, torch.zeros(1, *shape, dtype=torch.float64))
    for weight in objective.parameters():
        nn.init.normal_(weight, std=0.3)
    return objective.double()


@pytest.mark.parametrize("kind", ["posterior", "forward", "learned"])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_mean_loss_is_the_bound_of_the_likelihood(name, kind):
    """One sample, many draws, the weights of a network that was never trained."""
    sde, n = PROCESSES[name], 6000
    model = a_model(sde)
    variance = LearnedVariance(8, 1) if kind == "learned" else FixedVariance(kind)
    objective = prepared(VariationalBound(UniformLevels(levels=T), variance), model)
    reverse = interpolated_variance(model, variance.head) if kind == "learned" else kind
    x0 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    draws = objective.draw(sde, (n, 2), seeded(0))
    loss = objective.loss(model, x0.expand(n, 2), draws).detach()
    by_level = loss[objective.times.row(draws["u"])[0].argsort()].view(T, n // T)  # stratified
    times = UniformLevels(levels=T).time(sde, torch.arange(T))
    flow = probability_flow(sde, model.score)
    options = {"times": times, "variance": reverse, "generator": seeded(1)}
    bounds = -discrete_bound(flow, x0.expand(n // T, 2), **options).log_prob / 2
    of_loss = float(by_level.var(1).sum().sqrt()) / T
    error = math.hypot(of_loss, float(bounds.std())) / (n // T) ** 0.5
    assert abs(float(loss.mean() - bounds.mean())) < 5 * error
    assert error < 0.05 * float(bounds.mean().abs()), "else it would say nothing"


def test_a_step_without_error_costs_the_prior_term_alone():
    sde = PROCESSES["ve"]
    model, objective = a_model(sde), VariationalBound(UniformLevels(levels=T))
    x0 = torch.randn(5, 2, generator=seeded(0), dtype=torch.float64)
    u = torch.linspace(0.3, 0.9, 5, dtype=torch.float64)
    term = objective.term(sde, x0, {"u": u, "noise": x0}, None)
    times = objective.times.time(sde, torch.arange(T))
    bound = discrete_bound(probability_flow(sde, model.score), x0, times=times)
    assert_close(objective.cost(model, x0, term, term.noise), bound.terms[0] / 2)
    assert float(bound.terms[0].min()) > 0.01


def test_the_decoder_may_be_that_of_bins_and_its_gradient_is_finite():
    sde, n = VPSDE(t_min=1e-2), 6000
    model, bins = a_model(sde), BinDecoder(UniformDequantization(8))
    times = UniformLevels(levels=T)
    objective = VariationalBound(times, decoder=bins)
    x0 = torch.tensor([[0.375, -0.875]], dtype=torch.float64)  # the last one in the first bin
    loss = objective(model, x0.expand(n, 2), seeded(0))
    flow = probability_flow(sde, model.score)
    options = {"times": times.time(sde, torch.arange(T)), "decoder": bins, "generator": seeded(1)}
    bounds = -discrete_bound(flow, x0.expand(1000, 2), **options).log_prob / 2
    found = loss.detach()
    error = math.hypot(float(found.std()) / n**0.5, float(bounds.std()) / 1000**0.5)
    assert abs(float(found.mean() - bounds.mean())) < 5 * error
    loss.mean().backward()
    assert all(bool(w.grad.isfinite().all()) for w in model.network.parameters())


@pytest.mark.parametrize("times", [UniformLevels, LossAwareLevels])
def test_the_floor_of_gaussian_data_by_the_formulas_of_ddpm(times):
    """beta and alpha-bar as in Ho et al. 2020, eq. 6 and 7, at the exact score."""
    n, dims = 24_000, 3
    betas = torch.linspace(1e-3, 0.6, T, dtype=torch.float64)
    bars = (1 - betas).cumprod(0)
    miss = bars * STD**2 / (bars * STD**2 + 1 - bars)  # E (eps - eps_hat)², a coordinate
    steps = []
    for i in range(1, T):
        small = (1 - bars[i - 1]) / (1 - bars[i]) * betas[i]
        factor = betas[i] ** 2 / ((1 - betas[i]) * (1 - bars[i]))  # of the error in the mean
        r = torch.log(betas[i] / small)
        steps.append(0.5 * (r + torch.exp(-r) - 1 + factor * miss[i] / betas[i]))
    std = ((1 - bars[0]) / bars[0]).sqrt()
    last = 0.5 * math.log(2 * math.pi) + std.log() + 0.5 * miss[0]
    prior = 0.5 * bars[-1] * STD**2 / (1 - bars[-1])
    wanted = float(sum(steps) + last + prior)

    made = VariationalBound(times(levels=T), FixedVariance("forward"))
    model = probed_model(DDPM)
    x0 = STD * torch.randn(n, dims, generator=seeded(0))
    if times is LossAwareLevels:
        for key in range(3):
            draws = made.draw(DDPM, (T * 40, dims), seeded(key))
            made.observe(draws, made.loss(model, x0[: T * 40], draws))
        assert float(made.times.shares().std()) > 0.01, "no longer even"
    loss = made(model, x0, seeded(1)).detach().double()
    assert abs(float(loss.mean()) - wanted) < 5 * float(loss.std()) / math.sqrt(n)


def test_the_head_means_what_the_samplers_take_it_to_mean():
    model = a_model()
    variance = prepared(VariationalBound(variance=LearnedVariance(8, 1)), model).variance
    t, s = torch.full((4,), 0.5).double(), torch.full((4,), 0.4).double()
    x = torch.randn(4, 2, generator=seeded(0)).double()
    objective = VariationalBound(UniformLevels(levels=T), variance)
    draws = {"u": torch.full((4,), 0.9).double(), "noise": x}
    at = objective.term(model.sde, x, draws, None).at
    at = at._replace(
        x=x, t=t, earlier=model.sde.level(s), later=model.sde.level(t)
    )  # any step will do
    eps_hat = model(x, t)
    found = variance.excess(model, at).exp()
    reverse = interpolated_variance(model, variance.head)
    levels = (model.sde.level(time[:1]) for time in (s, t))
    (of_state,) = reverse.at_states(*levels)
    small = FixedVariance().of(at.earlier, at.later)[:, None]
    wanted = of_state(x, model.sde.level(t[0]), eps_hat)
    assert_close(found * small, wanted, rtol=1e-9, atol=0)


def test_hybrid_has_the_gradient_of_l_simple_for_the_network_and_of_the_bound_for_the_head():
    model, times = a_model(), UniformLevels(levels=T)
    hybrid = prepared(Hybrid(times, LearnedVariance(8, 1), share=0.01), model)
    x0 = torch.randn(32, 2, generator=seeded(0), dtype=torch.float64)
    draws = hybrid.draw(model.sde, x0.shape, seeded(1))
    network, head = list(model.parameters()), list(hybrid.parameters())

    def slopes(loss, weights):
        return torch.autograd.grad(loss.mean(), weights, retain_graph=True)

    loss = hybrid.loss(model, x0, draws)
    row, _ = times.row(draws["u"])
    t, noise = times.time(model.sde, row), draws["noise"].double()
    simple = score_matching_loss(model, x0, t, noise, lambda level: level.sigma**2)
    bound = hybrid.bound.loss(model, x0, draws)
    assert_close(slopes(loss, network), slopes(simple, network), rtol=1e-9, atol=1e-12)
    scaled = tuple(0.01 * s for s in slopes(bound, head))
    assert_close(slopes(loss, head), scaled, rtol=1e-9, atol=1e-12)
    assert_close(loss, simple + 0.01 * bound)
    assert any(bool(s.any()) for s in slopes(bound, network)), "the bound alone teaches both"


def test_l_simple_and_the_bound_share_one_pass():
    model = a_model()
    hybrid = prepared(Hybrid(UniformLevels(levels=T), LearnedVariance(8, 1)), model)
    model.network = watched = Watched(model.network)
    x0 = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64)
    hybrid(model, x0, seeded(1))
    hybrid(model, x0, seeded(2))
    assert watched.passes == 2


def test_a_learned_variance_gains_on_both_that_it_lies_between():
    """Few steps, the exact score of Gaussian data: the best v is known to lie between the two."""
    model = probed_model(DDPM)
    torch.manual_seed(0)
    objective = VariationalBound(UniformLevels(levels=T), LearnedVariance(8, 1))
    objective.prepare(model, torch.zeros(1, 1))
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-2)
    x0 = STD * torch.randn(256, 1, generator=seeded(0))
    for key in range(60):
        optimizer.zero_grad()
        objective(model, x0, seeded(key)).mean().backward()
        optimizer.step()
    x0 = STD * torch.randn(6000, 1, generator=seeded(1))
    found = {"learned": objective(model, x0, seeded(1)).detach()}
    for of in ("posterior", "forward"):
        rival = VariationalBound(UniformLevels(levels=T), FixedVariance(of))
        gain = rival(model, x0, seeded(1)).detach() - found["learned"]
        assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(len(x0))


def test_what_cannot_work_is_refused_with_the_reason():
    model, x0 = a_model(), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no head yet: call objective.prepare"):
        Hybrid()(model, x0, seeded(0))
    for times in (UniformTimes(), ImportanceTimes(weight=maximum_likelihood)):
        with pytest.raises(ValueError, match="one of T levels, UniformLevels or LossAwareLevels"):
            VariationalBound(times)
    with pytest.raises(ValueError, match="keeps no state, and would forget that of its times"):
        DenoisingScoreMatching(times=LossAwareLevels())
    with pytest.raises(ValueError, match="known before training, posterior or forward"):
        FixedVariance("learned")
    with pytest.raises(ValueError, match="Hybrid needs share"):
        Hybrid(share=0.0)
    with pytest.raises(ValueError, match="LearnedVariance needs width"):
        LearnedVariance(width=0)
    with pytest.raises(ValueError, match="second head needs the features"):
        bare = ScoreModel(nn.Identity(), VPSDE(), EDM(STD))
        Hybrid().prepare(bare, x0)
    assert VariationalBound().decoder == DensityDecoder()
