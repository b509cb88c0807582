"""From K-level data to densities and back; the only place that knows about bins."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from likelihood.bits import bits_per_dim
from sde_lib import validation
from sde_lib.noise import Generator, rand
from sde_lib.sde import SDE


class Drawn(Protocol):
    """Points of the model and how their density becomes that of the data."""

    x: Tensor

    def bound(self, log_prob: Tensor) -> Tensor:
        """Nats of the data, [B], from the log-density of ``x``, [B]."""
        ...


@dataclass(frozen=True)
class Dequantized:
    r"""One draw of :math:`x \sim q(x | v)`, with what it takes to bound the probability of v.

    .. math::  \log P(v) \ge E_q \left[ \log p(x) - \log q(x | v) \right]

    Attributes:
        x: Points in model units, [B, ...], float32.
        log_q: Log-density of ``x`` given the levels, nats, in model units, [B] float64.
        t: Time at which ``x`` lies on the flow, where the likelihood has to start; t_min if None.
    """

    x: Tensor
    log_q: Tensor
    t: float | None = None

    def bound(self, log_prob: Tensor) -> Tensor:
        """log p - log q, nats, [B]: its mean bounds log P(v) from below; ``log_prob`` [B]."""
        return log_prob - self.log_q.to(log_prob.device)

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        r"""Bits per dimension :math:`-(\log p - \log q) / (D \ln 2)`, [B]; ``log_prob`` [B]."""
        return bits_per_dim(self.bound(log_prob), self.x[0].numel(), bin_width=1.0)


@dataclass(frozen=True)
class Dequantization(ABC):
    r"""A way to turn levels v into points x of model units, with the density q(x | v) of these.

    The bin of v is :math:`low + w\,[v, v + 1]` with :math:`w = (high - low) / K`. The model gives
    v the mass P(v) of its bin, or of its bin as the process has scaled it by the time at which
    the flow starts. Since q lives on that cell, Jensen's inequality makes
    :math:`E_q[\log p - \log q]` a lower bound on log P(v). The cells do not overlap, so that P
    sums to the mass of the model between ``low`` and ``high``: to one at most.

    Args:
        levels: K, from 2 to 65536.
        low: Where the bin of level 0 starts, in model units.
        high: Where the bin of level K - 1 ends.
    """

    levels: int
    low: float = -1.0
    high: float = 1.0

    metric = "bits_per_dim"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        count = validation.count(owner, "levels", self.levels, at_least=2)
        object.__setattr__(self, "levels", count)
        if self.levels > 2**16:
            raise ValueError(
                f"{owner} takes at most 65536 levels, since a float32 hardly tells "
                f"more apart; got levels={self.levels}. Treat the data as continuous, levels=null."
            )
        validation.real(owner, "high", self.high, above=self.low)

    @property
    def bin_width(self) -> float:
        """Width w of one bin in model units."""
        return (self.high - self.low) / self.levels

    def start_time(self, sde: SDE) -> float | None:
        """Time at which a draw lies on the flow of ``sde``; None for t_min."""
        return None

    @abstractmethod
    def encode(self, values: Tensor, generator: Generator = None) -> Tensor:
        """Levels [B, ...] as the float32 points [B, ...] that a model is to be trained on."""

    def decode(self, x: Tensor) -> Tensor:
        """The level [B, ...] in whose bin each point lies; outside of all, the nearest."""
        return self._bins(x).to(torch.uint8 if self.levels <= 256 else torch.int64)

    @torch.no_grad()
    def draw(
        self, values: Tensor, generator: Generator = None, *, sde: SDE | None = None
    ) -> Dequantized:
        """One draw from q(x | v) with its log-density.

        Args:
            values: Levels in 0..K-1, integers, [B, ...].
            generator: Source of the noise; a ``PerSample`` makes it independent of the batch.
            sde: The process of the model; needed where the draw starts later than t_min.

        Raises:
            ValueError: For values that are no levels.
        """
        self.check(values)
        return self._draw(values, generator, sde)

    def check(self, values: Tensor) -> None:
        """Refuse what are not levels [B, ...]; waits for the device.

        Raises:
            ValueError: Saying what ``values`` are instead.
        """
        wanted = f"{type(self).__name__} needs integers in 0..{self.levels - 1}, [B, ...]"
        kind = f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"
        whole = not (values.is_floating_point() or values.is_complex())
        if not whole or values.dtype == torch.bool or values.ndim < 2 or values.numel() == 0:
            raise ValueError(f"{wanted}; got {kind}. Pass the levels, not their encoding.")
        low, high = (int(end) for end in values.long().aminmax())
        if low < 0 or high >= self.levels:
            raise ValueError(f"{wanted}; got {kind}, values {low} to {high}. Check levels.")

    def measure(
        self, log_prob: Tensor, shape: tuple[int, ...], log_q: Tensor | None = None
    ) -> Tensor:
        """Bits per dimension [B] of data of one sample's ``shape``.

        Args:
            log_prob: Log-density at a draw, nats, [B].
            shape: Of one sample.
            log_q: That of the draw, [B]; may be left out where it is the same for every draw.
        """
        log_q = self._constant_log_q(shape) if log_q is None else log_q
        return bits_per_dim(log_prob - log_q, math.prod(shape), self.levels, bin_width=1.0)

    @abstractmethod
    def _draw(self, values: Tensor, generator: Generator, sde: SDE | None) -> Dequantized:
        """``draw`` for values that have been checked."""

    def _constant_log_q(self, shape: tuple[int, ...]) -> float:
        raise ValueError(
            f"{type(self).__name__}.measure needs log_q, which differs from draw to draw; got "
            "None. Pass log_q of the draw, or use draw(...).bits_per_dim(log_prob)."
        )

    def _bins(self, x: Tensor) -> Tensor:
        levels = torch.floor((x.double() - self.low) / self.bin_width)
        return levels.clamp(0, self.levels - 1)

    def _place(self, values: Tensor, u: Tensor, alpha: float = 1.0) -> Tensor:
        """Points at the part ``u`` of the way through their bins, times ``alpha``, as float32."""
        x = (alpha * (self.low + self.bin_width * (values + u))).float()
        strayed = self._bins(x.double() / alpha) != values  # rounded onto the edge of the bin:
        u = u.clamp(2**-8, 1 - 2**-8)  # a step back inside
        inside = (alpha * (self.low + self.bin_width * (values + u))).float()
        return torch.where(strayed, inside, x)


@dataclass(frozen=True)
class UniformDequantization(Dequantization):
    r"""Spreads each of K levels evenly over its bin: :math:`x = low + (high - low)(v + u) / K`.

    By Jensen's inequality the expected log-density of x, in bins, bounds the log-probability of v
    from below: bits/dim with uniform dequantization is an upper bound on the discrete code length.
    It is met where the density is flat within every bin; :math:`\log q = -D \log w`.

    Args:
        levels: K, from 2 to 65536.
        low: Where the bin of level 0 starts, in model units.
        high: Where the bin of level K - 1 ends.
    """

    def encode(self, values: Tensor, generator: Generator = None) -> Tensor:
        """Levels [B, ...] as float32 points, each uniform in its bin."""
        u = rand(values.shape, generator, device=values.device, dtype=torch.float64)
        return self._place(values, u)

    def _draw(self, values: Tensor, generator: Generator, sde: SDE | None) -> Dequantized:
        x = self.encode(values, generator)
        constant = self._constant_log_q(values.shape[1:])
        return Dequantized(x, x.new_full((len(x),), constant, dtype=torch.float64))

    def _constant_log_q(self, shape: tuple[int, ...]) -> float:
        return -math.prod(shape) * math.log(self.bin_width)


@dataclass(frozen=True)
class TruncatedNormalDequantization(Dequantization):
    r"""Lets the process itself dequantize: the flow starts where its noise just fills the bins.

    With c the centre of the bin of v and eps standard normal truncated to :math:`\pm b`,

    .. math::  x = \alpha c + \sigma \varepsilon \quad\text{at the time where}\quad
               \sigma / \alpha = w / (2 b)

    fills the cell :math:`\alpha\,[c - w/2, c + w/2]`. With Z the mass of a standard normal within
    :math:`\pm b`, :math:`\log q = -\sum_d [\varepsilon_d^2/2 + \log(\sqrt{2\pi} \sigma Z)]`.
    Nothing is learned, and no density at t_min is taken for one at t = 0.

    The trap: the model must have been trained on bin centres, which is what ``encode`` gives. Then
    p is at least P_data(v) times the normal density, so that the bound reaches log P_data(v) up to
    -log Z a dimension, 0.0027 nats if b = 3. What any model loses is the KL divergence from q to
    its own density within the cell: one of uniformly dequantized data is flat there and loses
    :attr:`flat_gap` a dimension, 0.389 nats (0.561 bits/dim) if b = 3. It is to be evaluated with
    :class:`UniformDequantization`.

    Use log q of the draw rather than its mean, the entropy: log p and log q rise and fall
    together, and their difference has next to no variance where the model is right.

    Reference: Zheng et al., Improved Techniques for Maximum Likelihood Estimation for Diffusion
    ODEs, 2023.

    Args:
        levels: K, from 2 to 65536.
        low: Where the bin of level 0 starts, in model units.
        high: Where the bin of level K - 1 ends.
        width: b, half the width of a cell in standard deviations of the noise, > 0.
    """

    width: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.real(type(self).__name__, "width", self.width, above=0.0)

    @property
    def noise_ratio(self) -> float:
        """sigma / alpha where the flow starts, w / (2 b)."""
        return self.bin_width / (2 * self.width)

    @property
    def log_mass(self) -> float:
        """log Z: of the mass of a standard normal within plus and minus ``width``."""
        return math.log(math.erf(self.width / math.sqrt(2)))

    @property
    def flat_gap(self) -> float:
        r"""Nats a dimension that the bound loses if the density is flat within the cells.

        The KL divergence from q to the uniform distribution, with the entropy of q in closed form:

        .. math::  \log(2 b) - \tfrac12 \log(2 \pi e) - \log Z + b\, \varphi(b) / Z
        """
        density = math.exp(-0.5 * self.width**2) / math.sqrt(2 * math.pi)
        edge = self.width * density / math.exp(self.log_mass)
        normal_entropy = 0.5 * math.log(2 * math.pi * math.e)
        return math.log(2 * self.width) - normal_entropy - self.log_mass + edge

    def start_time(self, sde: SDE) -> float:
        """Time at which sigma / alpha is w / (2 b).

        Raises:
            ValueError: If the noise of ``sde`` is never so weak, or never so strong.
        """
        log_snr = -2 * math.log(self.noise_ratio)
        low, high = sde.log_snr_range()
        if not low - 1e-9 <= log_snr <= high + 1e-9:
            raise ValueError(self._out_of_range(math.exp(-0.5 * high), math.exp(-0.5 * low)))
        return float(sde.time_at(torch.tensor(log_snr, dtype=torch.float64)))

    def _out_of_range(self, least: float, most: float) -> str:
        half = 0.5 * self.bin_width
        return (
            "TruncatedNormalDequantization starts the flow where sigma / alpha = bin_width / "
            f"(2 width) = {self.noise_ratio:.4g}; the process has {least:.4g} at t_min and "
            f"{most:.4g} at t_max. Take a width from {half / most:.4g} to {half / least:.4g}, or "
            "a process (sigma_min, t_min) that starts with less noise, or UniformDequantization."
        )

    def encode(self, values: Tensor, generator: Generator = None) -> Tensor:
        """Levels [B, ...] as the float32 centres of their bins; nothing random happens."""
        return self._centres(values).float()

    def _centres(self, values: Tensor) -> Tensor:
        return self.low + self.bin_width * (values.double() + 0.5)

    def _draw(self, values: Tensor, generator: Generator, sde: SDE | None) -> Dequantized:
        if sde is None:
            raise ValueError(
                "TruncatedNormalDequantization draws where the noise of the process fills the "
                "bins; got sde=None. Pass the process of the model, draw(values, sde=sde)."
            )
        t = self.start_time(sde)
        alpha = float(sde.alpha(torch.tensor(t, dtype=torch.float64)))
        u = rand(values.shape, generator, device=values.device, dtype=torch.float64)
        noise = truncated_normal(u, self.width)
        log_sigma = math.log(alpha * self.noise_ratio)
        constant = 0.5 * math.log(2 * math.pi) + log_sigma + self.log_mass
        log_q = -(0.5 * noise.square() + constant).flatten(1).sum(1)
        return Dequantized(self._place(values, 0.5 + 0.5 * noise / self.width, alpha), log_q, t)


def truncated_normal(u: Tensor, width: float) -> Tensor:
    r"""Standard normal numbers truncated to plus and minus ``width``, by the inverse CDF.

    With s = u - 1/2 and Z the mass within, :math:`z = -\mathrm{sign}(s)\, \Phi^{-1}(1/2 - |s| Z)`:
    both tails are taken from the lower one, where float64 has digits to spare.

    Args:
        u: Uniform in [0, 1), float64, any shape.
        width: Where to truncate, > 0.
    """
    side = u - 0.5
    tail = 0.5 - side.abs() * math.erf(width / math.sqrt(2))
    return (-side.sign() * torch.special.ndtri(tail)).clamp(-width, width)
