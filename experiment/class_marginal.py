r"""The likelihood of a class-conditional model without its condition, and what class it sees.

.. math::  \log p(x) = \log \sum_c p(c)\, p(x | c), \qquad p(c | x) = p(c)\, p(x | c) / p(x)

with the shares of the training set for p(c): exact but for the errors of each class's own value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from experiment.data import Dataset
from likelihood import LogLikelihood
from sde_lib import ProbabilityFlow

BLOCK = 1 << 20  # labels counted at a time


def log_shares(data: Dataset) -> Tensor:
    """log p(c) of all classes in the training set, [C] float64; minus infinity for none."""
    counts = torch.zeros(data.cond.count, dtype=torch.float64)
    for start in range(0, len(data.train_cond), BLOCK):
        some = data.train_cond[start : start + BLOCK]
        counts += torch.bincount(some, minlength=data.cond.count)
    return (counts / counts.sum()).log()


def marginal(
    flow: ProbabilityFlow, shares: Tensor, solve: Callable[[ProbabilityFlow], LogLikelihood]
) -> tuple[LogLikelihood, Tensor]:
    """The marginal likelihood of a batch, and log p(c | x) [B, C].

    Its errors are the mean of those of the classes under p(c | x), to first order; with the same
    probes for all classes they are the same errors, and adding their sizes claims no less.

    Args:
        flow: Whose row c is class c.
        shares: log p(c), [C]; classes that there are none of are not solved.
        solve: The likelihood of the batch under the flow of one class.

    Raises:
        SamplingError: As ``solve``.
    """
    there = shares.isfinite().nonzero()[:, 0].tolist()
    found = [solve(flow.for_rows(slice(c, c + 1))) for c in there]
    joint = torch.stack([one.log_prob.double().cpu() for one in found], 1) + shares[there]
    log_prob = joint.logsumexp(1)
    posterior = torch.full((len(joint), len(shares)), -torch.inf, dtype=torch.float64)
    posterior[:, there] = joint - log_prob[:, None]
    weights = posterior[:, there].exp()

    def mean(name: str) -> Tensor:
        each = torch.stack([getattr(one, name).double().cpu() for one in found], 1)
        return torch.where(weights > 0, weights * each, 0.0).sum(1)

    errors = ("standard_error", "solver_error", "truncation", "prior_mismatch")
    costs = ("nfe", "passes", "pilot_nfe", "seconds")
    first = found[0]
    whole = replace(
        first,
        log_prob=log_prob,
        clock=first.clock[:0],  # a path has its information, a mixture of paths has not
        trace=first.trace[:0],
        **{name: mean(name) for name in errors},
        **{name: sum(getattr(one, name) for one in found) for name in costs},
    )
    return whole, posterior


def seen_classes(posterior: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of samples whose class is the likeliest, and the mean nats by which it is not sure.

    Args:
        posterior: log p(c | x), [N, C].
        labels: The classes, [N].
    """
    right = (posterior.argmax(1) == labels).double().mean()
    return float(right), -float(posterior.gather(1, labels[:, None]).mean())


def joined(
    parts: Sequence[Tensor | None], sizes: Sequence[int], classes: int, draws: int
) -> Tensor:
    """log p(c | x) of all samples, [N, C]: of each, the mean over its draws; NaN where a batch was
    lost.

    Args:
        parts: Of each batch, [n draws, C]; None for a lost one.
        sizes: n of each.
        classes: C.
        draws: Of each sample.
    """
    unknown = torch.full((1, classes), math.nan, dtype=torch.float64)
    return torch.cat(
        [
            unknown.expand(size, -1)
            if part is None
            else part.unflatten(0, (size, draws)).logsumexp(1) - math.log(draws)
            for part, size in zip(parts, sizes, strict=True)
        ]
    )


def class_words(accuracy: float, nats: float, count: int) -> str:
    """A line about what :func:`seen_classes` found of so many samples."""
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    return (
        f"the likeliest class is the right one for {100 * accuracy:.1f} ± {100 * error:.1f} % of "
        f"them; -log p(class | x) is {nats:.3f} nats"
    )
