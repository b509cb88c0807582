"""Conditions bound into a score function, and made to count for more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from score_models.model import ScoreModel
from sde_lib import validation
from sde_lib.rows import Rows


class Conditioned:
    """A score function (x, t) -> score under a condition for each sample of one batch.

    What works on a part of that batch takes that part of the conditions along, by
    :func:`sde_lib.rows.for_rows`: samplers that let go of samples that have arrived, a
    likelihood that halves a batch, ``flow.for_rows(rows)``.

    Args:
        function: Score function (x [B, ...], t, cond), such as ``model.score``.
        cond: A row for each sample, or one row, which then holds for all of any batch.
        others: Conditions, a row each, for samples that are none of the batch: those that a
            sampler or a likelihood draws to lay out its steps, in turn. Those of the batch if not
            given.
    """

    def __init__(
        self, function: Callable[..., Tensor], cond: Tensor, others: Tensor | None = None
    ) -> None:
        self.function, self.cond = function, cond
        self.others = cond if others is None else others

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        cond = self.cond.to(x.device)
        if len(cond) not in (1, len(x)):
            raise ValueError(
                f"a score function with a condition for each of {len(cond)} samples was given "
                f"{len(x)} samples; bind those of these samples, with .for_rows(rows) or anew, or "
                "a single row, which holds for all."
            )
        return self.function(x, t, cond.expand(len(x), *cond.shape[1:]))

    @property
    def by_row(self) -> bool:
        """Whether samples have a condition each."""
        return len(self.cond) > 1

    def for_rows(self, rows: Rows) -> Conditioned:
        """Under the conditions of ``rows`` alone."""
        if not self.by_row:
            return self
        some = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        return Conditioned(self.function, self.cond[some], self.others)

    def for_others(self, count: int) -> Conditioned:
        """Under the conditions of ``count`` samples that are none of the batch."""
        turn = torch.arange(count, device=self.others.device) % len(self.others)
        return Conditioned(self.function, self.others[turn], self.others)


def conditioned(
    model_score: Callable[..., Tensor], cond: Tensor, *, others: Tensor | None = None
) -> Conditioned:
    """The score function (x, t) -> score under ``cond``; see :class:`Conditioned`."""
    return Conditioned(model_score, cond, others)


def classifier_free(
    model: ScoreModel, cond: Tensor, scale: float, *, others: Tensor | None = None
) -> Conditioned:
    r"""Score of :math:`p(x)\, p(c \mid x)^{scale}` at each noise level, up to its constant.

    .. math::  s = s_{null} + scale\,(s_{cond} - s_{null})

    from one pass over 2 B samples; 0 is the score without condition, 1 the one under it. Above 1
    it is the score of no noised density: samplers that assume one are approximate.

    Reference: Ho and Salimans, Classifier-free diffusion guidance, 2022; their w is scale - 1.

    Args:
        model: Trained with conditions left out now and then.
        cond: A row for each sample, or one row, which then holds for all of any batch.
        scale: At least 0.
        others: See :class:`Conditioned`.

    Raises:
        ValueError: If the model is unconditional.
    """
    scale = validation.real("classifier_free", "scale", scale, at_least=0)
    if model.cond is None:
        raise ValueError(
            "classifier-free guidance compares a model with and without its condition; got one "
            "whose network is unconditional. Train one with network.cond set, Classes(count) or "
            "Vector(size)."
        )
    return Conditioned(_Guided(model, scale), cond, others)


class _Guided:
    """The guided score as a function (x, t, cond)."""

    def __init__(self, model: ScoreModel, scale: float) -> None:
        self.function, self.null, self.scale = model.score, model.cond.null, scale

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        both = torch.cat([cond, self.null(len(x), x.device).to(cond.dtype)])
        t = torch.as_tensor(t)
        twice = t if t.ndim == 0 else torch.cat([t, t])
        under, without = self.function(torch.cat([x, x]), twice, both).chunk(2)
        return without + self.scale * (under - without)
