"""A trained model against the noise level: its error, that of others, and the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from score_models import ScoreModel
from sde_lib.sde import SDE, expand_like

BATCH = 256  # samples a forward pass
GROUPS = 4  # whose gradients tell what all agree on from what differs


def even_levels(sde: SDE, count: int) -> Tensor:
    """Levels u = log(sigma/alpha) of a process from t_min to t_max, evenly spaced, [count]."""
    low, high = sde.log_snr_range()
    return torch.linspace(-0.5 * high, -0.5 * low, count, dtype=torch.float64)


@dataclass(frozen=True)
class Errors:
    """Error of the noise estimate of each sample at each level.

    Attributes:
        clock: u, [L].
        each: Squared error over D, [M, L] float64; a sample has one noise for all levels, and what
            the power of that noise is off by chance is taken off in proportion.
    """

    clock: Tensor
    each: Tensor

    @property
    def mean(self) -> Tensor:
        """Over samples, [L]."""
        return self.each.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """Of the mean, [L]."""
        return self.each.std(0) / math.sqrt(len(self.each))

    def integral(self) -> tuple[float, float]:
        """Of the mean over u with its standard error: nats a dimension that the data cost."""
        values = torch.trapezoid(self.each, self.clock, dim=1)
        return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@torch.no_grad()
def noise_errors(
    model: ScoreModel, x0: Tensor, noise: Tensor, clock: Tensor, cond: Tensor | None = None
) -> Errors:
    """The errors of ``model``, in evaluation mode.

    Args:
        model: Its weights decide the device.
        x0: Samples [M, ...] in model units.
        noise: Standard normal, like ``x0``.
        clock: u, [L].
        cond: Of each sample, where the model wants it.
    """
    rows = range(0, len(x0), BATCH)
    parts = [
        torch.stack(
            [
                _error(model, x0[i : i + BATCH], noise[i : i + BATCH], u, _rows(cond, i))
                for u in clock
            ]
        )
        for i in rows
    ]
    each = torch.cat(parts, 1).mT.double().cpu()
    power = noise.flatten(1).double().square().mean(1).cpu() - 1
    return Errors(clock, each - power[:, None] * _slope(each, power))


def _slope(each: Tensor, power: Tensor) -> Tensor:
    """Regression of the errors [M, L] on the excess ``power`` [M] of the noise, [L].

    What the mean of ``power`` is by chance, 0 being known, the errors are by chance in this
    proportion: where nothing of the noise can be foreseen, the error is the noise itself.
    """
    centred = power - power.mean()
    return centred @ each / centred.square().sum().clamp(min=1e-300)


def _rows(cond: Tensor | None, start: int) -> Tensor | None:
    return None if cond is None else cond[start : start + BATCH]


def _error(model: ScoreModel, x0: Tensor, noise: Tensor, u: Tensor, cond: Tensor | None) -> Tensor:
    """Per-sample error [B] at one level."""
    x, t, _, cond = noised(model, x0, noise, cond, u)
    return (model(x, t, cond) - noise.to(x)).square().flatten(1).mean(1)


def noised(
    model: ScoreModel, x0: Tensor, noise: Tensor, cond: Tensor | None, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x_t [B, ...], t [B], sigma [B] and the condition at the level ``u`` [], on the device."""
    device = next(model.parameters()).device
    x0, noise = x0.to(device), noise.to(device)
    t = model.sde.time_at(-2 * u).to(device).expand(len(x0))
    alpha, sigma = (c.to(x0.dtype) for c in (model.sde.alpha(t), model.sde.sigma(t)))
    x = expand_like(alpha, x0) * x0 + expand_like(sigma, x0) * noise
    return x, t, sigma, None if cond is None else cond.to(device)


@dataclass(frozen=True)
class Gradients:
    r"""Gradients of the error with respect to the weights, by noise level, without any weighting.

    With g_i the gradient of the error of sample i, the mean of \|g_i\|² is \|E g\|², on which the
    samples agree, plus a variance. Groups tell them apart without bias: with G gradients of groups
    of B samples, their mean m and the variance of one group v, \|E g\|² is estimated by
    \|m\|² - v/G and the variance of one sample by B v.

    Attributes:
        agreed: \|E g\|², [L]; its estimate may be negative where it is small.
        square: Mean of \|g_i\|² over samples, [L].
        samples: How many it is of.
    """

    agreed: Tensor
    square: Tensor
    samples: int

    @property
    def norm(self) -> Tensor:
        """Root mean square of the norm of one sample's gradient, [L]."""
        return self.square.sqrt()


def gradients(
    model: ScoreModel, x0: Tensor, noise: Tensor, clock: Tensor, cond: Tensor | None = None
) -> Gradients:
    """The gradients of ``model`` on all of ``x0`` [M, ...], M a multiple of ``GROUPS``.

    The weights are left as they are, and want no gradient afterwards.
    """
    size = len(x0) // GROUPS
    weights = [p.requires_grad_() for p in model.parameters()]
    found = [_moments(model, weights, x0, noise, u, cond, size) for u in clock]
    model.requires_grad_(False)
    agreed, square = torch.tensor(found, dtype=torch.float64).mT
    return Gradients(agreed, square, size * GROUPS)


def _moments(
    model: ScoreModel,
    weights: list[Tensor],
    x0: Tensor,
    noise: Tensor,
    u: Tensor,
    cond: Tensor | None,
    size: int,
) -> tuple[float, float]:
    """Squared norm of the mean gradient, and mean squared norm of one sample's, at one level."""
    rows = []
    for i in range(0, size * GROUPS, size):
        part = slice(i, i + size)
        own = None if cond is None else cond[part]
        loss = _error(model, x0[part], noise[part], u, own).mean()
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        rows.append(torch.cat([g.double().flatten() for g in found if g is not None]))
    stack = torch.stack(rows)
    mean = stack.mean(0)
    variance = float((stack - mean).square().sum()) / (GROUPS - 1)
    agreed = float(mean.square().sum()) - variance / GROUPS
    return agreed, agreed + size * variance


@dataclass(frozen=True)
class OwnLevels:
    """How an objective spreads its draws over the levels, and how it weighs them.

    Attributes:
        density: Of its draws on the levels asked for, per unit of u, [L].
        weight: Root mean square of what it multiplies the error by, [L]; 0 without draws.
    """

    density: Tensor
    weight: Tensor

    def share(self, gradients: Gradients) -> Tensor:
        """Share of each level in the mean of the squared norm of one sample's gradient, [L]."""
        each = self.density * self.weight.square() * gradients.square
        return each / each.sum()


DRAWS = 100_000  # even in probability


def own_levels(objective: object, sde: SDE, clock: Tensor) -> OwnLevels | None:
    """The draws of an objective in cells about the levels ``clock`` [L], evenly spaced.

    Returns:
        None where it does not draw times by a ``TimeSampler``.
    """
    times, weight = getattr(objective, "times", None), getattr(objective, "weight", None)
    if times is None or weight is None:
        return None
    even = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    t, importance = times.quantile(sde, even)
    level = sde.level(t)
    step = float(clock[1] - clock[0])
    cell = torch.floor((level.noise_ratio.log() - clock[0]) / step + 0.5).long()
    inside = (cell >= 0) & (cell < len(clock))
    factor = (importance * weight(level) / level.sigma**2).square()[inside]
    zeros = torch.zeros(len(clock), dtype=torch.float64)
    count = zeros.index_add(0, cell[inside], torch.ones_like(factor))
    square = zeros.index_add(0, cell[inside], factor) / count.clamp(min=1)
    return OwnLevels(count / DRAWS / step, square.sqrt())
