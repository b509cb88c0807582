"""What the output of a variance head means, and the loss that teaches it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from score_models.model import ScoreModel
from score_models.times import probabilities
from score_models.variance_head import HeadOutput, VarianceHead, log_ratio
from sde_lib import validation
from sde_lib.noise import Generator, randn_like
from sde_lib.reverse_variance import AnalyticVariance, ForwardVariance, posterior
from sde_lib.sde import SDE, Level, expand_like
from sde_lib.state_variance import (
    InterpolatedVariance,
    ResidualVariance,
    StateVariance,
)


@dataclass(frozen=True)
class HeadKind(ABC):
    """One way to a variance: where it is trained, by which loss, and what comes of the output.

    Args:
        analytic: The isotropic variance of the same model, from which a head starts.
    """

    analytic: AnalyticVariance

    def levels(self, sde: SDE, n: int, generator: Generator) -> tuple[Level, Level]:
        """Levels (earlier, later) to train ``n`` samples at, [n] float64: even in log SNR, one
        in each of n equal parts."""
        low, high = sde.log_snr_range()
        part = probabilities(n, generator, stratified=True)
        level = sde.level(sde.time_at(low + part * (high - low)))
        return level, level

    @abstractmethod
    def loss(
        self, out: Tensor, noise: Tensor, eps_hat: Tensor, earlier: Level, later: Level
    ) -> Tensor:
        """Loss of each coordinate [B, ...]: each kind says in what unit.

        Args:
            out: Of the head, [B, ...].
            noise: eps, [B, ...].
            eps_hat: The model's estimate of it, [B, ...], no gradient.
            earlier: Level at which the step ends, [B].
            later: That of the state, [B].
        """

    @abstractmethod
    def variance(self, model: ScoreModel, head: VarianceHead) -> StateVariance:
        """The variance of the steps of ``model`` that a trained ``head`` makes."""

    def base(self, u: Tensor) -> Tensor:
        """The analytic share of noise that is unresolved at log(sigma / alpha) = u, > 0."""
        return self.analytic.unresolved_at(u).clamp(min=1e-9)


class Residual(HeadKind):
    r"""NPR-DPM: :math:`u = E[(\varepsilon - \hat\varepsilon)^2 | x_t] = \mathrm{base}\, e^{out}`,
    from the analytic value on.

    .. math::  L = \log \frac{u}{base} + \frac{(\varepsilon - \hat\varepsilon)^2}{u}

    That is, but for a constant, twice the nats of a normal density of variance u.
    In expectation this is least at the conditional mean, as the squared error of the paper is,
    and it is what the bound charges where a step is large. The target is heavy-tailed and spans
    decades; here each level and each coordinate counts alike. On a mixture with a known answer,
    1500 iterations each, the RMS error of log u at log SNR -8, -4, -2 and 0 was 0.06, 0.03, 0.06
    and 0.08, with the squared error of the target in units of ``base`` 0.10, 0.06, 0.10 and 0.09,
    without these units 0.75, 0.36, 0.15 and 0.08.
    """

    def loss(
        self, out: Tensor, noise: Tensor, eps_hat: Tensor, earlier: Level, later: Level
    ) -> Tensor:
        base = expand_like(self.base(later.noise_ratio.log()), out).to(out)
        return out + (noise - eps_hat).square() / base * torch.exp(-out)

    def variance(self, model: ScoreModel, head: VarianceHead) -> StateVariance:
        output = HeadOutput(model, head)

        def unresolved(x: Tensor, t: Tensor) -> Tensor:
            out = output(x, t)
            return expand_like(self.base(log_ratio(model, t)), out).to(out) * out.exp()

        return ResidualVariance(unresolved)


class SecondMoment(Residual):
    r"""SN-DPM: :math:`h = E[\varepsilon^2 | x_t] = \hat\varepsilon^2 + \mathrm{base}\, e^{out}`.

    .. math::  L = \log h + \varepsilon^2 / h

    Twice the nats, as that of :class:`Residual`.
    What is left open is h less eps_hat², so that nothing has to be cut off at 0. An output that is
    h itself cannot say it where it is a small difference: on the mixture of :class:`Residual` it
    missed by factors of e^4 to e^10 at log SNR below 0, this one by 10 to 30 %.
    """

    def loss(
        self, out: Tensor, noise: Tensor, eps_hat: Tensor, earlier: Level, later: Level
    ) -> Tensor:
        base = expand_like(self.base(later.noise_ratio.log()), out).to(out)
        second = eps_hat.square() + base * out.exp()
        return second.log() + noise.square() / second


@dataclass(frozen=True)
class Interpolation(HeadKind):
    r"""Improved DDPM: :math:`w = (out + 1) / 2`, taught by the bound in ``steps`` steps.

    The loss is the KL divergence of a step, in nats. The mean is held fixed. As in the published
    code w is not confined to [0, 1]: beyond it v extrapolates, which data of a variance other than
    1 need. The best w depends on the size of a step, which the head is not told: take T near the
    number of steps that samples will have.

    Args:
        steps: T of the grid, even in log SNR, whose neighbours a sample is moved between.
    """

    steps: int = 50

    def __post_init__(self) -> None:
        validation.count("Interpolation", "steps", self.steps)

    def levels(self, sde: SDE, n: int, generator: Generator) -> tuple[Level, Level]:
        """Neighbours of the grid, drawn evenly."""
        low, high = sde.log_snr_range()
        row = (probabilities(n, generator, stratified=True) * self.steps).floor()
        ends = (sde.time_at(low + (row + k) / self.steps * (high - low)) for k in (1, 0))
        earlier, later = (sde.level(t) for t in ends)
        return earlier, later

    def loss(
        self, out: Tensor, noise: Tensor, eps_hat: Tensor, earlier: Level, later: Level
    ) -> Tensor:
        excess = interpolated(out, earlier, later)
        return step_cost(excess, (noise - eps_hat).square(), earlier, later)

    def variance(self, model: ScoreModel, head: VarianceHead) -> StateVariance:
        return interpolated_variance(model, head)


def interpolated_variance(model: ScoreModel, head: VarianceHead) -> InterpolatedVariance:
    """The variance of the steps of ``model`` that a ``head`` makes whose output is that of
    :class:`Interpolation`."""
    output = HeadOutput(model, head)
    return InterpolatedVariance(lambda x, t: 0.5 * (output(x, t) + 1))


def interpolated(out: Tensor, earlier: Level, later: Level) -> Tensor:
    r""":math:`\log(v / \tilde\beta)` of a step, for the output [B, ...] of a head of
    :class:`Interpolation`."""
    range_ = torch.log(ForwardVariance()(earlier, later) / posterior(earlier, later)[0])
    return 0.5 * (out + 1) * expand_like(range_, out).to(out)


def step_cost(excess: Tensor, square: Tensor, earlier: Level, later: Level) -> Tensor:
    r"""KL divergence of a step from that of the posterior, nats of each coordinate.

    With :math:`r = \log(v / \tilde\beta)` and c the factor of x_0 in the mean,

    .. math::  \tfrac12 \left(r + e^{-r} - 1 + \frac{c^2 \varrho_t^2}{\tilde\beta}\, e^{-r}
               (\varepsilon - \hat\varepsilon)^2 \right)

    Args:
        excess: r, broadcasting against ``square``.
        square: Squared noise error, [B, ...].
        earlier: Level at which the step ends, [B].
        later: That of the state, [B].
    """
    variance, pull = posterior(earlier, later)
    share = expand_like((pull * later.noise_ratio).square() / variance, square).to(square)
    return 0.5 * (excess + torch.expm1(-excess) + share * square * torch.exp(-excess))


KINDS: dict[str, type[HeadKind]] = {
    "npr": Residual,
    "sn": SecondMoment,
    "learned": Interpolation,
}


def head_loss(
    kind: HeadKind,
    model: ScoreModel,
    head: VarianceHead,
    x0: Tensor,
    generator: Generator,
    cond: Tensor | None = None,
) -> Tensor:
    """Mean loss of a coordinate of one batch ``x0`` [B, ...], in the unit of ``kind``; one pass
    of the frozen model.

    Args:
        kind: What the output means.
        model: Frozen, in evaluation mode.
        head: In training.
        x0: Data in model units.
        generator: Source of levels and noise.
        cond: Of each sample, where the model wants it.
    """
    earlier, later = kind.levels(model.sde, len(x0), generator)
    earlier, later = (Level(*(c.to(x0.device) for c in level)) for level in (earlier, later))
    noise = randn_like(x0, generator)
    x = expand_like(later.alpha.to(x0), x0) * x0 + expand_like(later.sigma.to(x0), x0) * noise
    with torch.no_grad():
        eps_hat = model.noise(x, later.t, cond)
        features = model.features(x, later.t, cond)
    out = head(features, later.noise_ratio.log().to(features))
    return kind.loss(out, noise, eps_hat, earlier, later).mean()
