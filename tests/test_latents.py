"""Latents against the closed-form flow, the flow of DDIM, and themselves."""

import math

import pytest
import torch
from torch.testing import assert_close

from likelihood import FixedGrid, log_likelihood
from likelihood.latents import decode, encode, interpolate, round_trip
from sde_lib import VPSDE, Counted, PerSample, probability_flow
from sde_lib.grids import Karras
from sde_lib.oracles import Gaussian
from sde_lib.samplers import DDIM, SamplingError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def full_gaussian(dims=5):
    a = torch.randn(dims, dims, generator=seeded())
    return Gaussian(torch.linspace(-1, 1, dims), covariance=a @ a.T / dims + 0.1 * torch.eye(dims))


def ends(data, sde, count=20):
    """Points of one solution of the closed-form flow, at t_min and at t_max."""
    z = torch.randn(count, *data.shape, dtype=torch.float64, generator=seeded(1))
    return data.push(sde, z, sde.t_min), data.push(sde, z, sde.t_max)


def slope(errors):
    """Order by which ``errors`` fall when nodes are doubled again and again."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


def test_encode_and_decode_are_the_closed_form_flow_of_a_gaussian(sde):
    data = full_gaussian()
    flow, (x, latent) = probability_flow(sde, data.score(sde)), ends(data, sde)
    assert_close(encode(flow, x) / sde.prior_std(), latent / sde.prior_std(), rtol=0, atol=1e-4)
    assert_close(decode(flow, latent), x, rtol=0, atol=3e-4)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 3, 6), (1, 2, 2, 2)])
def test_data_of_any_shape_and_beyond_the_exact_trace(shape):
    data = Gaussian(torch.linspace(-1, 1, math.prod(shape)).reshape(shape), 0.5)
    sde = VPSDE()
    flow, (x, latent) = probability_flow(sde, data.score(sde)), ends(data, sde)
    assert_close(encode(flow, x), latent, rtol=0, atol=1e-4)
    assert_close(decode(flow, latent), x, rtol=0, atol=1e-3)


def test_encode_is_the_latent_of_the_likelihood(sde, mixture):
    flow = probability_flow(sde, mixture.score(sde))
    x = mixture.sample(10, generator=seeded()).double()
    for nodes in (16, 48):
        likelihood = log_likelihood(flow, x, solver=FixedGrid(nodes, halve=False))
        assert torch.equal(encode(flow, x, nodes=nodes), likelihood.latent)


def test_encode_is_of_fourth_order_and_the_round_trip_of_third_or_better(sde, mixture):
    data, nodes = full_gaussian(), (96, 192, 384)
    flow, (x, latent) = probability_flow(sde, data.score(sde)), ends(data, sde)
    errors = [float((encode(flow, x, nodes=n) - latent).abs().max()) for n in nodes]
    # the first steps, of lower order, show on VE: 3.7
    assert slope(errors) == pytest.approx(4, abs=0.4)

    x = mixture.sample(50, generator=seeded(2), sde=sde, t=sde.t_min).double()
    flow = probability_flow(sde, mixture.score(sde))
    errors = [float(round_trip(flow, x, nodes=n).error.mean()) for n in (64, 128)]
    assert slope(errors) > 2.9
    assert errors[0] < 1e-3


def test_round_trip_reports_what_it_lost_and_what_it_cost(mixture):
    sde = VPSDE()
    score = Counted(mixture.score(sde))
    flow, x = probability_flow(sde, score), mixture.sample(12, generator=seeded())
    first = round_trip(flow, x, nodes=16)
    assert first.nfe == 32 and first.pilot_nfe == 16 * 33 and score.nfe == 32 + 33
    again = round_trip(flow, x, nodes=16)
    assert again.nfe == 32 and again.pilot_nfe == 0 and score.nfe == 2 * 32 + 33

    assert torch.equal(first.latent, encode(flow, x, nodes=16))
    assert torch.equal(first.x_again, decode(flow, first.latent, nodes=16))
    rms = (first.x_again.double() - x.double()).square().mean(1).sqrt()
    assert_close(first.error.double(), rms, rtol=1e-5, atol=0)
    assert float(rms.min()) > 1e-5, "sixteen nodes lose something"


def inverted(score, sde, x, steps):
    """DDIM's map run upwards: x' = alpha' x0_hat + sigma' eps_hat from the less noisy level."""
    levels = sde.level(Karras()(sde, steps).flip(0)).rows()
    for now, nxt in zip(levels, levels[1:], strict=False):
        eps_hat = -now.sigma * score(x, now.t)
        x = nxt.alpha * (x - now.sigma * eps_hat) / now.alpha + nxt.sigma * eps_hat
    return x


def test_ddim_and_its_inversion_lead_to_decode_and_encode_at_many_steps(sde, mixture):
    score, unit = mixture.score(sde), sde.prior_std()
    flow = probability_flow(sde, score)
    x = mixture.sample(20, generator=seeded(3), sde=sde, t=sde.t_min).double()
    latent = encode(flow, x, nodes=128)
    up = [inverted(score, sde, x, steps) / unit for steps in (60, 120)]
    down = [DDIM(n, denoise=False)(score, sde, latent) for n in (60, 120)]
    for (coarse, fine), limit in ((up, latent / unit), (down, decode(flow, latent, nodes=128))):
        far, near = ((result - limit).abs().max() for result in (coarse, fine))
        # of first order, so that twice the finer minus the coarser is of second
        assert 1.6 < float(far / near) < 2.4
        assert float((2 * fine - coarse - limit).abs().max()) < 0.25 * float(near)


def test_a_sample_does_not_depend_on_its_batch(mixture):
    sde = VPSDE()
    flow, x = probability_flow(sde, mixture.score(sde)), mixture.sample(9, generator=seeded())
    together = round_trip(flow, x.double(), nodes=24)
    alone = round_trip(flow, x[[7, 2]].double(), nodes=24)
    assert_close(alone.latent, together.latent[[7, 2]], rtol=0, atol=1e-12)
    assert_close(alone.x_again, together.x_again[[7, 2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_sees_the_dtype_of_x_and_x_is_left_alone(mixture, dtype):
    sde, seen = VPSDE(), set()

    def score(x, t):
        seen.add(x.dtype)
        return mixture.score(sde)(x, t)

    x = mixture.sample(5, generator=seeded()).to(dtype).requires_grad_()
    kept = x.detach().clone()
    result = round_trip(probability_flow(sde, score), x)
    assert seen == {dtype}
    for part in (result.x_again, result.error, result.latent):
        assert part.dtype == dtype and not part.requires_grad
    assert x.grad is None and torch.equal(x, kept)
    assert float(result.error.max()) < 1e-3


def test_the_jacobian_of_encode_is_the_ratio_of_standard_deviations():
    sde, data = VPSDE(), Gaussian(torch.zeros(3), torch.tensor([0.3, 0.8, 2.0]))
    flow, (x, latent) = probability_flow(sde, data.score(sde)), ends(data, sde, 4)
    t = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    std = (sde.alpha(t)[:, None] ** 2 * data.variances + sde.sigma(t)[:, None] ** 2).sqrt()
    for map_, point, wanted in (
        (encode, x, std[1] / std[0]),
        (decode, latent, std[0] / std[1]),
    ):
        point = point.clone().requires_grad_()
        moved = map_(flow, point, differentiable=True)
        (gradient,) = torch.autograd.grad(moved.sum(), point)
        assert_close(gradient, wanted.expand(4, 3), rtol=1e-3, atol=0)
        assert not map_(flow, point).requires_grad


def gaussian_latents(count, *shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=seeded(seed))


def test_interpolation_ends_at_its_ends_and_keeps_shape_and_dtype():
    a, b = gaussian_latents(6, 3, 4), 2 * gaussian_latents(6, 3, 4, seed=1)
    for dtype in (torch.float32, torch.float64):
        path = interpolate(a.to(dtype), b.to(dtype), [0.0, 0.3, 1.0])
        assert path.shape == (3, 6, 3, 4) and path.dtype == dtype
        assert_close(path[0], a.to(dtype))
        assert_close(path[2], b.to(dtype))
    assert_close(interpolate(a, b, torch.tensor([0.3])), interpolate(b, a, [0.7]))


def test_interpolation_is_a_great_circle_at_constant_speed_with_norms_between():
    a, b = gaussian_latents(6, 12), 3 * gaussian_latents(6, 12, seed=1)
    fractions = torch.linspace(0, 1, 11, dtype=torch.float64)
    path = interpolate(a, b, fractions)
    norm = path.norm(dim=2, keepdim=True)
    between = torch.lerp(a.norm(dim=1), b.norm(dim=1), fractions[:, None])
    assert_close(norm[..., 0], between)

    unit = path / norm
    steps = (unit[1:] * unit[:-1]).sum(2).acos()
    total = ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).acos()
    assert_close(steps, (total / 10).expand(10, 6))
    plane = torch.linalg.qr(torch.stack([a, b], 2)).Q  # [6, 12, 2]
    inside = torch.einsum("bdk,bek,fbe->fbd", plane, plane, path)
    assert_close(inside, path)


def test_interpolation_of_equal_norms_is_the_usual_formula():
    a, b = (torch.nn.functional.normalize(gaussian_latents(6, 12, seed=s)) for s in (0, 1))
    angle = (a * b).sum(1, keepdim=True).acos()
    for f in (0.1, 0.5, 0.8):
        usual = (((1 - f) * angle).sin() * a + (f * angle).sin() * b) / angle.sin()
        assert_close(interpolate(a, b, [f])[0], usual)


def test_interpolated_gaussian_latents_keep_their_norm_and_straight_lines_do_not():
    dims, count = 64, 4000
    a, b = gaussian_latents(count, dims), gaussian_latents(count, dims, seed=1)
    square = interpolate(a, b, [0.5])[0].square().sum(1) / dims
    # a mean of two norms: E|z|² less a quarter of the variance of their difference, 1 / 2 each
    wanted = 1 - 0.25 / dims
    assert abs(float(square.mean()) - wanted) < 5 * float(square.std()) / count**0.5 + 1e-4
    straight = (0.5 * (a + b)).square().sum(1) / dims
    assert abs(float(straight.mean()) - 0.5) < 0.01


def test_equal_opposite_and_vanishing_latents_are_interpolated_too():
    a = gaussian_latents(5, 7)
    fractions = [0.0, 0.25, 0.5, 1.0]
    assert_close(interpolate(a, a, fractions), a.expand(4, 5, 7))
    nearly = a * (1 + 1e-9)
    assert_close(interpolate(a, nearly, fractions), a.expand(4, 5, 7))

    half = interpolate(a, -a, fractions)
    assert_close(half[0], a)
    assert_close(half[3], -a)
    assert_close(half.norm(dim=2), a.norm(dim=1).expand(4, 5))
    assert_close((half[2] * a).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)

    close = interpolate(a, -2 * a + 1e-9 * gaussian_latents(5, 7, seed=1), fractions)
    assert_close(close.norm(dim=2)[2], 1.5 * a.norm(dim=1))  # the usual formula has no bound here

    zero = torch.zeros_like(a)
    assert_close(interpolate(zero, a, fractions)[1], 0.25 * a)
    assert_close(interpolate(zero, zero, fractions)[1], zero)
    one = gaussian_latents(5, 1)
    assert_close(interpolate(one, -one, fractions)[1], 0.5 * one)


@pytest.mark.parametrize("name", ["encode", "decode", "round_trip"])
def test_what_is_no_batch_of_numbers_is_refused(mixture, name):
    sde = VPSDE()
    flow = probability_flow(sde, mixture.score(sde))
    call = {"encode": encode, "decode": decode, "round_trip": round_trip}[name]
    for x, message in (
        (torch.zeros(2), r"shape \(2,\).* A single sample is x\[None\]"),
        (torch.zeros(0, 2), r"shape \(0, 2\)"),
        (torch.zeros(3, 2, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), "half precision converts inside"),
        (torch.tensor([[0.0, float("nan")]]), "with NaN or infinity"),
        (torch.tensor([[0.0, float("inf")]]), "with NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=f"^{name} needs a batch .*{message}"):
            call(flow, x)
    with pytest.raises(ValueError, match="nodes"):
        call(flow, torch.zeros(1, 2), nodes=7)
    blind = probability_flow(sde, lambda x, t: mixture.score(sde)(x.detach(), t))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        call(blind, torch.zeros(1, 2))


def test_interpolate_refuses_what_does_not_go_together():
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"one shape and dtype; got \(2, 3\) .* \(1, 3\)"):
        interpolate(a, a[:1], [0.5])
    with pytest.raises(ValueError, match="one shape and dtype; got .*float32 .*float64"):
        interpolate(a, a.double(), [0.5])
    for fractions in ([-0.1], [1.1], [float("nan")], 0.5):
        with pytest.raises(ValueError, match=r"fractions in \[0, 1\]"):
            interpolate(a, a, fractions)
    with pytest.raises(ValueError, match="interpolate needs a batch"):
        interpolate(a, a * float("nan"), [0.5])


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_a_score_of_nan_is_told_with_its_place_and_leaves_the_others_their_result(mixture, name):
    sde = VPSDE()
    exact = mixture.score(sde)
    call = {"encode": encode, "decode": decode}[name]

    def broken(x, t):
        return torch.where((x[:, :1] > 50) & (t < 0.5), float("nan"), exact(x, t))

    x = torch.randn(4, 2, generator=seeded())
    x[2, 0] = 1e4
    flow = probability_flow(sde, broken)
    message = rf"{name}: 1 of 4 samples .* from node \d+ on, log\(sigma/alpha\) = .* is number 2;"
    with pytest.raises(SamplingError, match=message) as caught:
        call(flow, x)
    told = float(str(caught.value).partition("alpha) = ")[2].partition(",")[0])
    half = -0.5 * float(sde.log_snr(torch.tensor(0.5, dtype=torch.float64)))
    first = flow.clock_range()[0] if name == "encode" else half  # where it is first below t = 0.5
    assert first - 0.5 < told < first + 1e-3
    good = [0, 1, 3]
    assert bool(caught.value.partial[2].isnan().any())
    assert_close(caught.value.partial[good], call(flow, x[good]), rtol=1e-4, atol=1e-5)


def test_decoded_prior_samples_are_the_data_and_each_depends_on_its_seed_alone(mixture):
    sde = VPSDE()
    flow = probability_flow(sde, mixture.score(sde))
    latent = sde.prior_sample((2000, 2), generator=PerSample(range(2000)), dtype=torch.float64)
    x = decode(flow, latent, nodes=48)
    mean, std = mixture.mean(), mixture.variance().sqrt()
    assert bool(((x.mean(0) - mean).abs() < 5 * std / 2000**0.5 + 1e-3).all())
    squares = ((x - mean) / std).square()
    assert bool(((squares.mean(0) - 1).abs() < 5 * squares.std(0) / 2000**0.5 + 1e-2).all())
