"""Dequantization: q fills its cell and no more, bounds are bounds, and learning closes the gap."""

import math

import pytest
import torch
from torch.testing import assert_close

from likelihood.dequantize import (
    Dequantized,
    TruncatedNormalDequantization,
    UniformDequantization,
    truncated_normal,
)
from likelihood.importance import importance_weighted, noise_bias
from likelihood.variational import (
    DequantizationFlow,
    VariationalDequantization,
    fit_dequantization,
    one_sample_bound,
)
from sde_lib import EDMSDE, VESDE, VPSDE, PerSample, SubVPSDE, probability_flow
from sde_lib.oracles import Gaussian, GaussianMixture

SHAPES = [(2,), (1, 4, 4), (3, 8, 8)]
FINE = {  # processes whose noise starts below the bins of 256 levels
    "vp": VPSDE(t_min=1e-7),
    "subvp": SubVPSDE(),
    "ve": VESDE(sigma_min=1e-4),
    "edm": EDMSDE(sigma_min=1e-4),
}
VP = FINE["vp"]


@pytest.fixture(params=FINE.values(), ids=FINE.keys())
def fine(request):
    return request.param


def disturbed(shape, generator, size=0.5):
    """A flow with random last layers too: neither uniform nor the identity."""
    flow = DequantizationFlow(shape, generator=generator)
    with torch.no_grad():
        for coupling in flow.couplings:
            coupling.network[-1].weight.normal_(std=size / 32**0.5, generator=generator)
            coupling.network[-1].bias.normal_(std=size, generator=generator)
    return flow


def dequantizations(levels, shape, generator):
    learned = VariationalDequantization(levels, flow_module=disturbed(shape, generator))
    width = 3.0 if levels <= 256 else 0.01  # noise that VP has at 65536 levels
    return [
        UniformDequantization(levels),
        TruncatedNormalDequantization(levels, width=width),
        learned,
    ]


def alpha_of(drawn, sde):
    return 1.0 if drawn.t is None else float(sde.alpha(torch.tensor(drawn.t).double()))


def log_cell_mass(data, units, values, sde=None, t=None):
    """Log of the mass of a Gaussian mixture in the cells of ``values`` [B, D], by erf."""
    alpha = 1.0 if t is None else float(sde.alpha(torch.tensor(t).double()))
    sigma = 0.0 if t is None else float(sde.sigma(torch.tensor(t).double()))
    std = (alpha**2 * data.variances + sigma**2).sqrt()
    low = alpha * (units.low + units.bin_width * values.double().unsqueeze(1))
    ends = (low - alpha * data.means) / std, (low + alpha * units.bin_width - alpha * data.means)
    below = torch.special.ndtr(ends[1] / std) - torch.special.ndtr(ends[0])
    return (data.log_weights + below.log().sum(-1)).logsumexp(1)


def bounds(data, units, values, draws, generator, sde=None):
    """log p - log q of ``draws`` draws of each of ``values``, [draws, B]."""
    drawn = units.draw(values.repeat(draws, 1), generator, sde=sde)
    where = (None, None) if drawn.t is None else (sde, drawn.t)
    return drawn.bound(data.log_prob(drawn.x.double(), *where)).reshape(draws, len(values))


def peaky():
    """Two narrow modes, steep within bins of width 1/2, that tie the two coordinates together."""
    means = torch.tensor([[-0.45, -0.55], [0.55, 0.4]])
    return GaussianMixture(means, torch.tensor([0.15, 0.2]), torch.tensor([0.4, 0.6]))


def cells(levels):
    return torch.cartesian_prod(torch.arange(levels), torch.arange(levels))


# q itself


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_lie_inside_their_cells_for_every_dequantization(levels, shape, seeded):
    values = torch.randint(levels, (40, *shape), generator=seeded(0))
    values[0], values[1] = 0, levels - 1
    for units in dequantizations(levels, shape, seeded(1)):
        drawn = units.draw(values, seeded(2), sde=VP)
        assert drawn.x.dtype == torch.float32 and drawn.log_q.dtype == torch.float64
        assert drawn.x.shape == values.shape and drawn.log_q.shape == (40,)
        assert not drawn.x.requires_grad and not drawn.log_q.requires_grad
        assert torch.equal(units.decode(drawn.x.double() / alpha_of(drawn, VP)).long(), values)
        assert bool(torch.isfinite(drawn.log_q).all())


