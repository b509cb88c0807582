"""Conformance: what a solver and a divergence must hold, to be run on a subclass of your own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from likelihood.checked import check_kind
from likelihood.divergence import Divergence, Exact
from likelihood.ode import log_likelihood
from likelihood.result import LogLikelihood
from likelihood.solvers import FixedGrid, Solver
from sde_lib import validation
from sde_lib.checks import ConformanceError
from sde_lib.noise import Generator, PerSample
from sde_lib.oracles import Gaussian, GaussianMixture, Oracle
from sde_lib.processes import VPSDE
from sde_lib.reverse import ProbabilityFlow, Score
from sde_lib.samplers.base import SamplingError
from sde_lib.sde import SDE, expand_like

SIGMAS = 5  # standard errors that chance is allowed
FEW = 9  # samples where numbers of calls and not statistics are looked at
SHAPE = (2, 1, 3)


def check_likelihood(
    solver: Solver | None = None,
    divergence: Divergence | None = None,
    sde: SDE | None = None,
    *,
    samples: int = 400,
    tolerance: float = 1e-2,
    cautious: bool = False,
    seed: int = 0,
) -> None:
    r"""Check that a solver and a divergence give log-densities, on data where they are known.

    The divergence alone, of a linear field :math:`x \mapsto A x`: its value is the field, its
    estimates average to tr A, and the variance it reports of their mean is theirs.

    Then all of :func:`likelihood.log_likelihood`: results keep shape, dtype and device, the input
    is left alone, no gradient stays behind; the same seed gives the same bits and another one
    other probes; sample i depends on seed i alone; ``nfe``, ``passes`` and ``pilot_nfe`` are what
    the score function saw; a score of NaN ends in a :class:`SamplingError` that says where. On a
    Gaussian with full covariance, a mixture, and a mixture over several axes, log p is the
    closed form: exact with an exact divergence, whose standard error is zero; with probes, its
    mean within five standard errors and the squares of its errors those that ``standard_error``
    promises,

    .. math::  \left| \sum_{i=1}^n \left( e_i^2 - \mathrm{se}_i^2 \right) \right| \le
               5 \sqrt{\textstyle\sum_i (e_i^2 - \mathrm{se}_i^2 - \mathrm{mean})^2},

    where the right-hand side is :math:`5 \sqrt{2 n}\, \mathrm{se}^2` for normal errors of known
    size, the spread of a chi-square of n degrees. Latents are those of the closed-form flow.

    Args:
        solver: An instance of the class to check; :class:`likelihood.FixedGrid` if not given.
        divergence: An instance of the class to check; :class:`likelihood.Exact` if not given.
        sde: The process to check them on; VPSDE if not given.
        samples: n, at least 100: samples over which errors of probes are averaged.
        tolerance: Integration error allowed, in nats of log p and in standard deviations of the
            prior for the latent; raise it for a solver that is meant to be coarse.
        cautious: Let standard errors be too long, never too short: for an estimator that says so
            of itself, like orthogonal probes.
        seed: Of samples and probes.

    Raises:
        ConformanceError: With one sentence: what disagrees, where, by how much, and what it
            should be.
        ValueError: For numbers of samples or tolerances that mean nothing.
    """
    solver = FixedGrid() if solver is None else solver
    divergence = Exact() if divergence is None else divergence
    check_kind("check_likelihood", "solver", solver, Solver, "FixedGrid() or your own")
    check_kind("check_likelihood", "divergence", divergence, Divergence, "Exact() or your own")
    subject = _Subject(
        solver,
        divergence,
        VPSDE() if sde is None else sde,
        validation.count("check_likelihood", "samples", samples, at_least=100),
        validation.real("check_likelihood", "tolerance", tolerance, above=0),
        validation.flag("check_likelihood", "cautious", cautious),
        validation.count("check_likelihood", "seed", seed, at_least=0),
    )
    _check_divergence(subject)
    for dtype in (torch.float32, torch.float64):
        _check_results(subject, dtype)
    _check_cost(subject)
    _check_seeds(subject)
    _check_not_a_number(subject)
    _check_latents(subject)
    for name, data in _targets().items():
        _check_closed_form(subject, name, data)


@dataclass(frozen=True)
class _Subject:
    """A solver and a divergence, on what and how hard they are checked; see the public check.

    ``flows`` keeps the flow of each target, and with it what a pilot has found out about it.
    """

    solver: Solver
    divergence: Divergence
    sde: SDE
    samples: int
    tolerance: float
    cautious: bool
    seed: int
    flows: dict[Oracle, ProbabilityFlow] = field(default_factory=dict, repr=False)

    @property
    def random(self) -> bool:
        return self.divergence.random

    def flow(self, data: Oracle, score: Score | None = None) -> ProbabilityFlow:
        """That of the exact score and the exact prior: what is left is integration error."""
        sde = self.sde
        if score is None:
            return self.flows.setdefault(data, self.flow(data, data.score(sde)))
        return ProbabilityFlow(sde, score, lambda x: data.log_prob(x, sde, sde.t_max))

    def run(self, flow: ProbabilityFlow, x: Tensor, generator: Generator = None) -> LogLikelihood:
        generator = self.generator(1) if generator is None else generator
        return log_likelihood(
            flow, x, solver=self.solver, divergence=self.divergence, generator=generator
        )

    def generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + purpose)

    def draw(self, data: Oracle, count: int) -> Tensor:
        """Samples at t_min, [count, ...] float64."""
        generator = self.generator(0)
        return data.sample(count, generator=generator, sde=self.sde, t=self.sde.t_min).double()

    def refuse(self, claim: str) -> None:
        raise ConformanceError(
            f"{self.solver} with {self.divergence} on {type(self.sde).__name__}: {claim}"
        )

    def require_close(
        self, what: str, got: Tensor, wanted: Tensor, allowed: float | Tensor
    ) -> None:
        """Refuse the sample whose ``got`` [B, ...] misses ``wanted`` most, if by too much."""
        got, wanted = got.double(), wanted.double()
        if got.shape != wanted.shape:
            self.refuse(f"{what}: shape {tuple(got.shape)}, should be {tuple(wanted.shape)}.")
        allowed = torch.as_tensor(allowed, dtype=torch.float64).to(got).expand_as(got)
        excess = ((got - wanted).abs() / allowed).nan_to_num(nan=math.inf)
        if bool((excess <= 1).all()):
            return
        i = torch.unravel_index(excess.argmax(), excess.shape)
        self.refuse(
            f"{what}: for sample {int(i[0])} it is {float(got[i]):.6g}, should be "
            f"{float(wanted[i]):.6g}; off by {abs(float(got[i] - wanted[i])):.3g}, allowed "
            f"{float(allowed[i]):.3g}."
        )

    def require_mean(self, what: str, values: Tensor, wanted: float, slack: float) -> None:
        """Refuse ``values`` [n] whose mean is not ``wanted``, to five standard errors."""
        mean, error = float(values.mean()), float(values.std() / math.sqrt(len(values)))
        allowed = SIGMAS * error + slack
        if not abs(mean - wanted) <= allowed:
            self.refuse(
                f"{what}: the mean of {len(values)} is {mean:.5g}, should be {wanted:.5g}; off by "
                f"{abs(mean - wanted):.3g}, allowed {allowed:.3g} ({SIGMAS} standard errors)."
            )

    def require_honest(self, what: str, errors: Tensor, variance: Tensor, slack: float) -> None:
        """Refuse a ``variance`` [n] that is not that of the ``errors`` [n], by their squares."""
        excess = errors.square() - variance
        mean, allowed = float(excess.mean()), SIGMAS * float(excess.std()) / math.sqrt(len(excess))
        allowed += slack**2
        if not mean <= allowed or (mean < -allowed and not self.cautious):
            self.refuse(
                f"{what} is not that of the errors: over {len(excess)} samples their mean square "
                f"is {float(errors.square().mean()):.4g}, and {float(variance.mean()):.4g} by "
                f"what is reported; allowed {allowed:.3g} apart ({SIGMAS} standard errors)."
            )


@cache
def _targets() -> dict[str, Oracle]:
    """Densities with everything in closed form, each with a difficulty of its own."""
    axes = math.prod(SHAPE)
    means = torch.linspace(-1, 1, 3 * axes, dtype=torch.float64).sin().reshape(3, *SHAPE)
    stds = torch.linspace(0.3, 0.9, axes, dtype=torch.float64).expand(3, axes)
    return {
        "a Gaussian with full covariance": _gaussian(),
        "a mixture in the plane": GaussianMixture(
            torch.tensor([[-2.0, 0.0], [2.0, 1.0]]),
            torch.tensor([0.5, 0.7]),
            torch.tensor([0.3, 0.7]),
        ),
        f"a mixture of shape {SHAPE}": GaussianMixture(1.5 * means, stds.reshape(3, *SHAPE)),
    }


@cache
def _gaussian(dims: int = 5) -> Gaussian:
    """Standard deviations from 0.4 to 1.5 along axes that no coordinate is near."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64)).Q
    variances = torch.linspace(0.4, 1.5, dims, dtype=torch.float64).square()
    return Gaussian(torch.linspace(-0.5, 1, dims), covariance=(axes * variances) @ axes.mT)


