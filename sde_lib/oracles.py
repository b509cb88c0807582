"""Densities with everything in closed form at every noise level: what the rest is held to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from sde_lib.noise import Generator, rand, randn
from sde_lib.sde import SDE


class Oracle(ABC):
    """A data distribution whose noised versions N(alpha x_0, sigma²) have known density and score.

    Attributes:
        shape: Shape of one sample, any number of axes.
    """

    shape: tuple[int, ...]

    def log_prob(
        self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None
    ) -> Tensor:
        """Log-density [B] in nats at ``x`` [B, ...]: of data, or of x_t at ``t`` of ``sde``."""
        return self._log_prob(x, *self._scales(x, sde, t))

    def score(self, sde: SDE) -> Callable[[Tensor, Tensor], Tensor]:
        """The exact score function (x [B, ...], t [] or [B]) -> [B, ...] of the noised density."""
        return lambda x, t: self._score(x, *self._scales(x, sde, t))

    def sample(
        self,
        n: int,
        *,
        generator: Generator = None,
        sde: SDE | None = None,
        t: Tensor | float | None = None,
    ) -> Tensor:
        """Draw ``n`` samples [n, ...] of the data, or of x_t if ``sde`` and ``t`` are given."""
        x0 = self._sample(n, generator)
        alpha, sigma = self._scales(x0, sde, t)
        noise = randn(x0.shape, generator, dtype=x0.dtype)
        flat = alpha * x0.reshape(n, -1) + sigma * noise.reshape(n, -1)
        return flat.reshape(x0.shape)

    @abstractmethod
    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    @abstractmethod
    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    @abstractmethod
    def _sample(self, n: int, generator: Generator) -> Tensor: ...

    def _scales(
        self, x: Tensor, sde: SDE | None, t: Tensor | float | None
    ) -> tuple[Tensor, Tensor]:
        """alpha and sigma as [B, 1] or [1, 1], in the dtype of ``x``."""
        if (sde is None) != (t is None):
            raise ValueError("a noised density needs both sde and t; got only one of them.")
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"samples have shape {self.shape}; got a batch of shape {tuple(x.shape)}."
            )
        if sde is None:
            return x.new_ones(1, 1), x.new_zeros(1, 1)
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        return sde.alpha(t).to(x).reshape(-1, 1), sde.sigma(t).to(x).reshape(-1, 1)


class Gaussian(Oracle):
    r"""Gaussian data :math:`N(m, C)`, with diagonal or full covariance.

    The noised density is :math:`N(\alpha m, \alpha^2 C + \sigma^2 I)`; the probability flow maps
    each deviation along a principal axis of C in proportion to its standard deviation.

    Args:
        mean: m, of the shape of one sample (or a number).
        std: Standard deviations, broadcast against ``mean``; give this or ``covariance``.
        covariance: C over the flattened sample, [D, D].
    """

    def __init__(
        self,
        mean: Tensor | float,
        std: Tensor | float | None = None,
        *,
        covariance: Tensor | None = None,
    ) -> None:
        if (std is None) == (covariance is None):
            raise ValueError("Gaussian needs either std or covariance, and not both.")
        mean = torch.as_tensor(mean)
        if covariance is None:
            mean, std = torch.broadcast_tensors(mean, torch.as_tensor(std))
            self.axes = None
            self.variances = std.double().flatten().square()
        else:
            self.variances, self.axes = torch.linalg.eigh(torch.as_tensor(covariance).double())
        if not bool((self.variances >= 0).all()):
            raise ValueError(f"Gaussian needs variances >= 0; got {self.variances.min():g}.")
        if self.variances.numel() != mean.numel():
            raise ValueError(
                f"Gaussian needs a [D, D] covariance over the flattened mean, D = {mean.numel()}; "
                f"got shape {tuple(covariance.shape)}."
            )
        self.shape = tuple(mean.shape)
        self.mean = mean.double().flatten()

    def _rotate(self, x: Tensor) -> Tensor:
        return x if self.axes is None else x @ self.axes.to(x)

    def _rotate_back(self, x: Tensor) -> Tensor:
        return x if self.axes is None else x @ self.axes.to(x).mT

    def _deviation(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Deviation from the mean along the principal axes [B, D], and the variances there."""
        deviation = self._rotate(x.reshape(len(x), -1) - alpha * self.mean.to(x))
        return deviation, alpha**2 * self.variances.to(x) + sigma**2

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        deviation, variance = self._deviation(x, alpha, sigma)
        return -0.5 * (deviation.square() / variance + torch.log(2 * math.pi * variance)).sum(1)

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        deviation, variance = self._deviation(x, alpha, sigma)
        return -self._rotate_back(deviation / variance).reshape(x.shape)

    def _sample(self, n: int, generator: Generator) -> Tensor:
        noise = randn((n, len(self.mean)), generator)
        x = self.mean.to(noise) + self._rotate_back(self.variances.to(noise).sqrt() * noise)
        return x.reshape(n, *self.shape)

    def push(self, sde: SDE, z: Tensor, t: Tensor | float) -> Tensor:
        """The exact probability flow: where ``z`` [B, ...], standard normal, sits at time ``t``.

        Two times related by one ``z`` lie on one solution of the flow.
        """
        alpha, sigma = self._scales(z, sde, t)
        std = (alpha**2 * self.variances.to(z) + sigma**2).sqrt()
        return (alpha * self.mean.to(z) + self._rotate_back(std * z.reshape(len(z), -1))).reshape(
            z.shape
        )