@pytest.mark.parametrize("width", [0.01, 1.0, 3.0, 12.0])
def test_truncated_normal_follows_its_distribution_up_to_both_ends(width):
    u = torch.tensor([0.0, 2**-53, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 2**-53], dtype=torch.float64)
    z = truncated_normal(u, width)
    low, high = torch.special.ndtr(torch.tensor([-width, width], dtype=torch.float64))
    assert_close((torch.special.ndtr(z) - low) / (high - low), u, atol=1e-12, rtol=0)
    assert bool((z.abs() <= width).all()) and bool((z.diff() >= 0).all())
    assert_close(z[3], -z[5], atol=0, rtol=1e-12)


@pytest.mark.parametrize("width", [0.5, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_truncated_normal_q_integrates_to_one_over_its_cell(fine, levels, width, monkeypatch):
    units = TruncatedNormalDequantization(levels, low=0.0, high=3.0, width=width)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    monkeypatch.setattr("likelihood.dequantize.rand", lambda *_, **__: u[:, None])
    drawn = units.draw(torch.full((len(u), 1), levels - 1), sde=fine)
    alpha = alpha_of(drawn, fine)
    exact = units.encode(torch.tensor([[levels - 1]])).double() * alpha
    exact = exact + alpha * units.noise_ratio * truncated_normal(u, width)[:, None]
    off = (drawn.x.double() - exact).abs()
    assert float((off > 1e-6).double().mean()) < 1e-4  # float32: one at the edge steps back inside
    assert float(off.max()) < alpha * units.bin_width / 250
    integral = torch.trapezoid(drawn.log_q.exp(), exact[:, 0])  # 1e-5 of the mass is beyond
    assert float(integral) == pytest.approx(1.0, abs=2e-5)


def test_variational_q_integrates_to_one_over_its_cell(seeded):
    flow, grid = disturbed((1,), seeded(0)), 100_000
    noise = (torch.arange(grid, dtype=torch.float64) + 0.5)[:, None] / grid
    with torch.no_grad():
        u, log_q = flow(noise, torch.full_like(noise, 0.3))
    assert float(torch.trapezoid(log_q.exp(), u[:, 0])) == pytest.approx(1.0, abs=1e-4)
    assert float(log_q.std()) > 0.1  # and it is not the uniform one


@pytest.mark.parametrize("width", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("levels", [2, 256])
def test_entropy_of_the_truncated_normal_is_the_closed_form(fine, levels, width, seeded):
    n, shape = 4000, (3, 2)
    units = TruncatedNormalDequantization(levels, width=width)
    drawn = units.draw(torch.zeros((n, *shape), dtype=torch.long), seeded(0), sde=fine)
    cell = math.log(alpha_of(drawn, fine) * units.bin_width)
    error = drawn.log_q.mean() + 6 * (cell - units.flat_gap)
    assert abs(float(error)) < 5 * float(drawn.log_q.std()) / n**0.5


def test_flat_gap_at_width_three_is_the_number_of_the_docstring():
    units = TruncatedNormalDequantization(256)
    assert units.flat_gap == pytest.approx(0.389, abs=5e-4)
    assert units.flat_gap / math.log(2) == pytest.approx(0.561, abs=5e-4)
    assert -units.log_mass == pytest.approx(0.0027, abs=5e-5)
    assert TruncatedNormalDequantization(256, width=1e-3).flat_gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("levels", [2, 17])  # what all of them have noise for
def test_the_flow_starts_where_the_noise_fills_the_bins(any_sde, levels):
    units = TruncatedNormalDequantization(levels)
    t = torch.tensor(units.start_time(any_sde), dtype=torch.float64)
    cell = any_sde.alpha(t) * units.bin_width
    assert_close(any_sde.sigma(t) * 2 * units.width, cell, rtol=1e-6, atol=0)
    assert UniformDequantization(levels).start_time(any_sde) is None


@pytest.mark.parametrize(
    "units, sde",
    [
        (TruncatedNormalDequantization(65536), VPSDE()),
        (TruncatedNormalDequantization(256), VESDE()),
        (TruncatedNormalDequantization(2, width=1e-4), VPSDE()),
    ],
    ids=["finer than the noise", "coarse process", "coarser than the noise"],
)
def test_a_start_outside_of_the_process_is_refused_and_the_advice_works(units, sde):
    with pytest.raises(ValueError, match="Take a width from") as error:
        units.draw(torch.zeros(1, 1, dtype=torch.long), sde=sde)
    words = str(error.value).split("Take a width from ")[1].split(",")[0].split(" to ")
    low, high = map(float, words)
    assert not low <= units.width <= high
    for width in (1.001 * low, 0.999 * high):  # four digits are printed
        within = TruncatedNormalDequantization(units.levels, width=width)
        assert sde.t_min <= within.start_time(sde) <= sde.t_max


def test_training_sees_bin_centres_and_decode_takes_the_nearest_bin(seeded):
    units = TruncatedNormalDequantization(4, 0.0, 8.0)
    values = torch.tensor([[0, 1, 2, 3]])
    assert units.encode(values).tolist() == [[1.0, 3.0, 5.0, 7.0]]
    assert torch.equal(units.decode(units.encode(values)).long(), values)
    assert units.decode(torch.tensor([[-9.0, 1.9, 2.1, 99.0]])).tolist() == [[0, 0, 1, 3]]


# units


def test_bits_follow_from_log_p_and_log_q_and_agree_for_the_uniform_one(seeded):
    values = torch.randint(17, (5, 3, 4), generator=seeded(0))
    log_prob = torch.randn(5, generator=seeded(1), dtype=torch.float64)
    units = UniformDequantization(17, 0.0, 3.0)
    drawn = units.draw(values, seeded(2))
    assert torch.equal(drawn.x, units.encode(values, seeded(2)))
    assert_close(drawn.log_q, torch.full((5,), -12 * math.log(3 / 17)).double())
    assert_close(units.measure(log_prob, (3, 4)), drawn.bits_per_dim(log_prob))
    for other in dequantizations(17, (3, 4), seeded(3)):
        drawn = other.draw(values, seeded(4), sde=VP)
        bits = -(log_prob - drawn.log_q) / (12 * math.log(2))
        assert_close(drawn.bits_per_dim(log_prob), bits)
        assert_close(other.measure(log_prob, (3, 4), drawn.log_q), bits)


def test_measure_without_log_q_is_refused_where_it_differs_from_draw_to_draw():
    with pytest.raises(ValueError, match="log_q"):
        TruncatedNormalDequantization(17).measure(torch.zeros(1), (3,))


# the bound


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["uniform", "truncated", "variational"])
def test_the_bound_never_exceeds_the_exact_mass_of_the_cell(kind, seeded):
    data, values, n = peaky(), cells(4), 4000
    units = dequantizations(4, (2,), seeded(0))[kind]
    found = bounds(data, units, values, n, seeded(1), VP)
    exact = log_cell_mass(data, units, values, VP, units.start_time(VP))
    gap, error = exact - found.mean(0), found.std(0) / n**0.5
    assert bool((gap > -5 * error).all())
    weight = found.exp().mean(0) / exact.exp() - 1  # E[p / q] is the mass: the bound is of log P
    spread = found.exp().std(0) / exact.exp() / n**0.5
    assert bool((weight.abs() < 5 * spread).all())


def test_uniform_bound_is_met_where_the_density_is_flat_in_the_bin(seeded):
    data, values = Gaussian(torch.zeros(2), 1e4), cells(4)
    units = UniformDequantization(4)
    found = bounds(data, units, values, 10, seeded(0))
    exact = 2 * math.log(0.5 / (1e4 * math.sqrt(2 * math.pi)))
    assert_close(found, torch.full_like(found, exact), atol=1e-7, rtol=0)


def test_truncated_bound_is_met_where_the_density_is_proportional_to_q(fine, seeded):
    units, values = TruncatedNormalDequantization(256), torch.tensor([[0, 200]])
    data = GaussianMixture(units.encode(values), 0.0)
    found = bounds(data, units, values, 50, seeded(0), fine)
    exact = log_cell_mass(data, units, values, fine, units.start_time(fine))
    assert_close(exact, torch.full_like(exact, 2 * units.log_mass), atol=1e-6, rtol=0)
    assert_close(found, exact.expand(50, 1), atol=1e-4, rtol=0)  # x is float32


def test_truncated_bound_of_flat_data_loses_the_flat_gap(seeded):
    n, data, values = 20_000, GaussianMixture(torch.zeros(1, 2), 100.0), torch.tensor([[3, 12]])
    units = TruncatedNormalDequantization(16)
    found = bounds(data, units, values, n, seeded(0), VP)
    exact = log_cell_mass(data, units, values, VP, units.start_time(VP))
    off = float(exact - found.mean()) - 2 * units.flat_gap
    assert abs(off) < 5 * float(found.std()) / n**0.5


# variational


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_untrained_flow_is_exactly_uniform(levels, shape, seeded):
    values = torch.randint(levels, (30, *shape), generator=seeded(0))
    flow = DequantizationFlow(shape, generator=seeded(1))
    learned = VariationalDequantization(levels, flow_module=flow).draw(values, seeded(2))
    uniform = UniformDequantization(levels).draw(values, seeded(2))
    assert_close(learned.x, uniform.x, atol=1e-6, rtol=0)
    assert_close(learned.log_q, uniform.log_q, atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 2), (1, 4, 4), (2, 3, 3)], ids=str)