def _check_divergence(subject: _Subject) -> None:
    """On x -> A x, where all is known; with nothing of a solver in between."""
    divergence, n = subject.divergence, subject.samples
    dims, generator = math.prod(SHAPE), subject.generator(2)
    matrix = torch.randn(dims, dims, generator=generator, dtype=torch.float64) / dims**0.5
    matrix += torch.eye(dims, dtype=torch.float64)  # else the trace is little beside its noise
    x = torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64)

    def field(x: Tensor) -> Tensor:
        return (x.flatten(1) @ matrix.mT).reshape(x.shape)

    value, traces = divergence(field, x.clone(), divergence.probes(x, generator)())
    subject.require_close("the value of a linear field A x", value, field(x), 1e-9)
    if traces.ndim != 2 or traces.shape[1] != n:
        subject.refuse(
            "a divergence should give k estimates for each of B samples, [k, B]; got shape "
            f"{tuple(traces.shape)} for B = {n}."
        )
    _check_traces(subject, traces.double(), float(matrix.trace()))


def _check_traces(subject: _Subject, traces: Tensor, trace: float) -> None:
    """Estimates [k, B] of one and the same ``trace``."""
    what = "the divergence of a linear field A x, tr A"
    if not subject.random:
        subject.require_close(what, traces[0], torch.full_like(traces[0], trace), 1e-9)
        return
    mean = traces.mean(0)
    subject.require_mean(what, mean, trace, 1e-9)
    variance = subject.divergence.kept_variance(traces).variance
    if len(traces) > 1 or not bool(variance.isnan().all()):  # one alone cannot say
        what = "kept_variance of the divergence of a linear field A x"
        subject.require_honest(what, mean - trace, variance, 1e-9)


