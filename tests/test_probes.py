"""Probes: unbiased, honest about their noise, and drawn where they say most."""

import math
from dataclasses import replace

import pytest
import torch
from known_flows import correlated, exact_flow, noised, seeded, vectors
from torch.testing import assert_close

from likelihood import (
    Cosine,
    Exact,
    FixedGrid,
    Hutchinson,
    Pilot,
    Pixel,
    Principal,
    log_likelihood,
)
from likelihood.divergence import colours
from sde_lib import (
    VPSDE,
    probability_flow,
)
from sde_lib.oracles import Gaussian, GaussianMixture


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "orthogonal"])
@pytest.mark.parametrize("basis", ["pixel", "cosine", "principal"])
@pytest.mark.parametrize("num_probes", [1, 2])
def test_fresh_probes_are_unbiased_in_every_basis(distribution, basis, num_probes):
    sde, data = VPSDE(), correlated()
    axes = {
        "pixel": Pixel(),
        "cosine": Cosine(1),
        "principal": Principal.of(data.sample(5000, generator=seeded(3))),
    }[basis]
    x = noised(data, sde, 1, seed=4).expand(300, 24)  # one point, 300 sets of probes
    probes = Hutchinson(num_probes, distribution, axes)
    result = log_likelihood(
        exact_flow(sde, data), x, divergence=probes, generator=seeded(5), solver=FixedGrid(40)
    )
    error = result.log_prob.double() - data.log_prob(x[:1].double(), sde, sde.t_min)
    assert abs(float(error.mean())) < 5 * float(error.std()) / 300**0.5 + 2e-3
    if distribution != "orthogonal":  # whose error bar is too long, by its docstring
        ratio = float(error.square().mean() / result.standard_error.square().mean())
        assert ratio < 1 + 5 * (2 / 300) ** 0.5 + 0.1
        # a single probe cannot tell little noise from a bend of the trace
        assert num_probes == 1 or ratio > 1 - 5 * (2 / 300) ** 0.5 - 0.1
    elif basis == "pixel":
        assert float(error.square().mean()) < float(result.standard_error.square().mean())


def test_fresh_probes_have_a_fraction_of_the_variance_of_kept_ones():
    sde, data = VPSDE(), correlated()
    x = noised(data, sde, 200)

    def variance(fresh):
        result = log_likelihood(
            exact_flow(sde, data),
            x,
            divergence=Hutchinson(1, basis=Pixel()),
            generator=seeded(8),
            solver=FixedGrid(48, fresh=fresh),
        )
        return float((result.log_prob - data.log_prob(x, sde, sde.t_min)).square().mean())

    assert variance(True) < variance(False) / 8


def test_orthogonal_signs_of_successive_nodes_are_orthogonal_and_each_is_unbiased():
    probes = Hutchinson(1, "orthogonal", Pixel()).probes(torch.zeros(4000, 8), seeded())
    rows = torch.stack([probes()[0] for _ in range(8)])  # [8 nodes, B, 8]
    assert set(rows.unique().tolist()) == {-1.0, 1.0}
    gram = torch.einsum("nbd,mbd->bnm", rows, rows)
    assert_close(gram, 8 * torch.eye(8).expand(4000, 8, 8))
    second = torch.einsum("bd,be->de", rows[3], rows[3]) / 4000
    assert_close(second, torch.eye(8), rtol=0, atol=5 / 4000**0.5)


@pytest.mark.parametrize("shape", [(6,), (3, 5), (1, 4, 6), (3, 4, 4), (1, 2, 3, 4)])
def test_bases_are_orthonormal(shape):
    size = math.prod(shape)
    data = torch.randn(4 * size, *shape, generator=seeded())
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    for basis in (Pixel(), Cosine(len(shape)), Principal.of(data)):
        q = basis.to_data(eye).reshape(size, size)
        assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_principal_axes_are_those_of_the_data_and_leave_no_noise_for_a_gaussian():
    sde, data = VPSDE(), correlated(12)
    axes = Principal.of(data.sample(200_000, generator=seeded()))
    overlap = (axes.axes.T @ data.axes).abs().max(1).values
    assert float(overlap.min()) > 0.98
    exact = Principal(data.axes)
    result = log_likelihood(
        exact_flow(sde, data), noised(data, sde, 8), divergence=Hutchinson(2, basis=exact)
    )
    assert float(result.standard_error.max()) < 1e-3


