"""The divergence of a field at a point: exactly, or by Hutchinson's estimator."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice, product
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from likelihood.basis import Basis, Cosine, Pixel
from sde_lib import validation
from sde_lib.noise import Generator, rand, randn

NO_GRAPH = (
    "the score function cannot be differentiated with respect to x: its result does not depend on "
    "x by a graph; does it call detach(), .data, numpy or torch.no_grad()? A likelihood needs its "
    "derivative."
)
# squared distances from cubics that share nodes have the correlations 0.8², 0.4², 0.11², ...:
# 1 + 2 sum, by which their sum varies more than that of independent ones
OVERLAP = 2.63

Field = Callable[[Tensor], Tensor]
Probes = Callable[..., Tensor]


class Spread(NamedTuple):
    """How far an estimate can be trusted.

    Attributes:
        variance: Of the estimate, [B].
        freedom: Degrees of freedom behind that variance, [B].
    """

    variance: Tensor
    freedom: Tensor


class Divergence(ABC):
    """Value and divergence of a field (x [B, ...]) -> [B, ...] whose sample i depends on x_i
    alone.

    One forward pass an evaluation, whatever the number of backward passes; parameters get no
    gradient.

    Attributes:
        random: Whether it takes probes.
    """

    random: ClassVar[bool] = True

    @property
    def allots(self) -> int:
        """Probes of a call on average, if a call may ask for another number of them; else 0."""
        return 0

    @abstractmethod
    def probes(self, x: Tensor, generator: Generator = None) -> Probes:
        """A source of random vectors [k, B, ...] in the shape of ``x``, fresh at every call; where
        it :attr:`allots`, a call takes another k."""

    @abstractmethod
    def passes(self, x: Tensor) -> int:
        """Backward passes that one evaluation costs."""

    @abstractmethod
    def traces(self, value: Tensor, x: Tensor, probes: Tensor, *, create_graph: bool) -> Tensor:
        """Estimates [k, B] of the divergence of ``value`` [B, ...], a function of ``x``."""

    @abstractmethod
    def kept_variance(self, estimates: Tensor) -> Spread:
        """Of the mean of k ``estimates`` [k, B], one probe each kept along a path."""

    @abstractmethod
    def fresh_variance(self, traces: Tensor, nodes: Tensor, weights: Tensor) -> Spread:
        """Of the sum with ``weights`` [N] of the means over probes of ``traces`` [N, k, B], drawn
        anew at each of N ``nodes``; NaN where a node had fewer than k."""

    def in_basis(self, basis: Basis) -> Divergence:
        """The same with probes drawn in ``basis``, where there are probes."""
        return self

    def with_probes(self, num_probes: int) -> Divergence:
        """The same with so many probes an evaluation, where there are probes."""
        return self

    def bases(self, shape: tuple[int, ...]) -> list[Basis]:
        """Those to choose from for samples of ``shape``, the first if nothing speaks against."""
        return [Pixel()]

    def __call__(
        self, function: Field, x: Tensor, probes: Tensor, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``function(x)`` [B, ...] and k estimates of its divergence, [k, B].

        Args:
            function: The field.
            x: Where, [B, ...].
            probes: From :meth:`probes`.
            create_graph: Whether both results can be differentiated in turn.

        Raises:
            ValueError: If the result cannot be differentiated with respect to ``x``.
        """
        # fused attention has neither second derivatives nor batched ones; the plain kernel has
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            if not (create_graph and x.requires_grad):
                x = x.detach().requires_grad_()
            value = _value(function, x)
            if value.shape != x.shape:
                raise ValueError(
                    f"the score function must return the shape of x; got {tuple(value.shape)} for "
                    f"x of shape {tuple(x.shape)}."
                )
            if not value.requires_grad:
                raise ValueError(NO_GRAPH)
            try:
                traces = self.traces(value, x, probes, create_graph=create_graph)
            except RuntimeError as error:
                if "not have been used in the graph" in str(error):  # of its weights alone
                    raise ValueError(NO_GRAPH) from error
                raise
        return (value, traces) if create_graph else (value.detach(), traces)


