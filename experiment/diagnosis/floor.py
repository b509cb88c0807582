"""The least possible error at each noise level, of data on a line or plane of known density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiment.data import Dataset

NODES = {1: 4096, 2: 320}  # of the grid along each axis, by the number of axes
REACH = 0.6  # of the half-width of the grid that the data take at first
TAIL = 6.8  # standard deviations beyond which a Gaussian holds less than 1e-11
RESOLVED = 2.0  # cells; a Gaussian of this width is a sum over cells to 1e-34
LEAST = 1e-10  # of the largest density; below it rounding is divided by rounding
MASS_OFF = 0.02  # of the whole, beyond which the grid has missed a part of the density


def known_floor(data: Dataset, clock: Tensor) -> Tensor | None:
    r"""Least possible error e(u), [L] float64: that of E[eps | x_t] itself.

    .. math::  e(u) = 1 - \frac{\rho^2}{D} \int \frac{\|\nabla p_\rho\|^2}{p_\rho}\, dx,
               \qquad p_\rho = p * N(0, \rho^2)

    The density is laid on a grid in model units and blurred by Fourier transforms; as the noise
    grows, the grid is thinned to every other node and made twice as wide. NaN where the noise is
    narrower than the cells and the density has edges that cells cannot show.

    Args:
        data: With a ``log_density``, on one axis or two.
        clock: u = log(sigma/alpha), increasing.

    Returns:
        None where the density is not known, has more axes, or reaches beyond its samples.
    """
    if data.log_density is None or len(data.shape) != 1 or data.shape[0] not in NODES:
        return None
    grid = _Grid.of(data)
    if abs(grid.mass() - 1) > MASS_OFF:
        return None
    grid = grid.normalised()
    return torch.tensor([grid.error(math.exp(u)) for u in clock.tolist()], dtype=torch.float64)


def without_gaps(floor: Tensor, clock: Tensor) -> Tensor:
    """The floor without NaN at its low end: at an edge e is 1 minus a multiple of rho."""
    known = floor.isfinite()
    first = int(known.int().argmax())
    ratio = (clock - clock[first]).exp()
    return torch.where(known, floor, 1 - (1 - floor[first]) * ratio)


class _Grid:
    """A density blurred by ``done`` on an even grid about the middle of the data."""

    def __init__(self, density: Tensor, spacing: float, reach: float) -> None:
        self.density, self.spacing, self.reach = density, spacing, reach
        self.done, self.finest = 0.0, spacing
        self.smooth = _spectrum_at_edge(density) < 1e-6

    @classmethod
    def of(cls, data: Dataset) -> _Grid:
        """That of ``data`` in model units."""
        unused, axes = torch.Generator(), data.shape[0]
        units = data.units
        seen = torch.cat([units.encode(part[:20_000], unused) for part in (data.train, data.test)])
        low, high = seen.double().amin(0), seen.double().amax(0)
        reach = float((high - low).max()) / 2 * 1.2
        nodes = NODES[axes]
        spacing = 2 * reach / REACH / nodes
        along = spacing * (torch.arange(nodes, dtype=torch.float64) - nodes // 2)
        middle = (low + high) / 2
        points = torch.cartesian_prod(*[along] * axes).reshape(-1, axes) + middle
        volume = -units.log_prob(torch.zeros(1, dtype=torch.float64), data.shape)
        near = ((points - middle).abs() <= reach).all(1)
        density = torch.zeros(len(points), dtype=torch.float64)
        density[near] = (data.log_density(units.decode(points[near])) + volume).exp()
        return cls(density.reshape((nodes,) * axes), spacing, reach)

    def normalised(self) -> _Grid:
        """The same with unit mass: near an edge a cell may count twice."""
        return _Grid(self.density / self.mass(), self.spacing, self.reach)

    def mass(self) -> float:
        """Integral of the density."""
        return float(self.density.sum()) * self.spacing**self.density.ndim

    def error(self, rho: float) -> float:
        """The least error at this noise ratio, which does not fall from call to call."""
        if not self.smooth and rho < RESOLVED * self.finest:
            return math.nan
        while self.reach + TAIL * rho > self._half_width:
            self._widen()
        p, slopes = self._blurred(math.sqrt(max(0.0, rho**2 - self.done**2)))
        inside = p > LEAST * p.max()
        information = (sum(s[inside].square() for s in slopes) / p[inside]).sum()
        cell = self.spacing**p.ndim
        return 1 - rho**2 * float(information) * cell / p.ndim

    @property
    def _half_width(self) -> float:
        return self.spacing * len(self.density) / 2

    def _widen(self) -> None:
        """Keep every other node, and as many new ones outside; blurred so that none is missed."""
        blur = 2 * RESOLVED * self.spacing
        p, _ = self._blurred(math.sqrt(max(0.0, blur**2 - self.done**2)))
        nodes, axes = len(p), p.ndim
        wide = torch.zeros_like(p)
        wide[(slice(nodes // 4, nodes // 4 + nodes // 2),) * axes] = p[
            (slice(None, None, 2),) * axes
        ]
        self.density, self.spacing, self.done = wide, 2 * self.spacing, max(blur, self.done)

    def _blurred(self, std: float) -> tuple[Tensor, list[Tensor]]:
        """The density blurred further, and its slope along each axis."""
        nodes, axes = len(self.density), self.density.ndim
        k = 2 * math.pi * torch.fft.fftfreq(nodes, self.spacing, dtype=torch.float64)
        waves = torch.meshgrid(*[k] * axes, indexing="ij")
        kept = torch.exp(-0.5 * std**2 * sum(wave.square() for wave in waves))
        seen = torch.fft.fftn(self.density) * kept
        slopes = [torch.fft.ifftn(1j * wave * seen).real for wave in waves]
        return torch.fft.ifftn(seen).real, slopes


def _spectrum_at_edge(density: Tensor) -> float:
    """Largest wave that the grid can just carry, against the mean: 0 for what it resolves."""
    seen = torch.fft.fftn(density).abs()
    middle = len(density) // 2
    edge = max(float(seen.select(axis, middle).max()) for axis in range(density.ndim))
    return edge / float(seen.flatten()[0])
