"""Noise along one path: the same at every number of steps, and white to any one sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import SDE, VPSDE, BrownianPaths, PerSample
from sde_lib.grids import Karras, UniformLogSNR
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.philox import Philox, normal
from sde_lib.reverse_variance import AnalyticVariance
from sde_lib.samplers import (
    DDIM,
    DEIS,
    Ancestral,
    AnnealedLangevin,
    DPMSolverPP,
    EulerMaruyama,
    ReverseDiffusion,
    Sampler,
    TorchSDE,
)

Make = Callable[[int], Sampler]


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [  # known answers, as published with the generator
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_known_answers(counter, key, wanted) -> None:  # noqa: ANN001
    (a, c), (b, d) = Philox(words(*key))(words(*counter))
    assert tuple(int(word) for word in (a, b, c, d)) == wanted


def test_its_normal_numbers_are_normal_and_independent() -> None:
    n = 50_000
    counter = (torch.arange(n), *words(0, 0, 0))
    z = normal(counter, Philox(words(1, 2))).double().flatten().sort().values
    distribution = torch.distributions.Normal(torch.zeros((), dtype=z.dtype), 1.0).cdf(z)

    steps = torch.arange(1, len(z) + 1, dtype=z.dtype) / len(z)
    distance = float((steps - distribution).abs().max())  # Kolmogorov and Smirnov
    assert distance < 1.95 / math.sqrt(len(z))  # 0.1 %

    columns = normal(counter, Philox(words(1, 2))).numpy()
    correlations = np.corrcoef(columns.T) - np.eye(4)
    assert np.abs(correlations).max() < 5 / math.sqrt(n)


def increments(paths: PerSample, x: Tensor, clocks: list[float]) -> Tensor:
    """Increments of W itself over the steps, [steps, B, ...]."""
    steps = pairwise(clocks)
    return torch.stack([paths.over(x, a, b)() * math.sqrt(a - b) for a, b in steps])


def even(steps: int, start: float = 4.0, end: float = -7.5) -> list[float]:
    """Ends of steps, which are free of rounding if the steps are a multiple of 2^-10."""
    return torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()


@pytest.mark.parametrize("shape", [(2,), (3, 5, 7)])
def test_coarse_steps_are_the_sums_of_fine_ones(shape: tuple[int, ...]) -> None:
    x, paths = torch.zeros(3, *shape, dtype=torch.float64), BrownianPaths([5, 6, 7])

    fine = increments(paths, x, even(92))  # eighths

    for every in (1, 4, 23, 92):
        coarse = increments(BrownianPaths([5, 6, 7]), x, even(92)[::every])
        assert_close(coarse, fine.reshape(-1, every, 3, *shape).sum(1))


def test_steps_in_any_order_see_the_same_path() -> None:
    x, paths = torch.zeros(2, 3, dtype=torch.float64), BrownianPaths([1, 2])
    spans = [(1.5, 0.2), (-3.0, -3.7), (1.5, 0.2), (0.2, -0.01), (4.0, -7.0)]

    seen = [paths.over(x, *span)() for span in spans]

    assert torch.equal(seen[0], seen[2])
    for (start, end), drawn in zip(spans, seen, strict=True):
        assert_close(drawn, BrownianPaths([1, 2]).over(x, start, end)())


@pytest.mark.parametrize("clocks", [even(50), even(7, 1.0, -1.0), even(400)], ids=len)
def test_increments_of_one_sampler_are_white_noise(clocks: list[float]) -> None:
    x = torch.zeros(120, 4, dtype=torch.float64)

    z = torch.stack([BrownianPaths(range(120)).over(x, a, b)() for a, b in pairwise(clocks)])

    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    for lag in (1, 2):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / math.sqrt(n - lag * 480)
    between = (z[:, 1:] * z[:, :-1]).mean(), (z[..., 1:] * z[..., :-1]).mean()
    assert max(abs(float(c)) for c in between) < 5 / math.sqrt(0.7 * n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)


def test_path_i_depends_on_seed_i_alone() -> None:
    both = increments(BrownianPaths([3, 8]), torch.zeros(2, 6), even(9))
    alone = increments(BrownianPaths([8]), torch.zeros(1, 6), even(9))

    assert torch.equal(both[:, 1:], alone)
    assert not torch.equal(both[:, :1], alone)


def test_some_rows_keep_their_paths() -> None:
    x = torch.zeros(3, 6)
    whole = BrownianPaths([3, 8, 5]).over(x, 1.0, 0.3)()

    some = BrownianPaths([3, 8, 5]).select([2, 1]).over(x[:2], 1.0, 0.3)()

    assert torch.equal(some, whole[[2, 1]])


def test_a_second_number_in_a_step_and_steps_upwards_are_fresh() -> None:
    x, paths = torch.zeros(1, 4), BrownianPaths([0])
    noise = paths.over(x, 1.0, 0.0)
    drawn = [noise(), noise(), paths.over(x, 0.0, 1.0)(), paths.over(x, 0.5, 0.5)()]

    assert len(torch.cat(drawn).unique()) == 16
    assert torch.equal(drawn[0], paths.over(x, 1.0, 0.0)())


CLOCK = torch.linspace(-8, 6, 500, dtype=torch.float64)
ANALYTIC = AnalyticVariance(CLOCK, 0.64 / (0.64 + (2 * CLOCK).exp()), 1.0)  # of N(m, 0.8²)

STRONG = {
    "euler_maruyama": partial(EulerMaruyama, grid=UniformLogSNR()),
    "euler_maruyama_half": partial(EulerMaruyama, eta=0.5, grid=UniformLogSNR()),
    "reverse_diffusion": partial(ReverseDiffusion, grid=UniformLogSNR()),
    "ancestral": partial(Ancestral, grid=UniformLogSNR()),
    "ancestral_beyond": partial(Ancestral, eta=1.3, grid=UniformLogSNR()),
    "sde_dpmpp_1": partial(DPMSolverPP, order=1, eta=1.0),
    "sde_dpmpp_2m": partial(DPMSolverPP, order=2, eta=1.0),
    "deis_2": partial(DEIS, order=2, eta=1.0),
    "analytic_ddpm": partial(Ancestral, variance=ANALYTIC, grid=UniformLogSNR()),
    "torchsde": TorchSDE,
}


TARGETS = {
    "gaussian": Gaussian(torch.full((2,), 0.5, dtype=torch.float64), 0.8),
    "mixture": GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]).double(), 0.6),
}


def followed(sampler: Sampler, data: Gaussian | GaussianMixture) -> Tensor:
    """Where 60 seeds end."""
    sde, seeds = VPSDE(t_min=1e-2), range(60)
    x = sde.prior_sample((60, 2), generator=PerSample(seeds), dtype=torch.float64)
    return sampler(data.score(sde), sde, x, generator=BrownianPaths(seeds))


@cache
def truth(target: str, eta: float) -> Tensor:
    return followed(DPMSolverPP(1000, order=2, eta=eta), TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", STRONG.values(), ids=STRONG.keys())
def test_stochastic_samplers_converge_strongly_at_order_one(make: Make, target: str) -> None:
    """The noise does not depend on the state, so that even Euler-Maruyama is of order one."""
    steps, wanted = (20, 40, 80, 160), truth(target, getattr(make(1), "eta", 1.0))

    ends = [followed(make(n), TARGETS[target]) for n in steps]

    errors = [float((end - wanted).abs().mean()) for end in ends]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(1.0, abs=0.2)
    assert errors[-1] < 0.04  # the same path, not only the same law


def test_analytic_ddim_comes_near_the_flow_by_the_root_of_a_step() -> None:
    """Its noise has variance c² rho² u = O(h²) a step, over 1 / h independent steps."""
    steps, wanted = (25, 100, 400), truth("gaussian", 0.0)
    make = partial(DDIM, variance=ANALYTIC, grid=UniformLogSNR())

    ends = [followed(make(n), TARGETS["gaussian"]) for n in steps]

    errors = [float((end - wanted).square().mean().sqrt()) for end in ends]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("streams", [PerSample, BrownianPaths])
@pytest.mark.parametrize(
    "make",
    [
        DDIM,
        Ancestral,
        partial(AnnealedLangevin, inner_steps=20, step_size=0.05),
        TorchSDE,
    ],
    ids=["ddim", "ancestral", "langevin", "torchsde"],
)
def test_temperature_is_the_power_of_a_gaussian_density(
    make: Make, streams: type[PerSample], temperature: float, sde: SDE
) -> None:
    """p^(1/T) of N(0, s²) is N(0, T s²); steps and data are as linear as that."""
    data, seeds = Gaussian(torch.zeros(1), 0.8), range(40)

    def variance(temperature: float) -> float:
        source = streams(seeds, temperature=temperature)
        x = sde.prior_sample((40, 1), generator=source, dtype=torch.float64)
        return float(make(20)(data.score(sde), sde, x, generator=source).var())

    assert variance(temperature) == pytest.approx(temperature * variance(1.0))


@pytest.mark.parametrize("streams", [PerSample, BrownianPaths])
def test_temperature_reaches_the_noise_of_srk(streams: type[PerSample]) -> None:
    """Its steps hold squares of the noise, which vanish with the step."""
    sde, data = VPSDE(), Gaussian(torch.zeros(1), 0.8)

    def variance(temperature: float) -> float:
        source = streams(range(40), temperature=temperature)
        x = sde.prior_sample((40, 1), generator=source, dtype=torch.float64)
        sampler = TorchSDE(40, method="srk")
        return float(sampler(data.score(sde), sde, x, generator=source).var())

    assert variance(0.25) == pytest.approx(0.25 * variance(1.0), rel=0.1)


def test_a_path_is_followed_on_other_grids(mixture: GaussianMixture) -> None:
    sde, seeds = VPSDE(), range(50)
    x = sde.prior_sample((50, 2), generator=PerSample(seeds), dtype=torch.float64)

    ends = [
        Ancestral(300, grid=grid)(mixture.score(sde), sde, x, generator=BrownianPaths(seeds))
        for grid in (UniformLogSNR(), Karras())
    ]
    other = Ancestral(300)(mixture.score(sde), sde, x, generator=BrownianPaths(range(50, 100)))

    near = float((ends[0] - ends[1]).abs().mean())
    assert near < 0.1 * float((ends[0] - other).abs().mean())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, "warm"])
def test_impossible_temperatures_are_refused(temperature) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="needs temperature to be a finite number > 0; got"):
        PerSample([0], temperature=temperature)


def test_a_path_of_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="one seed a sample: got 2 seeds for a batch of 3"):
        BrownianPaths([0, 1]).over(torch.zeros(3, 2), 1.0, 0.0)()