class GaussianMixture(Oracle):
    r"""Mixture of K Gaussians with diagonal covariances, for data of any shape.

    Args:
        means: Centres, [K, ...].
        stds: Standard deviations, [K], or [K, ...] for one each axis, or one number.
        weights: Positive weights [K], normalised here; even if not given.
    """

    def __init__(self, means: Tensor, stds: Tensor | float, weights: Tensor | None = None) -> None:
        means = torch.as_tensor(means).double()
        stds = torch.as_tensor(stds).double()
        stds = stds.reshape(stds.shape + (1,) * (means.ndim - stds.ndim)) if stds.ndim else stds
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        weights = weights.double()
        if weights.shape != means.shape[:1] or not bool((weights > 0).all()):
            raise ValueError(
                f"GaussianMixture needs one positive weight for each of {len(means)} means; "
                f"got {weights.tolist()}."
            )
        if not bool((stds >= 0).all()):
            raise ValueError(f"GaussianMixture needs stds >= 0; got {stds.min():g}.")
        self.shape = tuple(means.shape[1:])
        self.means = means.flatten(1)
        self.variances = stds.expand(means.shape).flatten(1).square()
        self.log_weights = torch.log(weights / weights.sum())

    def _components(
        self, x: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log of weight times density [B, K], deviation and variance [B, K, D], by component."""
        alpha, sigma = alpha.unsqueeze(-1), sigma.unsqueeze(-1)
        deviation = x.reshape(len(x), 1, -1) - alpha * self.means.to(x)
        variance = alpha**2 * self.variances.to(x) + sigma**2
        exponent = deviation.square() / variance + torch.log(2 * math.pi * variance)
        return self.log_weights.to(x) - 0.5 * exponent.sum(-1), deviation, variance

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._components(x, alpha, sigma)[0].logsumexp(1)

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        log_joint, deviation, variance = self._components(x, alpha, sigma)
        responsibility = log_joint.softmax(1).unsqueeze(-1)
        return -(responsibility * deviation / variance).sum(1).reshape(x.shape)

    def noise_variance(self, sde: SDE) -> Callable[[Tensor, Tensor], Tensor]:
        r"""The exact :math:`\mathrm{Var}[\varepsilon | x_t]` by coordinate, (x [B, ...], t) ->
        [B, ...].

        By component the noise is normal with mean :math:`\sigma (x_t - \alpha m) / v` and variance
        :math:`\alpha^2 s^2 / v`, where :math:`v = \alpha^2 s^2 + \sigma^2`; the variance of the
        mixture is the mean of these and the spread of the means.
        """

        def variance(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self._scales(x, sde, t)
            log_joint, deviation, total = self._components(x, alpha, sigma)
            responsibility = log_joint.softmax(1).unsqueeze(-1)
            mean = sigma.unsqueeze(-1) * deviation / total
            spread = (mean - (responsibility * mean).sum(1, keepdim=True)).square()
            within = alpha.unsqueeze(-1) ** 2 * self.variances.to(x) / total
            return (responsibility * (within + spread)).sum(1).reshape(x.shape)

        return variance

    def _sample(self, n: int, generator: Generator) -> Tensor:
        noise = randn((n, self.means.shape[1]), generator)
        cumulative = self.log_weights.exp().cumsum(0)
        uniform = rand((n,), generator, dtype=torch.float64)
        component = torch.searchsorted(cumulative, uniform).clamp(max=len(cumulative) - 1)
        x = self.means[component].to(noise) + self.variances[component].sqrt().to(noise) * noise
        return x.reshape(n, *self.shape)

    def mean(self) -> Tensor:
        """Mean of the data, of the shape of one sample, float64."""
        return (self.log_weights.exp()[:, None] * self.means).sum(0).reshape(self.shape)

    def variance(self) -> Tensor:
        """Variance of each coordinate of the data, of the shape of one sample, float64."""
        weights = self.log_weights.exp()[:, None]
        second = (weights * (self.variances + self.means.square())).sum(0)
        return second.reshape(self.shape) - self.mean().square()
