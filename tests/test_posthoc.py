"""Averages put together after training are those that would have been kept, as far as stated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from experiment.averages import Average, Power
from experiment.posthoc import Kept, combined, norm_of, overlaps

STEPS, EVERY = 1600, 100
WIDTHS = (0.05, 0.1)
ALONG = [Kept(width, t) for t in range(EVERY, STEPS + 1, EVERY) for width in WIDTHS]


def profile(kept: Kept, tau: torch.Tensor) -> torch.Tensor:
    gamma = Power(kept.width).exponent
    inside = (gamma + 1) * (tau / kept.iteration) ** gamma / kept.iteration
    return torch.where(tau <= kept.iteration, inside, 0.0)


def path(columns: int = 4, steps: int = STEPS) -> torch.Tensor:
    """Weights [steps, columns] that drift, settle, oscillate and jitter, far from 0, float64."""
    n = torch.arange(1, steps + 1, dtype=torch.float64)[:, None]
    phase = torch.arange(columns, dtype=torch.float64)
    noise = torch.randn(steps, columns, generator=torch.Generator().manual_seed(0)).double()
    return 5 + 3 * torch.exp(-n / 200) + torch.sin(n / 90 + phase) + 0.3 * noise


def averages(widths, weights: torch.Tensor) -> dict[Kept, torch.Tensor]:
    """What the averages of training are after each iteration, by their own recurrence."""
    module = nn.Linear(weights.shape[1], 1, bias=False).double()
    kept = {width: Average(Power(width), module.parameters()) for width in widths}
    found = {}
    for iteration, row in enumerate(weights):
        with torch.no_grad():
            module.weight.copy_(row[None])
        for width, average in kept.items():
            average.update(list(module.parameters()), iteration)
            found[Kept(width, iteration + 1)] = average.weights[0][0].clone()
    return found


@pytest.mark.parametrize("first", [Kept(0.28, 300), Kept(0.1, 1000), Kept(0.02, 1000)])
@pytest.mark.parametrize("second", [Kept(0.28, 1000), Kept(0.05, 700)])
def test_overlaps_of_profiles_are_their_integrals(first, second):
    end = min(first.iteration, second.iteration)  # beyond it one of them is 0
    tau = torch.linspace(0, end, 400_001, dtype=torch.float64)
    wanted = torch.trapezoid(profile(first, tau) * profile(second, tau), tau)
    assert float(overlaps([first], [second])) == pytest.approx(float(wanted), rel=1e-4)


def test_a_profile_that_is_there_is_taken_alone_whatever_else_is_there():
    found = combined(ALONG, ALONG[7])
    assert found.error == 0 and found.coefficients.tolist() == [float(i == 7) for i in range(32)]


@pytest.mark.parametrize("wanted", [Kept(0.07, 1600), Kept(0.2, 900), Kept(0.02, 400)])
def test_the_error_is_the_distance_of_the_profiles_and_no_neighbour_is_nearer(wanted):
    found = combined(ALONG, wanted)
    assert float(found.coefficients.sum()) == pytest.approx(1, abs=1e-12)
    tau = torch.linspace(0, STEPS, 160_001, dtype=torch.float64)

    def distance(coefficients):
        mix = sum(c * profile(one, tau) for c, one in zip(coefficients, ALONG, strict=True))
        rest = torch.trapezoid((mix - profile(wanted, tau)) ** 2, tau).sqrt()
        return float(rest) / norm_of(wanted)

    # the trapezia smear the jump at the end of each profile over a step of 0.01
    assert distance(found.coefficients.tolist()) == pytest.approx(found.error, rel=0.02)
    generator = torch.Generator().manual_seed(0)
    gram, towards = overlaps(ALONG, ALONG), overlaps(ALONG, [wanted])[:, 0]
    for _ in range(20):
        aside = torch.randn(32, generator=generator).double() * 1e-3
        other = found.coefficients + aside - aside.mean()  # the sum stays 1
        square = other @ gram @ other - 2 * towards @ other + norm_of(wanted) ** 2
        assert float(square) > (found.error * norm_of(wanted)) ** 2


@pytest.mark.parametrize("wanted", [Kept(0.03, 1600), Kept(0.07, 1600), Kept(0.15, 800)])
def test_an_unseen_width_is_the_average_kept_directly_within_the_stated_error(wanted):
    weights = path()
    direct = averages([wanted.width, *WIDTHS], weights)
    found = combined(ALONG, wanted)
    stored = torch.stack([direct[kept] for kept in ALONG])
    bound = found.error * norm_of(wanted) * math.sqrt(STEPS) * weights.std(0, correction=0)
    error = (found.coefficients @ stored - direct[wanted]).abs()
    assert bool((error <= bound + 1e-10).all()), (error / bound).tolist()
    # and the bound says something: other widths are further off
    assert bool(((direct[Kept(0.1, wanted.iteration)] - direct[wanted]).abs() > error).all())


def test_weights_that_stand_still_come_out_as_they_are():
    for width in (0.01, 0.03, 0.28):
        found = combined(ALONG[:4], Kept(width, 180))
        assert float((found.coefficients * 7.0).sum()) == pytest.approx(7.0, abs=1e-11)


def test_more_snapshots_come_nearer_and_many_stay_well_conditioned():
    errors = []
    for every in (400, 200, 100, 25, 5):
        along = [Kept(w, t) for t in range(every, STEPS + 1, every) for w in WIDTHS]
        found = combined(along, Kept(0.07, STEPS))
        errors.append(found.error)
        assert float(found.coefficients.abs().sum()) < 2
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