def _value(function: Field, x: Tensor) -> Tensor:
    """The field at ``x``; what torch says of two usual mistakes is put in words."""
    try:
        return function(x)
    except RuntimeError as error:
        text = str(error)
        if "numpy() on Tensor that requires grad" in text:
            raise ValueError(NO_GRAPH) from error
        if "same dtype" in text or "expected scalar type" in text:
            raise ValueError(
                f"the score function cannot take x of {x.dtype} ({text}); convert inside it, as "
                "lambda x, t: network(x.half(), t).float() does, or pass x in its dtype."
            ) from error
        raise


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace of the Jacobian, one backward pass for each of D dimensions, ``chunk`` of them at
    a time.

    Args:
        chunk: Rows of the Jacobian that share one vectorised pass; memory grows with it.
    """

    chunk: int = 64
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        validation.count("Exact", "chunk", self.chunk)

    def probes(self, x: Tensor, generator: Generator = None) -> Probes:
        return lambda: x.new_empty((1, 0))  # nothing random

    def passes(self, x: Tensor) -> int:
        return x[0].numel()

    def kept_variance(self, estimates: Tensor) -> Spread:
        """Nothing random: zero."""
        zero = torch.zeros_like(estimates[0])
        return Spread(zero, zero + math.inf)

    def fresh_variance(self, traces: Tensor, nodes: Tensor, weights: Tensor) -> Spread:
        """Nothing random: zero."""
        return self.kept_variance(traces[0])

    def traces(self, value: Tensor, x: Tensor, probes: Tensor, *, create_graph: bool) -> Tensor:
        dims = x[0].numel()
        total = x.new_zeros(len(x))
        for start in range(0, dims, self.chunk):
            rows = torch.arange(start, min(start + self.chunk, dims), device=x.device)
            basis = torch.nn.functional.one_hot(rows, dims).to(x)[:, None].expand(-1, len(x), -1)
            (jacobian,) = torch.autograd.grad(
                value,
                x,
                basis.reshape(len(rows), *x.shape),
                retain_graph=True,
                create_graph=create_graph,
                is_grads_batched=True,
            )
            total = total + (jacobian.flatten(2) * basis).sum((0, 2))
        return total[None]


LEAST = 2  # probes of a node that can tell how far to trust them
SMALL = 16  # dimensions up to which the exact trace costs less than its noise is worth


def _beside(values: Tensor, nodes: Tensor) -> Tensor:
    """Squared distance of ``values`` [N, B], N >= 5, from the cubic through the two neighbours on
    each side, as a variance [N, B]; the ends take that of the nearest node that has them."""
    count = len(nodes) - 4
    around = [range(i, i + count) for i in (0, 1, 3, 4)]
    points = torch.stack([nodes[list(rows)] for rows in around]).to(values)  # [4, count]
    here = nodes[2:-2].to(values)
    shares = []
    for j in range(4):
        others = [k for k in range(4) if k != j]
        shares.append(((here - points[others]) / (points[j] - points[others])).prod(0))
    beside = sum(
        share[:, None] * values[list(rows)] for share, rows in zip(shares, around, strict=True)
    )
    noise = 1 + sum(share.square() for share in shares)
    inner = (values[2:-2] - beside).square() / noise[:, None]
    return torch.cat([inner[:1], inner[:1], inner, inner[-1:], inner[-1:]])


def rademacher(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    """Signs, +1 or -1 with equal chance: the least variance of all independent entries."""
    return 1 - 2 * (rand(shape, generator, device=like.device, dtype=like.dtype) < 0.5).to(like)


def gaussian(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    """Standard normal entries."""
    return randn(shape, generator, device=like.device, dtype=like.dtype)


def independent(draw: Callable[..., Tensor]) -> Callable[..., Probes]:
    """Fresh probes with nothing in common from one call to the next."""

    def of_shape(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Probes:
        def some(count: int | None = None) -> Tensor:
            return draw((shape[0], count or shape[1], *shape[2:]), generator, like)

        return some

    return of_shape


def orthogonal(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Probes:
    """Random signs times a new row of a Hadamard matrix at every call.

    Every row alone is a Rademacher probe; rows of successive calls are orthogonal (exactly where D
    is a power of two), so that what one misses the next ones see. They are taken from all over
    the matrix: neighbouring rows would tell no column from one far away.
    """
    signs = rademacher(shape, generator, like)
    column = torch.arange(signs[0, 0].numel(), device=like.device).reshape(shape[2:])
    size = 1 << (column.numel() - 1).bit_length()
    stride = int(0.618 * size) | 1  # odd: every row comes once
    calls = iter(range(2**62))

    def draw() -> Tensor:
        row = (next(calls) * stride) % size
        parity = column & row
        for shift in (32, 16, 8, 4, 2, 1):
            parity = parity ^ (parity >> shift)
        return signs * (1 - 2 * (parity & 1)).to(like)

    return draw


@lru_cache(maxsize=32)
def colours(shape: tuple[int, ...], count: int) -> Tensor:
    """Masks [count, *shape] of 0 and 1 that share the points of a sample out among colours.

    The colour of point i is (a . i) mod count: those of one colour form a lattice, and a is the
    one whose points are farthest apart.
    """
    axes = [axis for axis, size in enumerate(shape) if size > 1] or [0]
    steps = torch.tensor(list(product(range(-5, 6), repeat=len(axes))))
    within = (steps.abs() < torch.tensor([shape[axis] for axis in axes])).all(1)
    steps = steps[within & (steps != 0).any(1)]
    distance = steps.double().square().sum(1)
    others = product(range(min(count, 16)), repeat=len(axes) - 1)
    tried = torch.tensor([(*factors, 1) for factors in islice(others, 4096)])
    same = (steps @ tried.T) % count == 0  # [steps, tried]
    nearest = distance[:, None].masked_fill(~same, math.inf).amin(0)
    best = tried[int(nearest.argmax())]
    colour = sum(
        int(factor) * torch.arange(shape[axis]).reshape([-1] + [1] * (len(shape) - axis - 1))
        for axis, factor in zip(axes, best, strict=True)
    )
    colour = (colour % count).expand(shape)
    return torch.stack([colour == c for c in range(count)]).float()


PROBES = {
    "rademacher": independent(rademacher),
    "gaussian": independent(gaussian),
    "orthogonal": orthogonal,
}


@dataclass(frozen=True)
class Hutchinson(Divergence):
    r"""Hutchinson's estimator :math:`v^T J v`, unbiased for the trace of J when :math:`E[v v^T] =
    I`.

    Several probes share one graph: one forward pass and ``num_probes`` backward passes.

    With ``tiles`` above one a probe is a set of so many vectors, each with the signs of one colour
    and zero elsewhere, where colours are laid over the sample as a lattice (:func:`colours`):
    :math:`\sum_c v_c^T J v_c` has the couplings of points of one colour left as noise, and those
    of neighbours no more.

    Reference: Hutchinson 1989; Grathwohl et al., FFJORD, 2019; Tang and Saad, A probing method for
    computing the diagonal of a matrix inverse, 2012.

    Args:
        num_probes: k, at one evaluation. From three on it is k on average where they are drawn
            anew at every node: two or more at each, and the others where a pilot saw most noise.
        distribution: rademacher, gaussian, or orthogonal (signs, orthogonal from one evaluation
            of a path to the next; their error bar takes them for independent and is too long).
        tiles: Vectors of one probe, one backward pass each; 1 to 64.
        basis: Where to draw them; if not given, the one of those that suit the data in which a
            pilot finds the least variance.
    """

    num_probes: int = 2
    distribution: str = "rademacher"
    basis: Basis | None = field(default=None)
    tiles: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", validation.count("Hutchinson", "tiles", self.tiles))
        if self.tiles > 64:
            raise ValueError(f"Hutchinson takes at most 64 tiles; got tiles={self.tiles}.")
        object.__setattr__(
            self, "num_probes", validation.count("Hutchinson", "num_probes", self.num_probes)
        )
        validation.choice("Hutchinson", "distribution", self.distribution, PROBES)
        if not (self.basis is None or isinstance(self.basis, Basis)):
            raise ValueError(
                "Hutchinson needs basis=Pixel(), Cosine(axes), Principal.of(samples) or None; got "
                f"basis={self.basis!r}."
            )

    @property
    def allots(self) -> int:
        several = self.num_probes > LEAST and self.distribution != "orthogonal"
        return self.num_probes if several else 0

    def in_basis(self, basis: Basis) -> Hutchinson:
        return replace(self, basis=basis)

    def with_probes(self, num_probes: int) -> Hutchinson:
        return replace(self, num_probes=num_probes)

    def bases(self, shape: tuple[int, ...]) -> list[Basis]:
        if self.basis is not None:
            return [self.basis]
        if len(shape) < 2:
            return [Pixel()]
        colour = len(shape) > 2 and shape[0] > 1  # channels may or may not go together
        return [Pixel(), Cosine(len(shape)), *([Cosine(len(shape) - 1)] if colour else [])]

    def probes(self, x: Tensor, generator: Generator = None) -> Probes:
        # sample first, so that per-sample streams give sample i its own probes
        shape = (len(x), self.num_probes, *x.shape[1:])
        draw = PROBES[self.distribution](shape, generator, x)
        basis = self.basis or Pixel()
        basis.check(tuple(x.shape[1:]))
        if self.tiles == 1:
            return lambda *count: basis.to_data(draw(*count)).transpose(0, 1)
        masks = colours(tuple(x.shape[1:]), self.tiles).to(x)  # [tiles, ...]

        def tiled(*count: int) -> Tensor:
            vectors = draw(*count)[:, :, None] * masks
            return basis.to_data(vectors.flatten(1, 2)).transpose(0, 1)

        return tiled

    def passes(self, x: Tensor) -> int:
        return self.num_probes * self.tiles

    def kept_variance(self, estimates: Tensor) -> Spread:
        """From the spread of the probes; NaN for one, which cannot say."""
        k = len(estimates)
        variance = estimates.var(0, correction=1) if k > 1 else estimates[0] * math.nan
        return Spread(variance / k, torch.full_like(variance, k - 1.0))

    def fresh_variance(self, traces: Tensor, nodes: Tensor, weights: Tensor) -> Spread:
        """From the spread of the probes at each node; with one, from its distance to the cubic
        through the nodes beside it, which a sharp bend of the trace only makes larger.

        The degrees of freedom are those of Welch and Satterthwaite with estimates in place of the
        variances: where few nodes have most of the variance, it is itself known from these few
        alone. Estimates squared are too large by (k + 1) / (k - 1), so that the number is below
        the unbiased one; the tails of a quadratic form, longer than a normal's, need that much.
        """
        if traces.shape[1] > 1:
            k = (~traces.isnan()).sum(1)
            apart = traces - traces.nanmean(1, keepdim=True)
            variance, each = apart.square().nansum(1) / (k * (k - 1)), k - 1
        else:
            variance = _beside(traces[:, 0], nodes)
            each = torch.full_like(variance, 1 / OVERLAP)
        parts = weights.square()[:, None] * variance
        total = parts.sum(0)
        freedom = total.square() / (parts.square() / each).sum(0)
        return Spread(total, freedom.nan_to_num(math.inf))

    def traces(self, value: Tensor, x: Tensor, probes: Tensor, *, create_graph: bool) -> Tensor:
        last = len(probes) - 1
        rows = [
            torch.autograd.grad(
                value, x, probe, retain_graph=create_graph or i < last, create_graph=create_graph
            )[0]
            for i, probe in enumerate(probes)
        ]
        parts = torch.stack(
            [(row * probe).flatten(1).sum(1) for row, probe in zip(rows, probes, strict=True)]
        )
        return parts.unflatten(0, (-1, self.tiles)).sum(1)


def suited(shape: tuple[int, ...]) -> Divergence:
    """The exact trace up to 16 dimensions, else two Rademacher probes."""
    return Exact() if torch.Size(shape).numel() <= SMALL else Hutchinson()
