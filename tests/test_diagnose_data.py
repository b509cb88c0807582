"""What mode=diagnose counts and measures on data, held to brute force and closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from experiment.data import Dataset
from experiment.diagnosis.advice import about_values, data_levels
from experiment.diagnosis.facts import Lattice, lattice
from experiment.diagnosis.levels import gaussian_curve
from experiment.diagnosis.probes import bases
from experiment.diagnosis.samples import Part
from experiment.diagnosis.seen import Seen
from experiment.diagnosis.spectrum import Spectrum, coordinates, principal_axes
from experiment.diagnosis.spread import PriorFit, largest_distance
from likelihood.basis import cosines
from sde_lib.oracles import GaussianMixture


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seen_of(train: torch.Tensor, test: torch.Tensor, scan: int = 10**6, **more: object) -> Seen:
    return Seen.of(Dataset("own", train, test, **more), {}, scan, 4096, 0)


class Lazy:
    """Samples read as they are asked for: slices and index tensors alone."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.read = values, 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        assert type(index) in (slice, torch.Tensor)
        found = self.values[index]
        self.read += len(found)
        return found


def test_a_part_reads_every_sample_once_in_order_or_a_random_choice(monkeypatch) -> None:
    monkeypatch.setattr("experiment.diagnosis.samples.BLOCK", 30)
    values = normal(23, 3)
    whole = Part("train", Lazy(values), (3,), 100)
    assert_close(torch.cat(list(whole.blocks())), values)
    assert whole.samples.read == 23
    some = Part("train", Lazy(values), (3,), 7)
    chosen = torch.cat(list(some.blocks()))
    assert len(some) == len(chosen) == 7 and some.samples.read == 7
    assert_close(chosen, values[some.index()])
    assert not torch.equal(some.index(), torch.arange(7)), "the first are no random choice"


@pytest.mark.parametrize("dims", [1, 3, 40])
def test_the_largest_and_the_nearest_distance_are_those_of_brute_force(dims) -> None:
    seen = seen_of(normal(300, dims), normal(5, dims))
    x = seen.units.encode(seen.data.train).double()
    all_pairs = (x[:, None] - x[None]).norm(dim=2)
    assert seen.reach.low == seen.reach.high == pytest.approx(float(all_pairs.max()), rel=1e-6)
    all_pairs.fill_diagonal_(math.inf)
    chosen = torch.linspace(0, 299, 256).long()
    assert seen.nearest == pytest.approx(float(all_pairs[chosen].amin(1).median()), rel=1e-6)


def test_bounds_hold_the_largest_distance_where_pairs_are_too_many() -> None:
    seen = seen_of(normal(400, 30), normal(5, 30))
    truth = float(torch.pdist(seen.units.encode(seen.data.train).double()).max())
    reach = largest_distance(seen.train, seen.centres, seen.coordinates, seen.radii, most=10)
    assert reach.low <= truth * (1 + 1e-9) and truth < reach.high
    assert reach.low > 0.9 * truth


def test_the_spectrum_is_that_of_the_data_and_honest_about_few_samples() -> None:
    stds = torch.tensor([2.0, 0.5, 0.1], dtype=torch.float64)
    turn = torch.linalg.qr(normal(3, 3, seed=1, dtype=torch.float64)).Q
    n = 20_000
    known = Spectrum.of(1.5 + stds * normal(n, 3, dtype=torch.float64) @ turn)
    mean, variances = known.mean, known.variances
    assert len(variances) == 3, "all axes are known"
    found = variances.sort(descending=True).values.sqrt()
    # a variance of n/2 samples is good to sqrt(4/n), the axes' slant is of second order
    assert bool(((found / stds - 1).abs() < 5 * math.sqrt(1 / n) + 1e-3).all())
    assert bool(((mean - 1.5).abs() < 5 * 2 / math.sqrt(n)).all())
    few = normal(80, 64, dtype=torch.float64)
    known = Spectrum.of(few)
    # a chi squared of 40: below 0.25 of its mean once in 10^9; eigenvalues of 40 samples are 0
    assert float(known.variances.min()) > 0.25
    total = (few - few.mean(0)).square().sum(1)[1::2].mean() * 80 / 79
    assert float((known.shares * known.variances).sum()) == pytest.approx(float(total))
    assert float(known.shares.sum()) == pytest.approx(64)


def test_the_directions_of_few_samples_are_a_tight_frame() -> None:
    x, y = normal(30, 50, dtype=torch.float64), normal(8, 50, seed=1, dtype=torch.float64)
    known = Spectrum.of(x * torch.linspace(0.01, 1, 50, dtype=torch.float64))
    assert known.axes.shape[1] < 50 and len(known.shares) == known.axes.shape[1] + 50
    along = coordinates(known.axes, y)
    assert_close(along.square().sum(1), y.square().sum(1))
    directions = coordinates(known.axes, torch.eye(50, dtype=torch.float64))  # [D, R]
    assert_close(directions.square().sum(0), known.shares)
    assert_close(directions @ directions.mT, torch.eye(50, dtype=torch.float64))