def test_log_q_of_the_flow_is_the_log_determinant_of_its_jacobian(shape, seeded):
    flow = disturbed(shape, seeded(0)).double()
    noise = torch.rand(3, *shape, generator=seeded(1), dtype=torch.float64)
    centred = 2 * torch.rand(3, *shape, generator=seeded(2), dtype=torch.float64) - 1
    _, log_q = flow(noise, centred)
    size = noise[0].numel()
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda part, row=row: flow(part, centred[row : row + 1])[0], noise[row : row + 1]
        )
        log_det = jacobian.reshape(size, size).slogdet()[1]
        assert_close(log_q[row], -log_det, atol=1e-9, rtol=1e-9)
    assert bool((log_q.abs() > 1e-3).all())


def test_every_number_of_the_sample_is_changed_and_depends_on_the_levels(seeded):
    for shape in SHAPES:
        flow = disturbed(shape, seeded(0))
        noise = torch.rand(2, *shape, generator=seeded(1), dtype=torch.float64)
        low, high = (flow(noise, torch.full_like(noise, end))[0] for end in (-0.5, 0.5))
        assert bool(((low - noise).abs() > 1e-6).all()) and bool((low != high).all())


def fitted(bound, steps, seeded, data):
    units = VariationalDequantization(4, flow_module=DequantizationFlow((2,), generator=seeded(0)))
    train = units.decode(data.sample(4000, generator=seeded(1)))
    history = fit_dequantization(
        units, bound, train, steps=steps, batch_size=256, lr=1e-2, generator=seeded(2)
    )
    return units, history


