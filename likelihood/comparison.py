"""What bounds say together: the order they come in, and rate against distortion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sde_lib import validation

if TYPE_CHECKING:
    from likelihood.bounds import DiscreteBound


@dataclass(frozen=True)
class RateDistortion:
    """What a progressive code would have sent and won at each level, averaged over samples.

    Attributes:
        rate: Bits per dimension sent by then, [T + 1], rising.
        rate_error: Standard error of ``rate`` over the samples, [T + 1].
        distortion: Root mean squared error of x0_hat by then, [T + 1].
        distortion_error: Its standard error over the samples, [T + 1].
        times: The levels, decreasing, [T + 1].
    """

    rate: Tensor
    rate_error: Tensor
    distortion: Tensor
    distortion_error: Tensor
    times: Tensor


def rate_distortion(bound: DiscreteBound, num_dims: int, unit: float = 1.0) -> RateDistortion:
    r"""Progressive coding: the rate of the terms so far against the error of x0_hat.

    Level i is known after the prior term and i steps. What the decoder term adds makes K-level
    data lossless; it is not on the curve.

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020, section 4.3.

    Args:
        bound: From :func:`discrete_bound`, of at least two samples for the errors.
        num_dims: D, numbers in one sample.
        unit: Data units in one model unit: 127.5 for pictures of 0 to 255 scaled to [-1, 1].

    Raises:
        ValueError: If ``num_dims`` is not a whole number >= 1 or ``unit`` not > 0.
    """
    num_dims = validation.count("rate_distortion", "num_dims", num_dims)
    unit = validation.real("rate_distortion", "unit", unit, above=0)
    rate = bound.terms[:-1].cumsum(0) / (num_dims * math.log(2))
    root = bound.distortion.mean(1).sqrt()
    error = variance_of_mean(bound.distortion.T).sqrt() / (2 * root)  # of a root: half, relative
    return RateDistortion(
        rate.mean(1), variance_of_mean(rate.T).sqrt(), unit * root, unit * error, bound.times
    )


@dataclass(frozen=True)
class Ordering:
    """Whether log p of the ODE >= ELBO >= VLB, from paired differences over samples, in nats.

    Attributes:
        ode_gap: Mean of the ODE's log p minus the ELBO.
        ode_gap_error: Its standard error.
        vlb_gap: Mean of the ELBO minus the VLB.
        vlb_gap_error: Its standard error.
        sigmas: Standard errors by which a gap may be negative.
    """

    ode_gap: float
    ode_gap_error: float
    vlb_gap: float
    vlb_gap_error: float
    sigmas: float

    @property
    def ode_above_elbo(self) -> bool:
        """Whether log p of the ODE >= ELBO within the allowance."""
        return self.ode_gap >= -self.sigmas * self.ode_gap_error

    @property
    def elbo_above_vlb(self) -> bool:
        """Whether ELBO >= VLB within the allowance."""
        return self.vlb_gap >= -self.sigmas * self.vlb_gap_error

    @property
    def holds(self) -> bool:
        """Whether both do."""
        return self.ode_above_elbo and self.elbo_above_vlb

    def _verdict(self, gap: float, good: bool) -> str:
        if gap >= 0:
            return "in order"
        if good:
            return f"below zero, by less than {self.sigmas:g} standard errors"
        return f"out of order by more than {self.sigmas:g} standard errors"

    def __str__(self) -> str:
        rows = [
            ("ODE - ELBO", self.ode_gap, self.ode_gap_error, self.ode_above_elbo),
            ("ELBO - VLB", self.vlb_gap, self.vlb_gap_error, self.elbo_above_vlb),
        ]
        return "\n".join(
            f"{name} = {gap:.4g} ± {error:.2g} nats a sample: {self._verdict(gap, good)}"
            for name, gap, error, good in rows
        )


def ordered(ode: Tensor, elbo: Tensor, vlb: Tensor, *, sigmas: float = 3.0) -> Ordering:
    r"""Compare three log-probabilities [B] of the same samples, in nats and in one unit.

    What is to be expected, and why none of it is a theorem about one run:

    - The ELBO bounds log p of the reverse *SDE* with its decoder. The ODE has another density
      unless the score is exact; a learned score usually leaves the ODE above, but need not.
    - ``log_likelihood`` scores x as a sample at t_min, the bounds score it at t = 0: the
      difference, ``truncation`` of its result, must be small against the gap.
    - A T-step model has a likelihood of its own. Its bound tends to the ELBO as T grows, from
      below, in expectation, if the posterior variance is used and the error of x0_hat falls
      along the levels, as that of the exact score does. A better variance (analytic) can lift a
      T-step bound over the ELBO of an inexact score.

    Bring densities and masses to one unit first: a log-density in model units plus
    D log(bin_width) compares with a log-probability of levels.

    Args:
        ode: log p by the probability flow, [B].
        elbo: From :func:`continuous_bound`, [B].
        vlb: From :func:`discrete_bound`, [B].
        sigmas: Standard errors of the mean difference that count as none, >= 0.

    Raises:
        ValueError: If the three are not of one shape [B], B >= 2, or not finite.
    """
    sigmas = validation.real("ordered", "sigmas", sigmas, at_least=0)
    shapes = [tuple(value.shape) for value in (ode, elbo, vlb)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] < 2:
        raise ValueError(
            "ordered needs three log-probabilities [B] of the same two or more samples; got "
            f"shapes {', '.join(map(str, shapes))}. Pass the log_prob of each result."
        )
    bad = [int((~torch.isfinite(value)).sum()) for value in (ode, elbo, vlb)]
    if any(bad):
        raise ValueError(
            f"ordered needs finite log-probabilities; got {bad[0]}, {bad[1]} and {bad[2]} that "
            "are not, of ode, elbo and vlb. Leave out the samples that failed."
        )
    numbers = []
    for gap in (ode.double() - elbo.double(), elbo.double() - vlb.double()):
        numbers += [float(gap.mean()), float(variance_of_mean(gap).sqrt())]
    return Ordering(*numbers, sigmas)


def variance_of_mean(draws: Tensor) -> Tensor:
    """Variance [...] of the mean of ``draws`` [n, ...]; NaN for one."""
    if len(draws) < 2:
        return torch.full_like(draws[0], math.nan)
    return draws.var(0) / len(draws)
