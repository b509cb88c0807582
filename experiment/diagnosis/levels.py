"""Which noise levels to train on: the error that simple denoisers leave, and a density from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPACING = 0.25  # of log(sigma/alpha) between the levels of a curve
MARGIN = 6.0  # beyond the smallest and the largest scale: the density there is e^-6 of its height
REFERENCE, KERNEL_NUMBERS = 2048, 2**21  # samples of the kernel denoiser, at most
QUERIES, QUERY_NUMBERS = 128, 2048  # samples that it denoises, and more of few numbers
WIDTHS = (0.0, 0.5, 1.0, 2.0, 4.0)  # of its kernel, in nearest-neighbour distances by dimension
DOUBLINGS = 4  # of the samples, that a proposal should survive
SURE = 2.0  # standard errors by which it has to be better


@dataclass(frozen=True)
class Curve:
    r"""Error of a noise estimate against the noise level u, of no estimate at all 1.

    .. math::  e(u) = \frac{1}{D} E \|\varepsilon - \hat\varepsilon(x_0 + \rho\varepsilon)\|^2,
               \qquad u = \log\rho = \log(\sigma/\alpha)

    It goes from 1, where the data hide the noise, to 0, where nothing else is left.

    Args:
        clock: u, increasing, evenly spaced, [L].
        error: e, [L].
        of: Whose error it is.
    """

    clock: Tensor
    error: Tensor
    of: str

    @property
    def falls(self) -> bool:
        """Whether any level is between knowing nothing and knowing all."""
        return bool(((self.error > 0) & (self.error < 1)).any())

    def wanted(self) -> Wanted:
        """The density of training levels that this error asks for.

        Raises:
            ValueError: If no level is between knowing nothing and knowing all.
        """
        if not self.falls:
            raise ValueError(
                f"a density of noise levels needs an error that falls from 1 to 0 within them; "
                f"that of {self.of} does not."
            )
        height = (self.error * (1 - self.error)).clamp(min=0).sqrt()  # a measured one may pass 1
        total = float(height.sum()) * float(self.clock[1] - self.clock[0])
        return Wanted(self.clock, height / total)


@dataclass(frozen=True)
class Wanted:
    r"""The density of training levels :math:`q(u) \propto \sqrt{e\,(1 - e)}`.

    Along the flow the data cost :math:`D\,e(u)` nats an e-fold of noise (the I-MMSE relation), so
    that an excess of the network's error over e costs the same at every u: training should make
    :math:`\int \mathrm{excess}(u)\,du` small. At a level the network regresses a target of unit
    variance, of which the part e cannot be foreseen and the part 1 - e is what there is to find. A
    regression that sees the share q(u) of all draws has the excess :math:`c(u) / q(u)` with c in
    proportion to the noise in its target and to how much it has to find. Taking
    :math:`c = e\,(1 - e)`, :math:`\int c/q` is least, at :math:`\int q = 1`, for
    :math:`q \propto \sqrt{c}` (Cauchy and Schwarz). Both ends are easy and get little: nothing can
    be foreseen where noise is small, and nothing is left over where it is large.

    For one Gaussian direction of standard deviation s it is a hyperbolic secant about
    :math:`\log s` of standard deviation :math:`\pi/2`; data of many scales widen it. That c is
    the product is a choice: the slope :math:`-\frac12 de/du`, which is the mean of
    :math:`e_d (1 - e_d)` over the axes of a Gaussian, was tried too, and moved mean and std by 0.2
    at most on digits, MNIST and planar data.

    Args:
        clock: u, evenly spaced, [L].
        density: q, [L], of unit integral on this grid.
    """

    clock: Tensor
    density: Tensor

    @property
    def _share(self) -> Tensor:
        return self.density / self.density.sum()

    @property
    def mean(self) -> float:
        """Mean of u."""
        return float((self._share * self.clock).sum())

    @property
    def std(self) -> float:
        """Standard deviation of u."""
        return float((self._share * (self.clock - self.mean).square()).sum().sqrt())

    def efficiency(self, density: Tensor) -> float:
        r"""What share of its draws another density p, [L], puts to use.

        .. math::  \left( \int \sqrt{c}\, du \right)^2 \Big/ \int \frac{c}{p}\, du \;\le\; 1

        So many times fewer draws from q have the same excess. Levels that p never draws are left
        out of both integrals: a process may not have them.
        """
        drawn = density > 0
        if not bool(drawn.any()):
            return 0.0
        own, other = self.density[drawn], density[drawn]
        return float(own.sum().square() / ((own.square() / other).sum() * other.sum()))


def with_more_samples(half: float, quarter: float) -> float:
    """What share of its draws a density will put to use by what 16 times the samples ask for.

    Densities near to each other lose the square of how far apart they are. From the losses of what
    a quarter and a half of the samples ask for, by what all ask for, follow the last two steps;
    each further doubling is taken to be shorter, or at least not longer, by the same ratio. What
    half of the samples say is not enough: where few samples see more axes as they become more, as
    on photographs, each doubling moves the density little, and all together far.

    Args:
        half: Efficiency of the density by half of the samples, by that of all.
        quarter: Likewise of a quarter.
    """
    step = math.sqrt(max(0.0, 1 - half))
    before = math.sqrt(max(0.0, 1 - quarter)) - step
    ratio = step / before if before > step else 1.0
    left = step * sum(ratio**k for k in range(1, DOUBLINGS + 1))
    return max(0.0, 1 - left**2)


def levels_for(variances: Tensor, shortest: float) -> Tensor:
    """Even levels u that hold every scale of the data with a margin.

    Args:
        variances: Along principal axes, [D].
        shortest: Another length that may be a scale, >= 0; 0 if there is none.
    """
    scales = variances[variances > 1e-12 * variances.max()].sqrt()
    low = min(float(scales.min()), shortest or math.inf)
    start, end = math.log(low) - MARGIN, math.log(float(scales.max())) + MARGIN
    return start + SPACING * torch.arange(
        math.ceil((end - start) / SPACING) + 1, dtype=torch.float64
    )


def gaussian_curve(variances: Tensor, clock: Tensor, shares: Tensor | None = None) -> Curve:
    r"""Error of the best linear denoiser, in closed form.

    .. math::  e(u) = \frac{1}{D} \sum_d q_d \frac{\lambda_d}{\lambda_d + \rho^2}

    No data of this covariance ask for more error than that, and Gaussian data ask for it.

    Args:
        variances: Along directions of the data, [R].
        clock: u, [L].
        shares: q, how much of a dimension each stands for, [R], in sum D; None: one each.
    """
    shares = torch.ones_like(variances) if shares is None else shares
    relative = variances[None] / (variances[None] + (2 * clock)[:, None].exp())
    return Curve(clock, relative @ (shares / shares.sum()), "the Gaussian of the same covariance")


def simple_curve(
    gaussian: Curve, reference: Tensor, queries: Tensor, generator: torch.Generator
) -> Curve:
    r"""The smaller error of two denoisers that need no training, at each level.

    One is the best linear one, the other the posterior mean of a kernel density of the training
    samples: it finds the structure that is not Gaussian as far as samples are dense enough. Any
    denoiser's error on samples that it has not seen bounds the least possible one from above, so
    the smaller is taken; that of the kernel only where it is below by two standard errors. It is
    measured as the ratio

    .. math::  e(u) = \sum_i \|\varepsilon_i - \hat\varepsilon_i\|^2 \Big/
               \sum_i \|\varepsilon_i\|^2

    which is 1 for whatever noise was drawn where nothing can be removed, and never below 0.

    Args:
        gaussian: Error of the linear one, at the levels wanted.
        reference: Training samples [N, D] in model units, float64.
        queries: Other samples [M, D].
        generator: Of the noise.
    """
    noise = torch.randn(queries.shape, generator=generator, dtype=queries.dtype)
    power, widths = noise.square().mean(1), _widths(reference)
    error = []
    for u, known in zip(gaussian.clock.tolist(), gaussian.error.tolist(), strict=True):
        rho = math.exp(u)
        y = queries + rho * noise
        found = kernel_denoised(y, rho, reference, widths)
        kernels = torch.stack([((y - x) / rho - noise).square().mean(1) for x in found])
        error.append(_surely_less(kernels, power, known))
    found = torch.tensor(error, dtype=torch.float64)
    return Curve(gaussian.clock, found, "the better of a linear and a kernel denoiser")


def _surely_less(errors: Tensor, power: Tensor, known: float) -> float:
    """The best row of ``errors`` [W, M] as a share of ``power`` [M], if surely below ``known``.

    Else ``known``. The row is chosen by one half of the samples and judged by the other.
    """
    row, power = errors[errors[:, ::2].mean(1).argmin(), 1::2], power[1::2]
    if len(power) < 2:
        return known
    found = float(row.mean() / power.mean())
    off = float((row - found * power).std() / power.mean()) / math.sqrt(len(power))
    return found if found + SURE * off < known else known


def kernel_denoised(y: Tensor, rho: float, reference: Tensor, widths: Tensor) -> list[Tensor]:
    r"""Posterior means [B, D] of kernel densities of ``reference`` [N, D], one for each width h.

    .. math::  \hat x_0 = \bar x + \frac{h^2}{h^2 + \rho^2} (y - \bar x), \qquad
               \bar x = \sum_i w_i x_i, \quad w_i \propto e^{-\|y - x_i\|^2 / 2 (h^2 + \rho^2)}
    """
    found = [_kernel_denoised(rows, rho, reference, widths) for rows in y.split(QUERIES)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _kernel_denoised(y: Tensor, rho: float, reference: Tensor, widths: Tensor) -> list[Tensor]:
    """Of so few rows that their distances from all samples stay in a cache."""
    squared = torch.cdist(y, reference).square()
    found = []
    for h in widths.tolist():
        total = h**2 + rho**2
        mean = torch.softmax(-squared / (2 * total), 1) @ reference
        found.append(mean + h**2 / total * (y - mean))
    return found


def _widths(reference: Tensor) -> Tensor:
    """Widths of kernels in units of the nearest-neighbour distance by dimension, [W]."""
    some = reference[: 4 * QUERIES]
    away = torch.cdist(some, reference)
    away[torch.arange(len(some)), torch.arange(len(some))] = math.inf
    nearest = float(away.amin(1).median()) / math.sqrt(reference.shape[1])
    return nearest * torch.tensor(WIDTHS, dtype=torch.float64)