def gap_closed(units, data, seeded, n=4000):
    """Part of the expected gap of uniform dequantization that q closes; no cell may break it."""
    values = cells(4)
    learned = bounds(data, units, values, n, seeded(4))
    plain = bounds(data, UniformDequantization(4), values, n, seeded(4))  # the same noise
    exact = log_cell_mass(data, units, values)
    assert bool((exact - learned.mean(0) > -5 * learned.std(0) / n**0.5).all())
    weight = exact.exp()  # of the cell, in the expectation over data
    before, after = ((weight * (exact - b.mean(0))).sum() for b in (plain, learned))
    assert float(before) > 0.05  # nats: there is a gap to close
    return float(1 - after / before)


def test_training_closes_half_of_the_gap_and_keeps_the_bound(seeded):
    data = peaky()
    units, history = fitted(lambda x, _: data.log_prob(x.double()), 200, seeded, data)
    assert history.shape == (200,) and bool(torch.isfinite(history).all())
    assert gap_closed(units, data, seeded) > 0.5


def test_training_on_the_one_sample_bound_of_a_flow_closes_half_of_the_gap_too(seeded):
    data = peaky()
    bound = one_sample_bound(probability_flow(VP, data.score(VP)))
    units, _ = fitted(bound, 300, seeded, data)
    assert gap_closed(units, data, seeded) > 0.5


