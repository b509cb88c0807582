"""Exact log-likelihood by the probability-flow ODE."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from likelihood.checked import check_batch, check_finite, check_flow, check_kind
from likelihood.divergence import Divergence, suited
from likelihood.result import LogLikelihood
from likelihood.solvers import FixedGrid, Path, Solver
from sde_lib.noise import Generator, check_generator
from sde_lib.reverse import ProbabilityFlow
from sde_lib.rows import by_row
from sde_lib.samplers.base import SamplingError
from sde_lib.sde import Level


def log_likelihood(
    flow: ProbabilityFlow,
    x: Tensor,
    *,
    solver: Solver | None = None,
    divergence: Divergence | None = None,
    generator: Generator = None,
    differentiable: bool = False,
) -> LogLikelihood:
    r"""Log-density of ``x`` under the model, by the instantaneous change of variables.

    With y = x/alpha, rho = sigma/alpha and u = log rho, along the path that starts at x,

    .. math::  \log p(x) = \log \pi(x_T) + D \log \frac{\alpha(t_{max})}{\alpha(t_{min})}
               + \int_{u_{min}}^{u_{max}} \mathrm{tr} \frac{\partial (\varrho\, \hat\varepsilon)}
               {\partial y}\, du

    ``x`` is taken to be a sample at t_min: the density is that of the data with noise sigma(t_min)
    added, and ``truncation`` of the result says about how far that is from t = 0.

    Reference: Chen et al., Neural Ordinary Differential Equations, 2018; Song et al. 2021,
    appendix D.2.

    Args:
        flow: ``probability_flow(sde, score)``; the score must be differentiable with respect to x.
        x: Samples in model units, [B, ...], float32 or float64.
        solver: :class:`likelihood.FixedGrid` (64 nodes if not given) or
            :class:`likelihood.Adaptive`.
        divergence: :class:`likelihood.Exact` or :class:`likelihood.Hutchinson`; exact up to 16
            dimensions, else two fresh Rademacher probes a node, if not given.
        generator: Source of the probes; a ``PerSample`` makes them independent of the batch.
        differentiable: Keep the graph, so that ``log_prob`` and ``latent`` can be differentiated
            with respect to x and to whatever the score function depends on; memory grows with the
            number of nodes.

    Raises:
        ValueError: If ``x`` is not a batch of finite numbers, or the score is not differentiable.
        SamplingError: If the score is not finite or a solver gives up; the message says where and
            why, its ``partial`` is the result of the other samples (NaN in those that failed) if
            there is one.
    """
    began = time.monotonic()
    check_flow("log_likelihood", flow)
    check_batch("log_likelihood", x)
    solver = FixedGrid() if solver is None else solver
    check_kind("log_likelihood", "solver", solver, Solver, "FixedGrid() or Adaptive()")
    divergence = suited(tuple(x.shape[1:])) if divergence is None else divergence
    check_kind("log_likelihood", "divergence", divergence, Divergence, "Exact() or Hutchinson()")
    check_generator("log_likelihood", generator)
    solver.check(x)
    # a trace needs derivatives, inside inference_mode too
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        x = x.clone() if x.is_inference() else x
        path = solver.solve(flow, x, divergence, generator, differentiable=differentiable)
        result = _result(flow, x, path, began)
    if path.failure is not None:
        lost = ~torch.isfinite(result.log_prob)
        error = SamplingError(
            f"{path.failure} {int(lost.sum())} of {len(x)} samples are lost, the first is number "
            f"{int(lost.nonzero()[0])}; `partial` of this error has the others."
        )
        error.partial = result
        raise error
    check_finite(
        "log_likelihood",
        result.log_prob,
        nodes=torch.isfinite(result.trace).all(1),
        clock=result.clock,
        partial=result,
    )
    return result


def _result(flow: ProbabilityFlow, x: Tensor, path: Path, began: float) -> LogLikelihood:
    """Prior, volume change and error budget of a solved ``path``."""
    ends = torch.tensor(flow.clock_range(), dtype=torch.float64, device=x.device)
    start, end = flow.level_at(ends).rows()
    scale = flow.scale(end)
    latent = scale * path.z
    log_prior = flow.prior_log_prob(latent)
    log_prob = log_prior + x[0].numel() * torch.log(end.alpha / start.alpha) + path.volume
    prior_difference = log_prior.detach() - flow.prior_log_prob(scale * path.z_other)
    difference = torch.hypot(prior_difference, path.volume_difference)
    whole = int(by_row(flow.score))  # the look at the origin takes all rows where they differ
    return LogLikelihood(
        log_prob=log_prob.to(x.dtype),
        standard_error=path.spread.variance.sqrt().to(x.dtype),
        freedom=path.spread.freedom.to(x.dtype),
        latent=latent.to(x.dtype),
        nfe=path.nfe + whole,
        passes=path.passes,
        solver_error=(difference / path.shrink).to(x.dtype),
        truncation=_truncation(x.detach().double(), start, *path.first).to(x.dtype),
        prior_mismatch=_prior_mismatch(flow, latent.detach(), x, end, *path.last).to(x.dtype),
        clock=path.clock,
        trace=path.trace.to(x.dtype),
        pilot_nfe=path.pilot_nfe + 1 - whole,
        seconds=time.monotonic() - began,
    )


def _truncation(x: Tensor, level: Level, noise: Tensor, trace: Tensor) -> Tensor:
    r"""First-order log p at t = 0 minus log p at t_min, [B].

    The density q of y = x/alpha obeys the heat equation in rho²,
    :math:`2\,\partial \log q / \partial \varrho^2 = \nabla\cdot s + |s|^2` with
    :math:`\varrho s = -\hat\varepsilon`; the change from y to x adds D log alpha and a shift of
    the argument.
    """
    heat = 0.5 * (trace - noise.flatten(1).square().sum(1))
    shift = (1 / level.alpha - 1) / level.noise_ratio * (x * noise).flatten(1).sum(1)
    return heat + x[0].numel() * torch.log(level.alpha) + shift


@torch.no_grad()
def _prior_mismatch(
    flow: ProbabilityFlow, latent: Tensor, x: Tensor, level: Level, noise: Tensor, trace: Tensor
) -> Tensor:
    r"""Second-order log p minus log-prior at the ``latent``, [B].

    The ratio of the noised density to N(0, sigma²) is nearly the exponential of a quadratic form
    :math:`g = a \cdot x + \tfrac12 x^T Q x + c`, since alpha/sigma is small. Its gradient is
    known at the latent, its linear part at the origin, tr Q from the trace, and c from
    the fact that densities integrate to one.
    """
    few = x if by_row(flow.score) else x[:1]
    linear = level.noise(flow.score(torch.zeros_like(few), level.t).double())  # at the origin
    sigma = level.sigma
    # gradient of g, times sigma: x / sigma - eps_hat
    gradient = latent / sigma - noise
    first = -(latent * linear).flatten(1).sum(1) / sigma
    second = 0.5 * (latent * (gradient + linear)).flatten(1).sum(1) / sigma
    constant = -0.5 * (latent[0].numel() - trace + linear.square().flatten(1).sum(1))
    own_prior = flow.sde.prior_log_prob(latent) + first + second + constant
    return own_prior - flow.prior_log_prob(latent)