def _check_results(subject: _Subject, dtype: torch.dtype) -> None:
    """Shape, dtype and device of every part, and an input that is left alone."""
    data = _targets()[f"a mixture of shape {SHAPE}"]
    x = subject.draw(data, FEW).to(dtype)
    try:
        subject.solver.check(x)
    except ValueError:
        if dtype == torch.float64:
            raise
        return  # a solver may refuse a precision, at the door
    kept = x.clone()
    result = subject.run(subject.flow(data), x)
    if not torch.equal(x, kept):
        subject.refuse(f"the input should not be modified; x, {dtype}, was written to.")
    parts = {"latent": x.shape} | dict.fromkeys(
        ("log_prob", "standard_error", "solver_error", "truncation", "prior_mismatch"), (FEW,)
    )
    for name, shape in parts.items():
        got = getattr(result, name)
        if tuple(got.shape) != tuple(shape) or got.dtype != dtype or got.device != x.device:
            subject.refuse(
                f"{name} should have shape {tuple(shape)} and the dtype and device of x, {dtype} "
                f"on {x.device}; got {tuple(got.shape)} {got.dtype} on {got.device}."
            )


def _check_gradients(
    subject: _Subject, x: Tensor, parameter: Tensor, result: LogLikelihood
) -> None:
    """Nothing of the graph is left: on a parameter of the score, on x, or on the result."""
    for name, left in (
        ("the parameters of the score function hold a gradient", parameter.grad is not None),
        ("x holds a gradient", x.grad is not None),
        ("log_prob has a graph", result.log_prob.requires_grad),
        ("the latent has a graph", result.latent.requires_grad),
    ):
        if left:
            subject.refuse(
                f"no gradient should be left behind without differentiable=True; after it {name}. "
                "Use torch.autograd.grad, not backward, and return what is detached."
            )


