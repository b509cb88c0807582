"""The conformance check of a likelihood: a part that breaks a claim is told which, and where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from likelihood import Adaptive, Exact, FixedGrid, Hutchinson
from likelihood.checks import check_likelihood
from likelihood.divergence import Spread
from sde_lib import EDMSDE, SubVPSDE
from sde_lib.checks import ConformanceError

GRID, COARSE = FixedGrid(32, halve=False), FixedGrid(16, halve=False)


@pytest.mark.parametrize(
    ("solver", "divergence", "sde", "tolerance"),
    [
        (None, None, None, 0.01),
        (GRID, Hutchinson(), EDMSDE(), 0.01),
        (replace(GRID, fresh=False), Hutchinson(2, "gaussian"), SubVPSDE(), 0.01),
        (Adaptive(3e-4, 3e-4), Hutchinson(), None, 0.1),
    ],
    ids=str,
)
def test_what_is_built_in_passes(solver, divergence, sde, tolerance):
    check_likelihood(solver, divergence, sde, tolerance=tolerance)


def test_a_cautious_estimator_passes_where_it_says_that_it_is_cautious():
    orthogonal = Hutchinson(2, "orthogonal")
    with pytest.raises(ConformanceError, match="standard_error .* is not that of the errors"):
        check_likelihood(COARSE, orthogonal, tolerance=0.1)
    check_likelihood(COARSE, orthogonal, tolerance=0.1, cautious=True)


def test_a_coarse_solver_passes_at_the_tolerance_it_is_meant_for():
    with pytest.raises(ConformanceError, match="should be .*; off by .*, allowed 0.01"):
        check_likelihood(COARSE)
    check_likelihood(COARSE, tolerance=0.5)


class Broken(FixedGrid):
    """A fixed grid whose path is changed afterwards."""

    def __init__(self):
        super().__init__(16, halve=False)

    def __repr__(self):
        return type(self).__name__ + "()"

    def solve(self, flow, x, divergence, generator, *, differentiable):
        path = super().solve(flow, x, divergence, generator, differentiable=differentiable)
        return self.changed(path, x)

    def changed(self, path, x):
        return path


class WrongSign(Broken):
    """Takes the volume for its inverse."""

    def changed(self, path, x):
        return replace(path, volume=-path.volume)


class WithoutEnd(Broken):
    """Stops a little early."""

    def changed(self, path, x):
        return replace(path, z=0.8 * path.z)


class TooSure(Broken):
    """Reports half of the standard error."""

    def changed(self, path, x):
        return replace(path, spread=Spread(path.spread.variance / 4, path.spread.freedom))


class NeverSure(Broken):
    """Reports one and a half times the standard error."""

    def changed(self, path, x):
        return replace(path, spread=Spread(path.spread.variance * 2.25, path.spread.freedom))


class OneTooFew(Broken):
    """Does not count the first evaluation."""

    def changed(self, path, x):
        return replace(path, nfe=path.nfe - 1)


class HiddenPilot(Broken):
    """Keeps quiet about what finding the nodes took."""

    def changed(self, path, x):
        return replace(path, pilot_nfe=0)


class ForwardOnly(Broken):
    """Reports a backward pass for every forward one, whatever the divergence."""

    def changed(self, path, x):
        return replace(path, passes=path.nfe)


class Deaf(Broken):
    """Makes numbers of NaN."""

    def changed(self, path, x):
        parts = {name: getattr(path, name).nan_to_num() for name in ("z", "volume", "trace")}
        return replace(path, **parts)


class Placeless(Broken):
    """Does not say where it was."""

    def changed(self, path, x):
        return replace(path, clock=path.clock[:0], trace=path.trace[:0])


class WrongEnd(Broken):
    """Hands over the noise of t_max for that of t_min."""

    def changed(self, path, x):
        return replace(path, first=path.last)


class Destructive(Broken):
    """Works in the caller's memory."""

    def changed(self, path, x):
        x.mul_(2)
        return path


class Social(Broken):
    """Looks at the batch mean."""

    def changed(self, path, x):
        return replace(path, volume=path.volume + x.flatten(1).sum(1).mean())


class Unseeded(Broken):
    """Takes probes from elsewhere."""

    def solve(self, flow, x, divergence, generator, *, differentiable):
        return super().solve(flow, x, divergence, None, differentiable=differentiable)


class OneSeed(Broken):
    """Takes the same probes every time."""

    def solve(self, flow, x, divergence, generator, *, differentiable):
        generator = torch.Generator().manual_seed(0)
        return super().solve(flow, x, divergence, generator, differentiable=differentiable)