def test_the_one_sample_bound_of_an_exact_score_is_the_log_density_on_average(fine, seeded):
    n, data = 20_000, peaky()
    x = torch.tensor([[-0.4, -0.5]], dtype=torch.float64)
    bound = one_sample_bound(probability_flow(fine, data.score(fine)))
    found = bound(x.expand(n, 2), seeded(0))
    off = float(found.mean() - data.log_prob(x))
    assert abs(off) < 5 * float(found.std()) / n**0.5 + 0.01  # 0.01: decoder, prior at t_max


def test_a_wrong_score_lowers_the_one_sample_bound(seeded):
    n, data = 20_000, peaky()
    x = torch.tensor([[-0.4, -0.5]], dtype=torch.float64)
    bound = one_sample_bound(probability_flow(VP, Gaussian(torch.zeros(2), 0.6).score(VP)))
    found = bound(x.expand(n, 2), seeded(0))
    truth = Gaussian(torch.zeros(2), 0.6).log_prob(x)  # of the model, not of the data
    assert abs(float(found.mean() - truth)) < 5 * float(found.std()) / n**0.5 + 0.01
    assert float(truth) < float(data.log_prob(x))


def test_training_leaves_the_score_network_alone(seeded):
    network = torch.nn.Linear(2, 2)
    before = [weight.clone() for weight in network.parameters()]
    units = VariationalDequantization(4, flow_module=DequantizationFlow((2,)))
    fit_dequantization(
        units, lambda x, _: network(x).square().sum(1), cells(4), steps=2, generator=seeded(0)
    )
    for weight, old in zip(network.parameters(), before, strict=True):
        assert weight.grad is None and torch.equal(weight, old)


def test_training_repeats_itself_and_its_state_restores_it(seeded):
    data, runs = peaky(), []
    for _ in range(2):
        units, history = fitted(lambda x, _: data.log_prob(x.double()), 5, seeded, data)
        runs.append((units, history))
    assert torch.equal(runs[0][1], runs[1][1])
    other = DequantizationFlow((2,), generator=seeded(9))
    other.load_state_dict(runs[0][0].flow_module.state_dict())
    restored = VariationalDequantization(4, flow_module=other)
    one, two = (units.draw(cells(4), seeded(5)) for units in (runs[0][0], restored))
    assert torch.equal(one.x, two.x) and torch.equal(one.log_q, two.log_q)


def test_training_stops_at_nan_with_the_weights_of_the_last_good_step(seeded):
    calls, saved = [], []
    units = VariationalDequantization(4, flow_module=DequantizationFlow((2,)))

    def bound(x, generator):
        calls.append(1)
        saved.append([weight.detach().clone() for weight in units.flow_module.parameters()])
        return (x * (math.nan if len(calls) == 5 else 1.0)).sum(1)

    with pytest.raises(FloatingPointError, match="at step 3 .* nan"):
        fit_dequantization(units, bound, cells(4), steps=10, generator=seeded(0))
    for weight, old in zip(units.flow_module.parameters(), saved[-1], strict=True):
        assert torch.equal(weight, old)


@pytest.mark.parametrize("bound", [lambda x, _: x.detach().sum(1), lambda x, _: torch.ones(128)])
def test_a_bound_without_gradient_is_refused(bound):
    units = VariationalDequantization(4, flow_module=DequantizationFlow((2,)))
    with pytest.raises(ValueError, match="differentiable in x"):
        fit_dequantization(units, bound, cells(4), steps=1)