def _check_seeds(subject: _Subject) -> None:
    """The same seeds again, other seeds, and one sample alone."""
    data, row, seeds = _gaussian(), slice(4, 5), range(100, 100 + FEW)
    flow, x = subject.flow(data), subject.draw(data, FEW)
    first, again = (subject.run(flow, x, PerSample(seeds)) for _ in range(2))
    _check_same_bits(subject, first, again)
    if subject.random and torch.equal(subject.run(flow, x).log_prob, first.log_prob):
        subject.refuse(
            "another generator seed should give other probes; log_prob is the same to the bit. "
            "Draw all probes from the generator."
        )
    _check_batch_mates(subject, first, subject.run(flow, x[row], PerSample(seeds[row])), row)


def _check_same_bits(subject: _Subject, first: LogLikelihood, again: LogLikelihood) -> None:
    for name in ("log_prob", "standard_error", "latent"):
        one, two = getattr(first, name), getattr(again, name)
        if not torch.equal(one.nan_to_num(), two.nan_to_num()):
            subject.refuse(
                f"the same generator seed should give the same bits; two runs differ in {name} by "
                f"{float((one - two).abs().max()):.3g}. Draw all probes from the generator."
            )


def _check_batch_mates(
    subject: _Subject, together: LogLikelihood, alone: LogLikelihood, row: slice
) -> None:
    std = subject.sde.prior_std()
    for name, unit in (("log_prob", 1.0), ("standard_error", 1.0), ("latent", std)):
        subject.require_close(
            f"sample i should depend on seed i alone; {name} in a batch of one, beside that in a "
            f"batch of {FEW}",
            getattr(alone, name).nan_to_num(),
            getattr(together, name)[row].nan_to_num(),
            subject.tolerance * unit,
        )


class _Watched:
    """A score function that notes how often it was called, and how often differentiated.

    Attributes:
        rows: Samples in each call.
        pulls: For each call, how often a gradient came back through its result; a vectorised
            pullback of several vectors counts as one.
    """

    def __init__(self, score: Score) -> None:
        self.score = score
        self.rows: list[int] = []
        self.pulls: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        value, call = self.score(x, t), len(self.rows)
        self.rows.append(len(x))
        self.pulls.append(0)
        if value.requires_grad:
            value.register_hook(lambda _: self._pulled(call))
        return value

    def _pulled(self, call: int) -> None:
        self.pulls[call] += 1


def _check_cost(subject: _Subject) -> None:
    """One run that is watched: what it asked of the score function, and what it left behind."""
    data = _gaussian()
    exact, scale = data.score(subject.sde), torch.ones((), dtype=torch.float64, requires_grad=True)
    watched = _Watched(lambda x, t: scale * exact(x, t))
    x = subject.draw(data, FEW).requires_grad_()
    result = subject.run(subject.flow(data, watched), x)
    _check_gradients(subject, x, scale, result)
    _check_counts(subject, x, watched, result)