def test_the_pilot_chooses_the_basis_in_which_probes_say_most():
    sde = VPSDE()
    cosines = Cosine(3).to_data(torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8))
    q = cosines.reshape(64, 64)
    variances = torch.logspace(0, -3, 64, dtype=torch.float64)
    smooth = Gaussian(torch.zeros(1, 8, 8), covariance=q.T @ torch.diag(variances) @ q)
    rough = Gaussian(torch.zeros(1, 8, 8), variances.sqrt().reshape(1, 8, 8))
    for data, basis in ((smooth, Cosine(3)), (rough, Pixel())):
        pilot = Pilot.of(
            probability_flow(sde, data.score(sde)), torch.zeros(1, 1, 8, 8), Hutchinson()
        )
        assert pilot.divergence.basis == basis


def test_the_pilot_finds_the_range_of_scales_and_puts_the_nodes_there():
    sde = VPSDE()
    data = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.05)
    pilot = Pilot.of(probability_flow(sde, data.score(sde)), torch.zeros(1, 2), Exact())
    low, high = pilot.scales()
    # T = D rho² / (rho² + std²) is half a dimension of two at rho = std / sqrt(3)
    assert low == pytest.approx(math.log(0.05 / 3**0.5), abs=0.15)
    assert math.log(0.5) < high < math.log(3.0)
    nodes = pilot.nodes(64)
    assert bool((nodes.diff() > 0).all())
    start, end = probability_flow(sde, data.score(sde)).clock_range()
    assert (float(nodes[0]), float(nodes[-1])) == (start, end)
    inside = ((nodes > low) & (nodes < high)).double().mean()
    assert float(inside) > 1.2 * (high - low) / (end - start)


def test_the_pilot_looks_at_no_sample_and_only_once():
    sde, data = VPSDE(), vectors()
    calls = []

    def score(x, t):
        calls.append(len(x))
        return data.score(sde)(x, t)

    flow = probability_flow(sde, score)
    first = log_likelihood(flow, noised(data, sde, 3), solver=FixedGrid(16))
    before = len(calls)
    second = log_likelihood(flow, noised(data, sde, 3, seed=9), solver=FixedGrid(16))
    assert calls.count(16) == 33 and len(calls) - before < before
    assert first.pilot_nfe == 33 * 16 + 1 and second.pilot_nfe == 1
    assert torch.equal(first.clock, second.clock)


def test_one_pilot_serves_every_number_of_probes_and_no_other_score():
    sde, data = VPSDE(), vectors()
    flow, x = exact_flow(sde, data), noised(data, sde, 2)
    first = log_likelihood(flow, x, divergence=Hutchinson(2), solver=FixedGrid(16))
    assert first.pilot_nfe == 33 * 16 + 1
    other = log_likelihood(flow, x, divergence=Hutchinson(5), solver=FixedGrid(16))
    assert other.pilot_nfe == 1
    wide = replace(flow, score=Gaussian(torch.zeros(24), 3.0).score(sde))
    again = log_likelihood(wide, x, divergence=Hutchinson(2), solver=FixedGrid(16))
    assert again.pilot_nfe == 33 * 16 + 1
    assert not torch.equal(again.clock, first.clock)


def test_probes_go_where_the_noise_is_and_their_number_stays():
    clock = torch.linspace(0, 1, 33, dtype=torch.float64)
    variance = 100 * torch.exp(-(((clock - 0.7) / 0.1) ** 2))
    pilot = Pilot(clock, clock, variance, 24, Hutchinson(), 0)
    nodes = torch.linspace(0, 1, 48, dtype=torch.float64)
    even = torch.ones(48, dtype=torch.float64)
    counts = torch.tensor(pilot.probes_at(nodes, even, 5))
    assert int(counts.sum()) == 5 * 48 and int(counts.min()) == 2
    assert abs(float(nodes[counts.argmax()]) - 0.7) < 0.05

    def total(k):
        return float((100 * torch.exp(-(((nodes - 0.7) / 0.1) ** 2)) / k).sum())

    assert total(counts) < 0.5 * total(torch.tensor(5))
    for i, j in ((33, 20), (20, 33), (33, 2), (30, 36)):  # no single move makes it better
        moved = counts.clone()
        moved[i] += 1
        moved[j] -= 1
        assert int(moved[j]) < 2 or total(moved) > total(counts) - 0.5
    heavy = torch.where(nodes < 0.5, 3.0, 1.0)  # the quadrature weights count as much as the noise
    flat = torch.tensor(
        Pilot(clock, clock, 1 + 0 * variance, 24, Hutchinson(), 0).probes_at(nodes, heavy, 8)
    )
    assert float(flat[nodes < 0.5].double().mean() / flat[nodes > 0.5].double().mean()) > 2.5
    quiet = Pilot(clock, clock, 0 * variance, 24, Hutchinson(), 0)
    assert quiet.probes_at(nodes, even, 3) == [3] * 48