@pytest.mark.parametrize("count", [0, 3, 9, 12])
def test_any_directions_bound_what_the_covariance_decides(count) -> None:
    root = torch.linalg.qr(normal(12, 12, dtype=torch.float64)).Q
    exact = torch.logspace(-3, 1, 12, dtype=torch.float64)
    x = math.sqrt(12) * exact.sqrt()[:, None] * root  # rows whose mean square is the covariance
    axes = torch.linalg.qr(normal(12, 12, seed=1, dtype=torch.float64)).Q[:, :count]
    bound = Spectrum.along(torch.zeros(12).double(), axes, x)
    assert bound.log_determinant() > float(exact.log().sum())
    clock = torch.linspace(-6, 3, 10, dtype=torch.float64)
    error = gaussian_curve(bound.variances, clock, bound.shares).error
    assert bool((error >= gaussian_curve(exact, clock).error).all())
    low, known = PriorFit(bound.mean, bound.variances, bound.shares), PriorFit(bound.mean, exact)
    assert all(low.low(rho) <= known.low(rho) for rho in (0.1, 1.0, 10.0))
    assert low.high(1.0) == pytest.approx(known.high(1.0)), "the power is the same"


def test_coordinates_that_never_change_have_no_variance_and_turn_no_axis() -> None:
    stds = torch.tensor([0.0] * 20 + [1e-3] * 20 + [10.0], dtype=torch.float64)
    x = stds * normal(24, 41, dtype=torch.float64)
    axes = principal_axes(x)  # 24 of them, 3 beyond the rank
    assert float(axes[-1, 0].abs()) == pytest.approx(1, abs=1e-6), "the largest is the first"
    known = Spectrum.of(x)
    square = (known.shares * known.variances.clamp(max=1)).sum()
    # 20 variances of 1e-6, each a chi squared of 12: the sum is good to sqrt(2/12/20)
    assert float(square - 1) == pytest.approx(20e-6, rel=5 * math.sqrt(1 / 120))


def test_principal_axes_are_orthonormal_and_hold_the_samples_of_either_shape() -> None:
    for shape in ((50, 6), (6, 50), (1, 4)):
        x = normal(*shape, dtype=torch.float64)
        axes = principal_axes(x)
        assert_close(axes.mT @ axes, torch.eye(axes.shape[1], dtype=torch.float64))
        assert_close(x @ axes @ axes.mT, x)


def test_the_fit_of_a_prior_is_exact_for_a_gaussian() -> None:
    mean, variances = torch.tensor([0.3, -1.0]).double(), torch.tensor([1.0, 0.2]).double()
    fit, rho = PriorFit(mean, variances), 2.5
    noised = torch.distributions.Normal(mean, (variances + rho**2).sqrt())
    prior = torch.distributions.Normal(torch.zeros(2).double(), rho)
    exact = float(torch.distributions.kl_divergence(noised, prior).mean())
    assert fit.low(rho) == pytest.approx(exact, rel=1e-9) and exact < fit.high(rho)
    assert fit.low(fit.matched(1e-3)) == pytest.approx(1e-3, rel=1e-6)


def test_the_fit_of_a_prior_is_bounded_for_two_points() -> None:
    data, rho = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.0), 0.8
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    noised = GaussianMixture(data.means, rho).log_prob(x)
    prior = torch.distributions.Normal(0.0, rho).log_prob(x[:, 0])
    exact = float(torch.trapezoid(noised.exp() * (noised - prior), x[:, 0]))
    fit = PriorFit(torch.zeros(1).double(), torch.ones(1).double())
    assert fit.low(rho) < exact < fit.high(rho)


def test_what_is_counted() -> None:
    train = normal(50, 1, 4, 4)
    train[:, 0, 0, 0] = 3.0
    train[7] = train[3]
    train[9] *= 100
    train[9, 0, 0, 0] = 3.0
    test = torch.cat([normal(4, 1, 4, 4, seed=2), train[:2]])
    facts = seen_of(train, test).facts
    assert (facts.twice, facts.leaked, facts.constant) == (1, 2, 1)
    assert (facts.farthest, facts.far) == (9, 1) and facts.farthest_z > 50
    z = ((train - train.mean(0)).abs() / train.std(0, correction=0)).flatten(1)[:, 1:]
    assert facts.largest_z == pytest.approx(float(z.max()), rel=1e-4)
    assert facts.classes is None and facts.sizes == {"train": 50, "test": 6}


