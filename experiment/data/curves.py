"""Points along noisy curves of the plane, whose density is a sum over the curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiment.data.dataset import Dataset
from experiment.data.planar import planar, uniform


@dataclass(frozen=True)
class BlurredCurve:
    r"""The density :math:`\sum_k w_k\, k(x - c_k)` of a curve that was smeared out by noise.

    The noise is Gaussian of the stated std, plus, where ``box`` is not 0, a number uniform in
    [0, box] (in [-box, 0] where ``side`` is -1) on each axis. The sum is converged, not a sample:
    the nodes are those of a Gauss rule, less than a std apart, and its error falls as
    :math:`e^{-2 \pi^2 (s/h)^2}` with their distance h.

    Args:
        nodes: Points on the curve c_k, [K, 2], float64.
        weights: w_k > 0, [K]; they add up to 1.
        std: s, of the Gaussian noise.
        box: Width of the uniform noise.
        side: Direction of the uniform noise at each node, +1 or -1, [K]; None is +1.
    """

    nodes: Tensor
    weights: Tensor
    std: float
    box: float = 0.0
    side: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Log-density [B] in nats at ``x`` [B, 2]; worked out in float64, in chunks."""
        parts = [self._log_prob(part) for part in x.double().split(512)]
        return torch.cat(parts).to(x.dtype) if parts else x.new_empty(0)

    def _log_prob(self, x: Tensor) -> Tensor:
        offset = x[:, None] - self.nodes.to(x.device)  # [B, K, 2]
        if self.side is not None:
            offset = offset * self.side.to(x.device)[:, None]
        kernel = self._gaussian(offset) if self.box == 0 else self._smeared(offset)
        return (kernel.sum(2) + self.weights.to(x.device).log()).logsumexp(1)

    def _gaussian(self, offset: Tensor) -> Tensor:
        return -0.5 * (offset / self.std).square() - 0.5 * math.log(2 * math.pi * self.std**2)

    def _smeared(self, offset: Tensor) -> Tensor:
        """Log of (Phi(d/s) - Phi((d - box)/s)) / box."""
        # Symmetric about the middle of the box; in the lower tail log_ndtr keeps its digits.
        centred = (offset - self.box / 2).abs()
        upper = torch.special.log_ndtr((self.box / 2 - centred) / self.std)
        lower = torch.special.log_ndtr((-self.box / 2 - centred) / self.std)
        return upper + torch.log(-torch.expm1(lower - upper)) - math.log(self.box)


def gauss_rule(start: float, end: float, points: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes [points] in (start, end) and weights [points] that add up to 1."""
    import numpy

    nodes, weights = map(torch.from_numpy, numpy.polynomial.legendre.leggauss(points))
    return start + (end - start) * (nodes + 1) / 2, weights / 2


def two_moons(train_size: int = 100_000, test_size: int = 10_000, seed: int = 0) -> Dataset:
    """Two interleaved half-circles of radius 2 with noise of std 0.2.

    scikit-learn's moons with noise 0.1, then 2x + (-1, -0.2); the arcs are filled at random, not
    at even steps.

    Reference: Grathwohl et al., FFJORD, 2019 (toy data).

    Args:
        train_size: Number of training samples.
        test_size: Number of test samples.
        seed: Of the generator.
    """
    std = 0.2

    def arcs(angle: Tensor, inner: Tensor) -> Tensor:
        outer = torch.stack([2 * angle.cos() - 1, 2 * angle.sin() - 0.2], 1)
        return torch.where(inner[:, None], torch.tensor([0.0, 0.6]).double() - outer, outer)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        inner = torch.rand(n, generator=generator) < 0.5
        return arcs(math.pi * uniform(n, generator), inner) + std * _normal(n, generator)

    angle, weights = gauss_rule(0, math.pi, 96)
    nodes = torch.cat([arcs(angle, torch.full((96,), inner)) for inner in (False, True)])
    density = BlurredCurve(nodes, torch.cat([weights, weights]) / 2, std)
    return planar("two_moons", draw, density, 2.3939, train_size, test_size, seed)


def swiss_roll(train_size: int = 100_000, test_size: int = 10_000, seed: int = 0) -> Dataset:
    """The roll (t cos t, t sin t)/5 with t uniform in [1.5 pi, 4.5 pi] and noise of std 0.2.

    Reference: Grathwohl et al., FFJORD, 2019 (toy data).

    Args:
        train_size: Number of training samples.
        test_size: Number of test samples.
        seed: Of the generator.
    """
    std, start, end = 0.2, 1.5 * math.pi, 4.5 * math.pi

    def roll(t: Tensor) -> Tensor:
        return torch.stack([t * t.cos(), t * t.sin()], 1) / 5

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return roll(start + (end - start) * uniform(n, generator)) + std * _normal(n, generator)

    t, weights = gauss_rule(start, end, 256)
    return planar(
        "swiss_roll",
        draw,
        BlurredCurve(roll(t), weights, std),
        2.6697,
        train_size,
        test_size,
        seed,
    )


def two_spirals(train_size: int = 100_000, test_size: int = 10_000, seed: int = 0) -> Dataset:
    r"""Two spiral arms of one and a half turns with noise of std 0.1.

    .. math::  \pm\bigl((-n \cos n,\ n \sin n) + U[0, 0.5]^2\bigr) / 3,
               \qquad n = 3\pi\sqrt{U[0, 1]}

    Reference: Grathwohl et al., FFJORD, 2019 (toy data).

    Args:
        train_size: Number of training samples.
        test_size: Number of test samples.
        seed: Of the generator.
    """
    std, box, end = 0.1, 0.5 / 3, 3 * math.pi

    def arm(n: Tensor) -> Tensor:
        return torch.stack([-n * n.cos(), n * n.sin()], 1) / 3

    def draw(n: int, generator: torch.Generator) -> Tensor:
        jitter = box * uniform(2 * n, generator).reshape(n, 2)
        sign = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
        return sign * (arm(end * uniform(n, generator).sqrt()) + jitter) + std * _normal(
            n, generator
        )

    n, weights = gauss_rule(0, end, 320)
    weights = weights * 2 * n / end  # the density of n, as U = (n / end)²
    density = BlurredCurve(
        torch.cat([arm(n), -arm(n)]),
        torch.cat([weights, weights]) / 2,
        std,
        box,
        side=torch.cat([torch.ones_like(n), -torch.ones_like(n)]),
    )
    return planar("two_spirals", draw, density, 2.6454, train_size, test_size, seed)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    """Standard normal points [n, 2], float64."""
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)
