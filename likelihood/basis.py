"""Orthonormal bases to draw probes in: where the Jacobian is nearly diagonal, probes say more."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from sde_lib import validation

ORTHOGONAL = 1e-4  # how far from I the products of axes may be, rounded in float32


class Basis(ABC):
    r"""An orthonormal change of coordinates Q.

    Probes :math:`v = Q\,w` with independent signs w are unbiased in every basis, and their
    variance is that of the off-diagonal of :math:`Q^T J Q`.
    """

    def check(self, shape: tuple[int, ...]) -> None:  # noqa: B027
        """Refuse samples of a ``shape`` that has no such coordinates.

        Raises:
            ValueError: Saying what would do.
        """

    @abstractmethod
    def to_data(self, coordinates: Tensor) -> Tensor:
        """Q times ``coordinates``, [..., *shape of a sample], in the same shape."""


@dataclass(frozen=True)
class Pixel(Basis):
    """The coordinates of the data themselves: no change."""

    def to_data(self, coordinates: Tensor) -> Tensor:
        return coordinates


@dataclass(frozen=True)
class Cosine(Basis):
    """The discrete cosine transform (DCT-II, orthonormal) over the last axes of a sample.

    Noised images are nearly uncorrelated in it; over the channels of a colour image it separates
    grey from colour. For vectors, whose order means nothing, it has no reason to help.

    Args:
        axes: Number of axes, the last ones of a sample: 2 for the height and width of an image
            whose channels go their own ways, 3 to take them along.
    """

    axes: int

    def __post_init__(self) -> None:
        validation.count("Cosine", "axes", self.axes)

    def check(self, shape: tuple[int, ...]) -> None:
        if self.axes > len(shape):
            raise ValueError(
                f"Cosine({self.axes}) needs samples of {self.axes} axes or more; got the shape "
                f"{tuple(shape)}. Take Cosine({len(shape)})."
            )

    def to_data(self, coordinates: Tensor) -> Tensor:
        for axis in range(-self.axes, 0):
            matrix = _cosines_like(coordinates.shape[axis], coordinates.dtype, coordinates.device)
            coordinates = torch.movedim(torch.movedim(coordinates, axis, -1) @ matrix, -1, axis)
        return coordinates


def cosines(size: int) -> Tensor:
    """Orthonormal DCT-II, [size, size] float64; row k is the cosine of frequency k."""
    k = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * k[:, None] * (k[None] + 0.5)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


@lru_cache(maxsize=32)
def _cosines_like(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made and moved once: probes are drawn at every node, and a copy would wait there."""
    return cosines(size).to(device, dtype)


@dataclass(frozen=True, eq=False)
class Principal(Basis):
    """The principal axes of the data.

    Args:
        axes: Orthogonal matrix [D, D]; column i is the i-th axis.
    """

    axes: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        square = self.axes.ndim == 2 and self.axes.shape[0] == self.axes.shape[1]
        if not square or not self.axes.is_floating_point() or _slant(self.axes) > ORTHOGONAL:
            raise ValueError(
                "Principal needs an orthogonal matrix [D, D], whose columns are the axes: probes "
                f"would be biased in any other; got shape {tuple(self.axes.shape)}"
                f"{f', off by {_slant(self.axes):.2g}' if square else ''}. "
                "Principal.of(samples) makes one."
            )

    def check(self, shape: tuple[int, ...]) -> None:
        if torch.Size(shape).numel() != len(self.axes):
            raise ValueError(
                f"Principal has {len(self.axes)} axes; got samples of shape {tuple(shape)}, which "
                f"have {torch.Size(shape).numel()} dimensions."
            )

    @classmethod
    def of(cls, samples: Tensor) -> Principal:
        """Eigenvectors of the covariance of ``samples`` [N, ...] in model units."""
        flat = samples.flatten(1).double()
        return cls(torch.linalg.eigh(torch.cov(flat.T).reshape(flat.shape[1], -1)).eigenvectors)

    def to_data(self, coordinates: Tensor) -> Tensor:
        flat = coordinates.reshape(-1, len(self.axes))
        axes = _axes_like(self, flat.dtype, flat.device)
        return (flat @ axes.mT).reshape(coordinates.shape)


@lru_cache(maxsize=4)
def _axes_like(basis: Principal, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As :func:`_cosines_like`, for the few bases that are in use."""
    return basis.axes.to(device, dtype)


def _slant(axes: Tensor) -> float:
    """Largest entry of Q' Q - I; 0 for an orthogonal matrix."""
    axes = axes.double()
    return float((axes.mT @ axes - torch.eye(len(axes), dtype=axes.dtype).to(axes)).abs().max())
