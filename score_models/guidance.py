"""Conditions bound into a score function, and made to count for more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from score_models.model import ScoreModel
from sde_lib import validation

ScoreFunction = Callable[[Tensor, Tensor], Tensor]


def conditioned(model_score: Callable[..., Tensor], cond: Tensor) -> ScoreFunction:
    """The score function (x, t) -> score under ``cond``.

    Args:
        model_score: Such as ``model.score``, a function (x, t, cond).
        cond: A row for each sample, or one row, which then holds for all of any batch.
    """

    def score(x: Tensor, t: Tensor) -> Tensor:
        return model_score(x, t, _rows(cond, x))

    return score


def classifier_free(model: ScoreModel, cond: Tensor, scale: float) -> ScoreFunction:
    r"""Score of :math:`p(x)\, p(c \mid x)^{scale}` at each noise level, up to its constant.

    .. math::  s = s_{null} + scale\,(s_{cond} - s_{null})

    from one pass over 2 B samples; 0 is the score without condition, 1 the one under it. Above 1
    it is the score of no noised density: samplers that assume one are approximate.

    Reference: Ho and Salimans, Classifier-free diffusion guidance, 2022; their w is scale - 1.

    Args:
        model: Trained with conditions left out now and then.
        cond: A row for each sample, or one row, which then holds for all of any batch.
        scale: At least 0.

    Raises:
        ValueError: If the model is unconditional.
    """
    scale = validation.real("classifier_free", "scale", scale, at_least=0)
    spec = model.cond
    if spec is None:
        raise ValueError(
            "classifier-free guidance compares a model with and without its condition; got one "
            "whose network is unconditional. Train one with network.cond set, Classes(count) or "
            "Vector(size)."
        )

    def score(x: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([_rows(cond, x), spec.null(len(x), x.device).to(cond.dtype)])
        t = torch.as_tensor(t)
        twice = t if t.ndim == 0 else torch.cat([t, t])
        under, without = model.score(torch.cat([x, x]), twice, both).chunk(2)
        return without + scale * (under - without)

    return score


def _rows(cond: Tensor, x: Tensor) -> Tensor:
    cond = cond.to(x.device)
    return cond.expand(len(x), *cond.shape[1:]) if len(cond) == 1 else cond
