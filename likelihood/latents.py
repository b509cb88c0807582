"""Data to latents and back along the probability flow, between latents, and what that loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from likelihood.checked import check_batch, check_finite, check_flow
from likelihood.divergence import suited
from likelihood.pilot import Pilot
from likelihood.solvers import FixedGrid
from sde_lib.adams import Adams
from sde_lib.counting import Counted
from sde_lib.reverse import ProbabilityFlow

PARALLEL = 1e-12  # sine below which two directions single out no plane


@dataclass(frozen=True)
class RoundTrip:
    """What came back from the latents, and how far from where it started.

    Attributes:
        x_again: Decoded latents, [B, ...].
        error: Root mean square over the coordinates of ``x_again - x``, in units of x, [B].
        latent: What was decoded, [B, ...], in units of x at t_max.
        nfe: Forward passes over the batch, both ways together.
        pilot_nfe: Forward passes, of one sample each, that laying out the nodes took: once for a
            flow, so 0 for its later batches.
    """

    x_again: Tensor
    error: Tensor
    latent: Tensor
    nfe: int
    pilot_nfe: int


def encode(
    flow: ProbabilityFlow, x: Tensor, *, nodes: int = 64, differentiable: bool = False
) -> Tensor:
    r"""The latent of ``x``: where the probability flow takes it, from its data's end to t_max.

    In the clock :math:`u = \log(\sigma/\alpha)` and :math:`z = x / \sqrt{\alpha^2 + \sigma^2}`,
    with :math:`\varsigma = \sigma / \sqrt{\alpha^2 + \sigma^2}`,

    .. math::  z(u_{max}) = z(u_{min}) + \int_{u_{min}}^{u_{max}}
               \left( \varsigma\, \hat\varepsilon - \varsigma^2 z \right) du

    by an Adams predictor-corrector, one forward pass a node, on the nodes of
    :class:`likelihood.Pilot`; it is the ``latent`` of :func:`likelihood.log_likelihood` on as many
    nodes, without the trace. The state is float64, the network runs in the dtype of x. Every
    model with the same exact score gives the same latents, whatever its network.

    Reference: Song et al., Score-Based Generative Modeling through SDEs, 2021, appendix D.3; Song,
    Meng and Ermon, Denoising Diffusion Implicit Models, 2021, section 4.3.

    Args:
        flow: ``probability_flow(sde, score)``; its score must be differentiable with respect to
            x, since the pilot, once for a flow, looks at the trace.
        x: Samples in model units, [B, ...], float32 or float64.
        nodes: N, at least 8: forward passes.
        differentiable: Keep the graph, so that the latent can be differentiated.

    Returns:
        Latents in units of x at t_max, about N(0, sigma(t_max)²), [B, ...] in the dtype of ``x``.

    Raises:
        ValueError: If ``x`` is not a batch of finite numbers, or the score is not differentiable.
        SamplingError: If the score is not finite; the message says from which node on, and
            ``partial`` of the error holds the latents, the failed ones not finite.
    """
    check_flow("encode", flow)
    check_batch("encode", x)
    return _carried("encode", flow, x, nodes, to_noise=True, differentiable=differentiable)


def decode(
    flow: ProbabilityFlow, latent: Tensor, *, nodes: int = 64, differentiable: bool = False
) -> Tensor:
    """The sample of a latent: the map of :func:`encode` walked the other way, node by node.

    The two are inverse to each other up to the error of the rule, which :func:`round_trip`
    measures. The result is x at the data's end of the flow (t_min), not denoised.

    Args:
        flow: ``probability_flow(sde, score)``, as for :func:`encode`.
        latent: States at t_max, [B, ...], float32 or float64: from :func:`encode`,
            :func:`interpolate` or ``sde.prior_sample``.
        nodes: N, at least 8: forward passes.
        differentiable: Keep the graph, so that the sample can be differentiated.

    Returns:
        Samples in model units, [B, ...] in the dtype of ``latent``.

    Raises:
        ValueError: If ``latent`` is not a batch of finite numbers, or the score is not
            differentiable.
        SamplingError: If the score is not finite, as in :func:`encode`.
    """
    check_flow("decode", flow)
    check_batch("decode", latent)
    return _carried("decode", flow, latent, nodes, to_noise=False, differentiable=differentiable)


@torch.no_grad()
def round_trip(flow: ProbabilityFlow, x: Tensor, *, nodes: int = 64) -> RoundTrip:
    r"""Encode ``x``, decode the latent, and measure what was lost.

    .. math::  \mathrm{error} = \sqrt{\tfrac1D \|x' - x\|^2},
               \qquad x' = \mathrm{decode}(\mathrm{encode}(x))

    The error is that of both ways together. From 24 nodes on it falls at third order or faster:
    encoding is of fourth order, but decoding begins where the state moves, with steps that have
    too few rates behind them for that. It says that nothing is lost, not that the latent is right.

    Args:
        flow: ``probability_flow(sde, score)``, as for :func:`encode`.
        x: Samples in model units, [B, ...], float32 or float64.
        nodes: N, at least 8, each way.

    Raises:
        ValueError: As :func:`encode`.
        SamplingError: As :func:`encode`.
    """
    check_flow("round_trip", flow)
    check_batch("round_trip", x)
    known = len(flow.memory)
    pilot = Pilot.of(flow, x, suited(tuple(x.shape[1:])))
    score = Counted(flow.score)
    counted = replace(flow, score=score)
    counted.memory.update(flow.memory)  # so without another pilot
    latent = encode(counted, x, nodes=nodes)
    again = decode(counted, latent, nodes=nodes)
    error = (again.double() - x.double()).flatten(1).square().mean(1).sqrt()
    return RoundTrip(
        x_again=again,
        error=error.to(x.dtype),
        latent=latent,
        nfe=score.nfe,
        pilot_nfe=pilot.nfe if len(flow.memory) > known else 0,
    )


def interpolate(a: Tensor, b: Tensor, fractions: Tensor | Sequence[float]) -> Tensor:
    r"""Latents between ``a`` and ``b``: along the great circle of their directions, norms between.

    With unit vectors :math:`\hat a, \hat b` of the flattened samples, their angle
    :math:`\omega`, and :math:`n` the unit vector at right angles to :math:`\hat a` towards
    :math:`\hat b`,

    .. math::  \left[ (1 - f) \|a\| + f \|b\| \right]
               \left( \cos(f \omega)\, \hat a + \sin(f \omega)\, n \right)

    For equal norms this is the usual :math:`(\sin((1 - f)\omega)\, a + \sin(f \omega)\, b) /
    \sin\omega`, which for other norms leaves the shell between them, without bound as the angle
    nears 180 degrees. Latents of D Gaussian coordinates keep the norm, about sqrt(D), that the
    network was trained at; a straight line would lose 29 % of it half way.

    Opposite directions single out no circle: one is chosen, through the axis that they have the
    least part in. Where there is no circle at all (a vector of zeros, or D = 1) it is a straight
    line.

    Reference: Shoemake, Animating Rotation with Quaternion Curves, 1985; Song, Meng and Ermon
    2021, appendix D.5.

    Args:
        a: Latents at fraction 0, [B, ...], float32 or float64.
        b: Latents at fraction 1, of the same shape and dtype.
        fractions: Where between, F numbers in [0, 1].

    Returns:
        [F, B, ...] in the dtype of ``a``.

    Raises:
        ValueError: If the latents are not two like batches of finite numbers, or a fraction
            leaves [0, 1].
    """
    check_batch("interpolate", a)
    check_batch("interpolate", b)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            "interpolate needs two batches of one shape and dtype; got "
            f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}. Expand or convert one."
        )
    f = _checked_fractions(fractions, a)
    start, end = a.double().flatten(1), b.double().flatten(1)
    return _on_the_circle(start, end, f).reshape(len(f), *a.shape).to(a.dtype)


def _on_the_circle(a: Tensor, b: Tensor, f: Tensor) -> Tensor:
    """:func:`interpolate` of flat ``a`` and ``b`` [B, D] at ``f`` [F, 1, 1], [F, B, D]."""
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    straight = (1 - f) * a + f * b
    if a.shape[1] == 1:
        return straight
    none = (norm_a == 0) | (norm_b == 0)
    unit_a, unit_b = a / norm_a.masked_fill(none, 1), b / norm_b.masked_fill(none, 1)
    # the arc cosine would lose half of the digits of a small angle
    apart, along = (unit_b - unit_a).norm(dim=1), (unit_b + unit_a).norm(dim=1)
    angle = f * 2 * torch.atan2(apart, along)[:, None]
    circle = angle.cos() * unit_a + angle.sin() * _normal(unit_a, unit_b)
    return torch.where(none, straight, ((1 - f) * norm_a + f * norm_b) * circle)


def _normal(unit_a: Tensor, unit_b: Tensor) -> Tensor:
    """Unit vectors [B, D] at right angles to ``unit_a``, towards ``unit_b`` if that says where."""
    least = torch.nn.functional.one_hot(unit_a.abs().argmin(1), unit_a.shape[1]).to(unit_a)
    across, other = (
        towards - (towards * unit_a).sum(1, keepdim=True) * unit_a for towards in (unit_b, least)
    )
    across = torch.where(across.norm(dim=1, keepdim=True) < PARALLEL, other, across)
    return across / across.norm(dim=1, keepdim=True)


def _carried(
    owner: str,
    flow: ProbabilityFlow,
    x: Tensor,
    nodes: int,
    *,
    to_noise: bool,
    differentiable: bool,
) -> Tensor:
    """The end of the flow from ``x`` [B, ...], up to t_max or down to t_min, in its dtype."""
    if x.is_inference():  # the pilot needs derivatives
        with torch.inference_mode(False):
            return _carried(
                owner, flow, x.clone(), nodes, to_noise=to_noise, differentiable=differentiable
            )
    grid = FixedGrid(nodes, halve=False)
    clock = Pilot.of(flow, x, suited(tuple(x.shape[1:]))).nodes(grid.nodes)
    clock = clock if to_noise else clock.flip(0)
    levels = flow.level_at(clock.to(x.device)).rows()
    finite: list[Tensor] = []

    def rate(i: int, z: Tensor) -> Tensor:
        value = flow.noise_part(z.to(x.dtype), levels[i]).double()
        finite.append(torch.isfinite(value.detach()).all())
        return value - flow.noise_share(levels[i]).square() * z

    with torch.set_grad_enabled(differentiable):
        rule = Adams(clock, grid.chosen_order, grid.fine)
        z = rule.solve(rate, x.double() / flow.scale(levels[0]))
        end = (flow.scale(levels[-1]) * z).to(x.dtype)
    check_finite(owner, end, nodes=torch.stack(finite), clock=clock, partial=end)
    return end


def _checked_fractions(fractions: Tensor | Sequence[float], like: Tensor) -> Tensor:
    """F numbers in [0, 1] as [F, 1, 1] float64 where ``like`` is."""
    f = torch.as_tensor(fractions, dtype=torch.float64, device=like.device)
    if f.ndim != 1 or not bool(((f >= 0) & (f <= 1)).all()):
        raise ValueError(
            "interpolate needs a row of fractions in [0, 1], 0 for the first latent and 1 for the "
            f"second; got {f.tolist()}."
        )
    return f[:, None, None]