def test_draws_with_gradient_reach_the_weights(seeded):
    units = VariationalDequantization(4, flow_module=DequantizationFlow((2,)))
    drawn = units.draw_with_gradient(cells(4), seeded(0))
    assert drawn.x.requires_grad and drawn.log_q.requires_grad
    assert not units.encode(cells(4), seeded(0)).requires_grad
    assert torch.equal(units.encode(cells(4), seeded(0)), drawn.x.detach())


# importance weights


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["uniform", "truncated", "variational"])
def test_importance_weighted_bound_rises_with_k_to_the_exact_mass(kind, seeded):
    data, values, repeats = peaky(), torch.tensor([[1, 0], [3, 2]]), 100
    units = dequantizations(4, (2,), seeded(0))[kind]
    exact = log_cell_mass(data, units, values, VP, units.start_time(VP))
    found = bounds(data, units, values, 512 * repeats, seeded(1), VP).reshape(512, repeats, 2)
    gaps = []
    for draws in (1, 16, 512):
        flat = importance_weighted(found[:draws].flatten(1)).log_prob.reshape(repeats, 2)
        gaps.append(exact - flat.mean(0))
        assert bool((gaps[-1] > -5 * flat.std(0) / repeats**0.5).all())
    assert bool((gaps[0] > 2 * gaps[1]).all()) and bool((gaps[1] > 2 * gaps[2]).all())
    assert bool((gaps[2] < 0.1 * gaps[0]).all())


def test_effective_sample_size_and_standard_error_are_right(seeded):
    n, draws, std = 20_000, 400, 0.5
    log_weights = std * torch.randn(draws, n // 10, generator=seeded(0), dtype=torch.float64)
    result = importance_weighted(log_weights)
    share = math.exp(-(std**2))  # (E w)² / E w² of a log-normal weight
    assert float(result.effective_sample_size.mean() / draws) == pytest.approx(share, rel=0.02)
    spread = float(result.log_prob.std())  # of 2000 values: 5 standard errors are 8 %
    assert float(result.standard_error.mean()) == pytest.approx(spread, rel=0.09)
    assert float(result.log_prob.mean()) == pytest.approx(std**2 / 2, abs=5e-3)


def test_importance_weights_at_the_ends():
    single = importance_weighted(torch.tensor([[-3.0, 2.0]]))
    assert single.log_prob.tolist() == [-3.0, 2.0]
    assert single.effective_sample_size.tolist() == [1.0, 1.0]
    assert bool(single.standard_error.isnan().all())
    alike = importance_weighted(torch.full((8, 1), -5000.0))  # exp would be zero
    assert alike.log_prob.item() == pytest.approx(-5000)
    assert alike.effective_sample_size.item() == pytest.approx(8)
    assert alike.standard_error.item() == pytest.approx(0, abs=1e-7)
    one = importance_weighted(torch.tensor([[0.0], [-800.0], [-900.0], [-900.0]]))
    assert one.effective_sample_size.item() == pytest.approx(1)
    assert one.log_prob.item() == pytest.approx(-math.log(4))
    assert one.standard_error.item() == pytest.approx(1)  # mean and spread of (1, 0, 0, 0)


@pytest.mark.parametrize("draws", [1, 2, 5, 50])
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["equal", "uneven"])
def test_independent_noise_raises_the_value_by_the_stated_bias(draws, spread, seeded):
    n, std = 200_000 // draws, 0.3
    weights = spread * torch.randn(draws, 1, generator=seeded(0), dtype=torch.float64)
    error = std * (1 + torch.rand(draws, 1, generator=seeded(1), dtype=torch.float64))
    noise = error * torch.randn(draws, n, generator=seeded(2), dtype=torch.float64)
    raised = importance_weighted(weights + noise).log_prob - importance_weighted(weights).log_prob
    bias = noise_bias(error, weights)
    assert bias.shape == (1,)
    fourth = float(error.max()) ** 4 / 4  # what the expansion leaves out
    assert abs(float(raised.mean() - bias)) < 5 * float(raised.std()) / n**0.5 + fourth * (
        draws > 1
    )
    if draws > 1:
        assert float(bias) > 0.01
    equal = noise_bias(torch.full((draws, 1), std))
    assert float(equal) == pytest.approx(0.5 * (1 - 1 / draws) * std**2)