@pytest.mark.parametrize(
    ("wrong", "divergence", "message"),
    [
        (WrongSign, Exact(), "log_prob on a Gaussian with full covariance, from the closed form"),
        (WrongSign, Hutchinson(), "the error of log_prob on a Gaussian .* the mean of 400 is"),
        (WithoutEnd, Exact(), "the latent of a Gaussian, from the closed-form flow: for sample"),
        (TooSure, Hutchinson(), "standard_error on a Gaussian .* is not that of the errors"),
        (NeverSure, Hutchinson(), "standard_error on a Gaussian .* is not that of the errors"),
        (OneTooFew, Exact(), r"nfe should be the forward passes .* saw 673 samples, .* makes 664"),
        (HiddenPilot, Exact(), "nfe should be the forward passes .* pilot_nfe=1 makes 145"),
        (
            ForwardOnly,
            Exact(),
            "passes should be the backward .* 16 evaluations .* 5 times each .* got passes=16",
        ),
        (Deaf, Exact(), "a score of NaN above t=.* should end in a SamplingError .* got a result"),
        (Placeless, Exact(), "should end in a SamplingError that says where, as .* it said: log_"),
        (WrongEnd, Exact(), "truncation, what log p is short of t = 0, on a Gaussian"),
        (Destructive, Exact(), "the input should not be modified; x, torch.float32, was written"),
        (Social, Exact(), "sample i should depend on seed i alone; log_prob in a batch of one"),
        (Unseeded, Hutchinson(), "the same generator seed should give the same bits; .* log_prob"),
        (OneSeed, Hutchinson(), "another generator seed should give other probes"),
    ],
)
def test_a_wrong_solver_is_refused_with_the_right_sentence(wrong, divergence, message):
    with pytest.raises(ConformanceError, match=rf"^{wrong.__name__}\(\) with .*{message}"):
        check_likelihood(wrong(), divergence, tolerance=0.1)


class LoudProbes(Hutchinson):
    """Probes of variance 1.44."""

    def probes(self, x, generator=None):
        source = super().probes(x, generator)
        return lambda: 1.2 * source()


class SureOfOne(Hutchinson):
    """The variance of one probe's estimate over four times their number."""

    def kept_variance(self, estimates):
        spread = super().kept_variance(estimates)
        return Spread(spread.variance / 4, spread.freedom)


class SureOfAll(Hutchinson):
    """The same for fresh probes."""

    def fresh_variance(self, traces, nodes, weights):
        spread = super().fresh_variance(traces, nodes, weights)
        return Spread(spread.variance / 4, spread.freedom)


class Untold(Hutchinson):
    """Does not count its last backward pass."""

    def passes(self, x):
        return self.num_probes - 1


class LastOneMissing(Exact):
    """Leaves out the last dimension."""

    def traces(self, value, x, probes, *, create_graph):
        inner = torch.ones_like(value)
        inner.flatten(1)[:, -1] = 0
        return super().traces(value * inner, x, probes, create_graph=create_graph)


class Littering(Exact):
    """Leaves gradients on the parameters."""

    def traces(self, value, x, probes, *, create_graph):
        total = super().traces(value, x, probes, create_graph=create_graph)
        value.sum().backward()
        return total


class Rounding(Exact):
    """Changes the field that it differentiates."""

    def __call__(self, function, x, probes, *, create_graph=False):
        value, traces = super().__call__(function, x, probes, create_graph=create_graph)
        return value.bfloat16().to(value), traces


class Modest(Exact):
    """Claims an error where there is none."""

    def fresh_variance(self, traces, nodes, weights):
        spread = super().fresh_variance(traces, nodes, weights)
        return Spread(spread.variance + 1e-6, spread.freedom)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (LoudProbes, "the divergence of a linear field A x, tr A: the mean of 400 is"),
        (SureOfOne, "kept_variance of the divergence of a linear field .* that of the errors"),
        (SureOfAll, "standard_error on a Gaussian .* is not that of the errors"),
        (
            Untold,
            "passes should be the backward .* 1 times each .* and 32 gradients .* passes=16",
        ),
        (LastOneMissing, "the divergence of a linear field A x, tr A: for sample"),
        (Littering, "no gradient should be left behind .* the parameters of the score function"),
        (Rounding, "the value of a linear field A x: for sample"),
        (Modest, "standard_error, where nothing is random, on a Gaussian .* should be 0; off by"),
    ],
)
def test_a_wrong_divergence_is_refused_with_the_right_sentence(wrong, message):
    with pytest.raises(ConformanceError, match=rf"with {wrong.__name__}\(.*{message}"):
        check_likelihood(COARSE, wrong(), tolerance=0.1)


def test_numbers_that_mean_nothing_are_refused():
    for name, value in (("samples", 99), ("tolerance", 0.0), ("seed", -1), ("cautious", 1)):
        with pytest.raises(ValueError, match=f"check_likelihood needs {name}"):
            check_likelihood(**{name: value})