def test_classes_are_counted_where_there_are_any() -> None:
    @dataclass(frozen=True)
    class Classes:
        count: int

    data = Dataset("own", normal(6, 2), normal(2, 2))
    object.__setattr__(data, "cond", Classes(4))
    object.__setattr__(data, "train_cond", torch.tensor([0, 1, 1, 3, 3, 3]))
    assert Seen.of(data, {}, 100, 100, 0).facts.classes == [1, 2, 0, 3]


def part(values: torch.Tensor) -> Part:
    return Part("train", values, tuple(values.shape[1:]), 10**6)


def test_values_on_steps_are_told_from_continuous_ones() -> None:
    whole = torch.randint(0, 256, (200, 8), generator=torch.Generator().manual_seed(0))
    scaled = lattice(part(2 * whole.float() / 255 - 1))
    assert scaled.levels == 256 and scaled.step == pytest.approx(2 / 255, rel=1e-4)
    fine = torch.randint(0, 4096, (30_000, 8), generator=torch.Generator().manual_seed(0))
    assert lattice(part(fine.float() / 4095)).levels == 4096
    assert lattice(part(normal(200, 8))).step is None
    assert lattice(part(torch.tensor([[0.0, 1.0], [0.5, 0.25]]))).step is None, "too few to tell"
    uneven = torch.tensor([0.0, 1.0, math.pi]).repeat(20, 1)
    assert lattice(part(uneven)).step is None


def test_gaps_between_levels_and_levels_that_are_not_used_are_told() -> None:
    even = 4 * torch.randint(0, 16, (100, 8), generator=torch.Generator().manual_seed(0))
    even[0, 0], even[0, 1], even[0, 2] = 0, 60, 4
    seen = seen_of(even.to(torch.uint8), even[:9].to(torch.uint8), levels=256)
    assert "only every 4th" in about_values(seen.facts, seen.values)[0]
    (advice,) = data_levels({"levels": None}, seen.facts, seen.values)
    assert advice.override == "data.levels=61" and not advice.fits
    part_of_it = seen_of(even.to(torch.uint8), even[:9].to(torch.uint8), scan=50, levels=256)
    assert not list(data_levels({"levels": None}, part_of_it.facts, part_of_it.values))
    assert not list(data_levels({}, seen.facts, seen.values)), "there is nothing to set"


def test_floats_on_steps_are_told_how_to_become_levels() -> None:
    values = torch.randint(0, 17, (100, 8), generator=torch.Generator().manual_seed(0)) / 16
    seen = seen_of(values, values[:9])
    assert "levels=17" in about_values(seen.facts, seen.values)[0]
    many = Lattice(None, 0.0, 1.0, None)
    assert "65536" in about_values(seen.facts, many)[0]


def brute_force(x: torch.Tensor, columns: torch.Tensor, clock: torch.Tensor) -> float:
    """Integral of the variance of a sign probe in the basis of these ``columns``."""
    second = (x - x.mean(0))[1::2]
    covariance, one = second.T @ second / len(second), torch.eye(x.shape[1]).double()
    variance = []
    for u in clock.tolist():
        a = math.exp(2 * u) * torch.linalg.inv(covariance + math.exp(2 * u) * one)
        a = columns.T @ a @ columns
        variance.append(2 * float((a - a.diag().diag()).square().sum()))
    return float(torch.trapezoid(torch.tensor(variance).double(), clock))


def test_the_predicted_noise_of_probes_is_that_of_the_matrices() -> None:
    x = normal(400, 5, dtype=torch.float64) @ normal(5, 5, seed=3, dtype=torch.float64)
    clock = torch.linspace(-4, 4, 17, dtype=torch.float64)
    found = bases(x, (5,), clock)
    first = (x - x.mean(0))[::2]
    columns = {
        "pixel": torch.eye(5).double(),
        "cosine": cosines(5).T,
        "principal": torch.linalg.eigh(torch.cov(first.T)).eigenvectors,
    }
    for name, basis in columns.items():
        assert found.variance[name] == pytest.approx(brute_force(x, basis, clock), rel=1e-6)
    assert found.best == "principal"


def test_the_basis_in_which_the_data_are_independent_wins() -> None:
    clock = torch.linspace(-4, 4, 17, dtype=torch.float64)
    stds = torch.linspace(0.2, 3, 12, dtype=torch.float64)
    waves = (stds * normal(4000, 12, dtype=torch.float64)) @ cosines(12)
    found = bases(waves, (12,), clock)
    assert found.variance["cosine"] < 0.05 * found.variance["pixel"]
    assert found.off_diagonal["cosine"] < 0.05 < found.off_diagonal["pixel"]
    assert bases(normal(20, 1).double(), (1,), clock) is None