# independence of the batch


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["uniform", "truncated", "variational"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_draw_does_not_depend_on_its_batch(kind, shape, seeded):
    units = dequantizations(17, shape, seeded(0))[kind]
    values = torch.randint(17, (6, *shape), generator=seeded(1))
    whole = units.draw(values, PerSample(range(6)), sde=VP)
    part = units.draw(values[2:4], PerSample([2, 3]), sde=VP)
    assert_close(part.x, whole.x[2:4], atol=1e-6, rtol=0)
    assert_close(part.log_q, whole.log_q[2:4], atol=1e-5, rtol=1e-6)
    assert not torch.equal(whole.x[0], whole.x[1])


# refusals


@pytest.mark.parametrize(
    "values, match",
    [
        (torch.tensor([[0, 4]]), "values 0 to 4"),
        (torch.tensor([[-1, 0]]), "values -1 to 0"),
        (torch.tensor([[0.0, 1.0]]), "float32"),
        (torch.tensor([[math.nan, 1.0]]), "float32"),
        (torch.tensor([[True, False]]), "bool"),
        (torch.tensor([0, 1]), r"shape \(2,\)"),
        (torch.zeros(0, 2, dtype=torch.long), r"shape \(0, 2\)"),
        (torch.tensor([[200, 0]], dtype=torch.uint8), "values 0 to 200"),
    ],
    ids=["above", "below", "float", "nan", "bool", "no batch", "empty", "uint8"],
)
def test_what_is_no_level_is_refused(values, match, seeded):
    for units in dequantizations(4, (2,), seeded(0)):
        with pytest.raises(ValueError, match=match):
            units.draw(values, sde=VP)
    with pytest.raises(ValueError, match=match):
        fit_dequantization(units, lambda x, _: x.sum(1), values)


@pytest.mark.parametrize("width", [0, -1.0, math.nan, math.inf, "3"])
def test_the_width_must_be_a_positive_number(width):
    with pytest.raises(ValueError, match="width"):
        TruncatedNormalDequantization(256, width=width)


def test_the_truncated_normal_asks_for_the_process():
    with pytest.raises(ValueError, match="Pass the process"):
        TruncatedNormalDequantization(256).draw(torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize("levels", [1, 2.5, 65537])
def test_levels_are_checked_by_every_dequantization(levels):
    with pytest.raises(ValueError, match="TruncatedNormalDequantization .* levels"):
        TruncatedNormalDequantization(levels)
    with pytest.raises(ValueError, match="VariationalDequantization .* levels"):
        VariationalDequantization(levels, flow_module=DequantizationFlow((2,)))


def test_a_flow_of_another_shape_or_too_few_layers_is_refused():
    units = VariationalDequantization(4, flow_module=DequantizationFlow((3,)))
    with pytest.raises(ValueError, match=r"built for samples of shape \(3,\)"):
        units.draw(cells(4))
    with pytest.raises(ValueError, match="layers"):
        DequantizationFlow((3,), layers=1)


@pytest.mark.parametrize(
    "numbers",
    [
        torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.long),
        torch.tensor([[math.nan]]),
        torch.tensor([[math.inf]]),
    ],
    ids=["one axis", "integers", "nan", "inf"],
)
def test_log_weights_and_errors_must_be_finite_nats(numbers):
    with pytest.raises(ValueError, match="log_weights"):
        importance_weighted(numbers)
    with pytest.raises(ValueError, match="log_prob_error"):
        noise_bias(numbers)


def test_errors_must_be_standard_deviations_one_for_each_weight():
    with pytest.raises(ValueError, match=">= 0"):
        noise_bias(torch.tensor([[-0.1]]))
    with pytest.raises(ValueError, match="one error for each weight"):
        noise_bias(torch.zeros(2, 1), torch.zeros(3, 1))


def test_the_start_of_a_draw_is_none_unless_it_says_so():
    drawn = Dequantized(torch.zeros(2, 3), torch.zeros(2).double())
    assert drawn.t is None
    assert_close(drawn.bound(torch.ones(2).double()), torch.ones(2).double())
