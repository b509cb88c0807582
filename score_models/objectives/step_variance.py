"""The variance of a step of a T-step model in training: fixed, or a head that learns with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from score_models.model import ScoreModel
from score_models.variance_head import head_of
from score_models.variance_kinds import interpolated
from sde_lib import validation
from sde_lib.reverse_variance import ScalarVariance, named_variance, posterior
from sde_lib.sde import Level, expand_like


class StepState(NamedTuple):
    """States that a model has just evaluated, and the steps that go on from them.

    Attributes:
        x: States, [B, ...].
        t: Their times, [B].
        cond: Conditioning, or None.
        earlier: Levels where the steps end, fields [B].
        later: Those of the states.
    """

    x: Tensor
    t: Tensor
    cond: Tensor | None
    earlier: Level
    later: Level


class StepVariance(ABC):
    r"""The variance v of a step as :math:`\log(v / \tilde\beta)`: above that of the posterior."""

    def prepare(  # noqa: B027
        self, model: ScoreModel, x0: Tensor, cond: Tensor | None
    ) -> None:
        """See :meth:`Objective.prepare`."""

    @abstractmethod
    def excess(self, model: ScoreModel, at: StepState) -> Tensor:
        r""":math:`\log(v / \tilde\beta)`, [B, 1, ...] or [B, ...]; ``model`` has just evaluated
        the very tensors ``at.x``, ``at.t`` and ``at.cond``."""


class FixedVariance(StepVariance):
    """One of those that are known before training.

    Args:
        of: "posterior" or "forward", DDPM's two, or an object with one v for all coordinates.

    Raises:
        ValueError: If it is none of these.
    """

    def __init__(self, of: ScalarVariance | str = "posterior") -> None:
        self.of = named_variance("FixedVariance", of)
        if self.of.of_state or self.of.wanted:
            raise ValueError(
                "FixedVariance needs a variance that is known before training, posterior or "
                f"forward; got {of!r}. LearnedVariance() learns one."
            )

    def excess(self, model: ScoreModel, at: StepState) -> Tensor:
        ratio = self.of(at.earlier, at.later) / posterior(at.earlier, at.later)[0]
        return expand_like(ratio.log().to(at.x), at.x)


class LearnedVariance(StepVariance, nn.Module):
    """Between DDPM's two, in the logarithm, by coordinate: a second head on the network.

    It sees the features that enter the last layer, and its loss leaves the network as it is; in
    improved DDPM both are one network, which takes the gradient of the variance along.

    Reference: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021,
    eq. 15.

    Args:
        width: Channels of the head.
        blocks: Its residual blocks.
    """

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.width = validation.count("LearnedVariance", "width", width)
        self.blocks = validation.count("LearnedVariance", "blocks", blocks)
        self.head: nn.Module | None = None

    def prepare(self, model: ScoreModel, x0: Tensor, cond: Tensor | None) -> None:
        self.head = head_of(model, x0, cond, self.width, self.blocks)

    def excess(self, model: ScoreModel, at: StepState) -> Tensor:
        if self.head is None:
            raise RuntimeError(
                "LearnedVariance has no head yet: call objective.prepare(model, x0) once, before "
                "the optimiser is told of objective.parameters()."
            )
        # the head stays in its own precision, whatever the network runs in
        dtype = next(self.head.parameters()).dtype
        features = model.features(at.x, at.t, at.cond).to(dtype)
        out = self.head(features, at.later.noise_ratio.log().to(features))
        return interpolated(out.to(at.x.dtype), at.earlier, at.later)