def _check_counts(subject: _Subject, x: Tensor, watched: _Watched, result: LogLikelihood) -> None:
    """Forward passes by rows, whoever asks for them; backward passes over the whole batch."""
    rows, said = sum(watched.rows), result.nfe * FEW + result.pilot_nfe
    if rows != said:
        subject.refuse(
            f"nfe should be the forward passes over the batch: the score function saw {rows} "
            f"samples, and nfe={result.nfe} times {FEW} with pilot_nfe={result.pilot_nfe} makes "
            f"{said}. Count evaluations, do not assume them."
        )
    pulls = [p for p, n in zip(watched.pulls, watched.rows, strict=True) if p and n == FEW]
    each = subject.divergence.passes(x)
    if sum(pulls) > result.passes or (pulls and result.passes != each * len(pulls)):
        subject.refuse(
            f"passes should be the backward passes over the batch: {len(pulls)} evaluations were "
            f"differentiated, {each} times each by the divergence's own account, and {sum(pulls)} "
            f"gradients came back; got passes={result.passes}."
        )


def _check_not_a_number(subject: _Subject) -> None:
    """A score that is NaN on the noisy half of the clock."""
    data, sde = _gaussian(), subject.sde
    exact, x = data.score(sde), subject.draw(data, FEW)
    middle = sde.time_at(torch.tensor(sum(sde.log_snr_range()) / 2, dtype=torch.float64))

    def broken(x: Tensor, t: Tensor) -> Tensor:
        factor = torch.where(t > middle, math.nan, 1.0)
        return exact(x, t) * expand_like(factor.to(x), x)

    what = f"a score of NaN above t={float(middle):.4g} should end in a SamplingError that says"
    try:
        subject.run(subject.flow(data, broken), x)
    except SamplingError as error:
        if "log(sigma/alpha) =" not in str(error):
            subject.refuse(f"{what} where, as 'log(sigma/alpha) = ...'; it said: {error}")
    except Exception as error:
        subject.refuse(f"{what} where; got {type(error).__name__}: {error}")
    else:
        subject.refuse(f"{what} where; got a result.")


def _check_closed_form(subject: _Subject, name: str, data: Oracle) -> None:
    x = subject.draw(data, subject.samples)
    truth = data.log_prob(x, subject.sde, subject.sde.t_min)
    result = subject.run(subject.flow(data), x)
    what, tolerance = f"log_prob on {name}, from the closed form", subject.tolerance
    if not subject.random:
        subject.require_close(what, result.log_prob, truth, tolerance)
        zero, gap = torch.zeros_like(truth), data.log_prob(x) - truth
        for what, got, wanted, allowed in (
            ("standard_error, where nothing is random", result.standard_error, zero, 1e-300),
            (
                "truncation, what log p is short of t = 0",
                result.truncation,
                gap,
                tolerance + gap.abs() / 2,
            ),
            ("prior_mismatch, where the prior is exact", result.prior_mismatch, zero, tolerance),
        ):
            subject.require_close(f"{what}, on {name}", got, wanted, allowed)
        return
    error = result.log_prob.double() - truth
    subject.require_mean(f"the error of {what}", error, 0.0, tolerance)
    variance = result.standard_error.double().square()
    if not bool(variance.isnan().all()) or subject.divergence.passes(x) > 1:
        subject.require_honest(f"standard_error on {name}", error, variance, tolerance)


def _check_latents(subject: _Subject) -> None:
    """The flow of a Gaussian is affine, and known."""
    data, sde = _gaussian(), subject.sde
    shape, generator = (FEW, *data.shape), subject.generator(5)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    result = subject.run(subject.flow(data), data.push(sde, z, sde.t_min))
    subject.require_close(
        "the latent of a Gaussian, from the closed-form flow",
        result.latent,
        data.push(sde, z, sde.t_max),
        subject.tolerance * sde.prior_std(),
    )