def test_probes_that_are_allotted_have_less_noise_and_know_it():
    class Even(Hutchinson):
        @property
        def allots(self):
            return False

    sde, data = VPSDE(), correlated()
    flow, x = exact_flow(sde, data), noised(data, sde, 400)
    truth = data.log_prob(x.double(), sde, sde.t_min)
    squares = {}
    for kind in (Hutchinson, Even):
        result = log_likelihood(flow, x, divergence=kind(6), generator=seeded())
        assert result.passes == 6 * 64
        error = (result.log_prob.double() - truth).square()
        squares[kind] = float(error.mean())
        reported = float(result.standard_error.double().square().mean())
        assert abs(squares[kind] / reported - 1) < 5 * (2 / 400) ** 0.5
    assert squares[Hutchinson] < 0.9 * squares[Even]


@pytest.mark.parametrize("shape", [(24,), (1, 8, 8), (3, 8, 8), (2, 4, 4, 4), (1, 28, 28)])
@pytest.mark.parametrize("count", [2, 4, 8, 13])
def test_colours_share_out_a_sample_and_keep_their_points_apart(shape, count):
    masks = colours(shape, count)
    assert masks.shape == (count, *shape)
    assert_close(masks.sum(0), torch.ones(shape))
    sizes = masks.flatten(1).sum(1)
    assert float(sizes.max()) <= 2 * float(sizes.mean()) + 1
    for mask in masks:
        points = mask.nonzero().double()
        if len(points) > 1:
            near = torch.cdist(points, points).fill_diagonal_(math.inf).min()
            assert float(near) >= (2**0.5 if count > 2 and len(shape) > 1 else 1.4) - 1e-6


@pytest.mark.parametrize("basis", [Pixel(), Cosine(1)], ids=str)
@pytest.mark.parametrize(("num_probes", "tiles"), [(1, 4), (2, 4), (4, 2), (2, 5)])
def test_tiled_probes_are_unbiased_and_know_their_error(num_probes, tiles, basis):
    sde, data = VPSDE(), correlated()
    x = noised(data, sde, 600, seed=4)
    probes = Hutchinson(num_probes, basis=basis, tiles=tiles)
    result = log_likelihood(
        exact_flow(sde, data), x, divergence=probes, generator=seeded(5), solver=FixedGrid(48)
    )
    assert result.passes == 48 * num_probes * tiles and result.nfe == 48 + 25
    truth = data.log_prob(x.double(), sde, sde.t_min)
    error = result.log_prob.double() - truth
    assert abs(float(error.mean())) < 5 * float(error.std()) / 600**0.5 + 2e-3
    low, high = result.interval()
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    assert 0.92 <= covered <= 0.99


def test_tiles_leave_out_what_neighbours_have_in_common():
    sde = VPSDE()
    apart = (torch.arange(64)[:, None] - torch.arange(64)[None]).abs()
    data = Gaussian(torch.zeros(64), covariance=torch.exp(-apart / 1.5) + 0.05 * torch.eye(64))
    flow, x = exact_flow(sde, data), noised(data, sde, 300)
    truth = data.log_prob(x.double(), sde, sde.t_min)
    squares = {}
    for num_probes, tiles in ((8, 1), (1, 8)):
        probes = Hutchinson(num_probes, basis=Pixel(), tiles=tiles)
        result = log_likelihood(flow, x, divergence=probes, generator=seeded())
        assert result.passes == 8 * 64
        squares[tiles] = float((result.log_prob.double() - truth).square().mean())
    assert squares[8] < 0.5 * squares[1]
    with pytest.raises(ValueError, match="at most 64 tiles"):
        Hutchinson(tiles=65)


def test_rows_of_orthogonal_probes_come_from_all_over_the_matrix():
    x = torch.zeros(1, 1024)
    draw = Hutchinson(1, "orthogonal", Pixel()).probes(x, seeded())
    signs = torch.stack([draw()[0, 0] for _ in range(32)])  # [32, 1024]
    relative = signs * signs[0]
    for apart in (1, 2, 4, 16, 256, 512):  # columns that rows of low index would not tell apart
        same = (relative[:, 0] * relative[:, apart]).mean()
        assert abs(float(same)) <= 0.5, apart
    assert_close(signs @ signs.T, 1024 * torch.eye(32))


def test_the_variance_of_single_probes_counts_the_ends():
    nodes = torch.linspace(0, 1, 9, dtype=torch.float64)
    traces = torch.randn(9, 1, 20_000, generator=seeded(), dtype=torch.float64)
    for weights in (torch.eye(9)[0], torch.eye(9)[8], torch.eye(9)[1], torch.eye(9)[4]):
        variance, _ = Hutchinson(1).fresh_variance(traces, nodes, weights.double())
        assert float(variance.mean()) == pytest.approx(1.0, abs=0.05)
