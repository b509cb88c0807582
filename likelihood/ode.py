"""Exact log-likelihood by the probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.divergence import Divergence, Exact, Hutchinson
from sde_lib.noise import Generator
from sde_lib.reverse import ProbabilityFlow
from sde_lib.samplers.adaptive import check_solver, integrate
from sde_lib.sde import Level


@dataclass(frozen=True)
class LogLikelihood:
    """What :func:`log_likelihood` found.

    Attributes:
        log_prob: Log-density in nats, in the units of x, [B].
        standard_error: Of ``log_prob``, from the spread of the probes, nats, [B]; zero with the
            exact trace, NaN with a single probe, which says nothing of its own error.
        latent: Where each sample ends at t_max, [B, ...].
        nfe: Forward passes of the score function over the batch.
        passes: Backward passes over the batch.
    """

    log_prob: Tensor
    standard_error: Tensor
    latent: Tensor
    nfe: int
    passes: int


def log_likelihood(
    flow: ProbabilityFlow,
    x: Tensor,
    *,
    divergence: Divergence | None = None,
    generator: Generator = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    max_evaluations: int = 10_000,
) -> LogLikelihood:
    r"""Log-density of ``x`` under the model, by the instantaneous change of variables.

    With z and u of :class:`sde_lib.reverse.ProbabilityFlow` and scale r,

    .. math::  \log p(x) = \log \pi(x_T) + D \log \frac{r(t_{max})}{r(t_{min})}
               + \int_{u_{min}}^{u_{max}} \mathrm{tr} \frac{\partial}{\partial z} \frac{dz}{du}\,
               du

    ``x`` is taken to be a sample at t_min: the density is that of the data with noise sigma(t_min)
    added. State and divergence are integrated together, in float64, by an adaptive solver that
    bounds the error of every sample, of z by its root mean square and of log p per
    dimension; the network is called in the dtype of ``x``. Step sizes are shared by the batch, so
    a sample agrees with itself in another batch to the tolerance, not to the bit.

    Reference: Chen et al., Neural Ordinary Differential Equations, 2018; Song et al. 2021,
    appendix D.2.

    Args:
        flow: ``probability_flow(sde, score)``; the score must be differentiable with respect to x.
        x: Samples in model units, [B, ...].
        divergence: :class:`Exact` or :class:`Hutchinson`; exact up to 16 dimensions, else two
            Rademacher probes, if not given.
        generator: Source of the probes; a ``PerSample`` makes them independent of the batch.
        rtol: Relative tolerance.
        atol: Absolute tolerance, on z and on log p per dimension.
        method: dopri5, dopri8, bosh3, fehlberg2 or adaptive_heun.
        max_evaluations: Evaluations after which to give up.

    Raises:
        ValueError: If ``x`` is not a batch of finite numbers, or the score is not differentiable.
        SamplingError: If the solver gives up; the message says where and why.
    """
    _check(x, rtol, atol, method)
    if divergence is None:
        divergence = Exact() if x[0].numel() <= 16 else Hutchinson()
    probes = divergence.probes(x, generator)
    dims = x[0].numel()
    start, end = flow.clock_range()
    clock = torch.tensor([start, end], dtype=torch.float64, device=x.device)
    levels = flow.level_at(clock)
    scales = flow.scale(levels)
    nfe = 0

    def rate(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal nfe
        nfe += 1
        velocity, trace = _rate(flow, flow.level_at(u), state[0].to(x.dtype), divergence, probes)
        return velocity.double(), trace.double() / dims

    traces = torch.zeros(len(probes), len(x), dtype=torch.float64, device=x.device)
    states, integrals = integrate(
        rate,
        (x.double() / scales[0], traces),
        clock,
        method=method,
        rtol=rtol,
        atol=atol,
        max_evaluations=max_evaluations,
        norm=_worst_sample,
    )
    latent = scales[1] * states[-1]
    log_probs = flow.prior_log_prob(latent) + dims * (
        integrals[-1] + torch.log(scales[1] / scales[0])
    )
    return LogLikelihood(
        log_prob=log_probs.mean(0).to(x.dtype),
        standard_error=divergence.standard_error(log_probs).to(x.dtype),
        latent=latent.to(x.dtype),
        nfe=nfe,
        passes=nfe * divergence.passes(x),
    )


def _rate(
    flow: ProbabilityFlow, level: Level, z: Tensor, divergence: Divergence, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """dz/du and k estimates [k, B] of its trace; that of the linear part needs no probe."""
    linear = flow.noise_share(level).to(z).square()
    value, trace = divergence(lambda z: flow.noise_part(z, level), z, probes)
    return value - linear * z, trace - linear * z[0].numel()


def _worst_sample(error: tuple[Tensor, Tensor]) -> Tensor:
    """Norm of a scaled error: no sample hides behind its neighbours, nor log p behind x."""
    z, trace = error
    return torch.maximum(z.flatten(1).square().mean(1).max().sqrt(), trace.abs().max())


def _check(x: Tensor, rtol: float, atol: float, method: str) -> None:
    if x.ndim < 2 or not x.is_floating_point() or not bool(torch.isfinite(x).all()):
        raise ValueError(
            "log_likelihood needs a batch [B, ...] of finite floating-point numbers; "
            f"got shape {tuple(x.shape)}, "
            f"{x.dtype}{'' if torch.isfinite(x).all() else ', with NaN or infinity'}."
        )
    check_solver("log_likelihood", rtol, atol, method, x.dtype)
