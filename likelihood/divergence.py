"""The divergence of a field at a point: exactly, or by Hutchinson's estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import validation
from sde_lib.noise import Generator, rand, randn

Field = Callable[[Tensor], Tensor]


class Divergence(ABC):
    """Value and divergence of a field (x [B, ...]) -> [B, ...] whose sample i depends on x_i
    alone.

    One forward pass an evaluation, whatever the number of backward passes; parameters get no
    gradient.
    """

    @abstractmethod
    def probes(self, x: Tensor, generator: Generator = None) -> Tensor:
        """Random vectors [k, B, ...] in the shape of ``x``, drawn once and kept along a path."""

    @abstractmethod
    def passes(self, x: Tensor) -> int:
        """Backward passes that one evaluation costs."""

    @abstractmethod
    def traces(self, value: Tensor, x: Tensor, probes: Tensor) -> Tensor:
        """Estimates [k, B] of the divergence of ``value`` [B, ...], a function of ``x``."""

    def standard_error(self, estimates: Tensor) -> Tensor:
        """Of the mean of k ``estimates`` [k, B]: [B]; NaN for one, which cannot say."""
        if len(estimates) == 1:
            return torch.full_like(estimates[0], float("nan"))
        return estimates.std(0) / len(estimates) ** 0.5

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``field(x)`` [B, ...] and k estimates of its divergence, [k, B].

        Raises:
            ValueError: If the result cannot be differentiated with respect to ``x``.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = field(x)
            if not value.requires_grad:
                raise ValueError(
                    "the score function cannot be differentiated with respect to x: "
                    "its result has no graph; "
                    "does it call detach(), .data, numpy or torch.no_grad()? A "
                    "likelihood needs its derivative."
                )
            return value.detach(), self.traces(value, x, probes)


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace of the Jacobian, one backward pass for each of D dimensions, ``chunk`` of them at
    a time.

    Args:
        chunk: Rows of the Jacobian that share one vectorised pass; memory grows with it.
    """

    chunk: int = 64

    def __post_init__(self) -> None:
        validation.count("Exact", "chunk", self.chunk)

    def probes(self, x: Tensor, generator: Generator = None) -> Tensor:
        return x.new_empty((1, 0))  # nothing random

    def passes(self, x: Tensor) -> int:
        return x[0].numel()

    def standard_error(self, estimates: Tensor) -> Tensor:
        """Nothing random: zero."""
        return torch.zeros_like(estimates[0])

    def traces(self, value: Tensor, x: Tensor, probes: Tensor) -> Tensor:
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
                is_grads_batched=True,
            )
            total = total + (jacobian.flatten(2) * basis).sum((0, 2))
        return total[None]


def rademacher(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    """Signs, +1 or -1 with equal chance: the least variance of all independent entries."""
    return (
        rand(shape, generator, device=like.device, dtype=like.dtype)
        .sub(0.5)
        .sign()
        .add(0.5)
        .sign()
    )


def gaussian(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    """Standard normal entries."""
    return randn(shape, generator, device=like.device, dtype=like.dtype)


PROBES = {"rademacher": rademacher, "gaussian": gaussian}


@dataclass(frozen=True)
class Hutchinson(Divergence):
    r"""Hutchinson's estimator :math:`v^T J v`, unbiased for the trace of J when :math:`E[v v^T] =
    I`.

    Several probes share one graph: one forward pass and ``num_probes`` backward passes.

    Reference: Hutchinson 1989; Grathwohl et al., FFJORD, 2019.

    Args:
        num_probes: k; the standard error needs at least 2.
        distribution: rademacher or gaussian.
    """

    num_probes: int = 2
    distribution: str = "rademacher"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "num_probes", validation.count("Hutchinson", "num_probes", self.num_probes)
        )
        validation.choice("Hutchinson", "distribution", self.distribution, PROBES)

    def probes(self, x: Tensor, generator: Generator = None) -> Tensor:
        draw = PROBES[self.distribution]
        # sample first, so that per-sample streams give sample i its own probes
        return draw((len(x), self.num_probes, *x.shape[1:]), generator, x).transpose(0, 1)

    def passes(self, x: Tensor) -> int:
        return self.num_probes

    def traces(self, value: Tensor, x: Tensor, probes: Tensor) -> Tensor:
        last = len(probes) - 1
        rows = [
            torch.autograd.grad(value, x, probe, retain_graph=i < last)[0]
            for i, probe in enumerate(probes)
        ]
        return torch.stack(
            [(row * probe).flatten(1).sum(1) for row, probe in zip(rows, probes, strict=True)]
        )
