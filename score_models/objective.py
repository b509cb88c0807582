"""What training minimises, in two halves: the randomness of a batch, and its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from score_models.model import ScoreModel
from sde_lib.noise import Generator
from sde_lib.sde import SDE


class Objective(ABC):
    """What training minimises, in two halves: the randomness of a batch, and its loss.

    Whoever trains may draw ahead, in another thread or process, for some rows of a batch or for
    all of them. An objective with weights or a state of its own is a ``torch.nn.Module`` too, in
    this order: ``class Mine(Objective, nn.Module)``; they are trained and stored with the model.

    Attributes:
        second_derivatives: Whether the loss holds derivatives of the network, so that its gradient
            is a second one, which a compiled network does not have.
    """

    second_derivatives: ClassVar[bool] = False

    @property
    def caveat(self) -> str:
        """What a model so trained cannot do, for whoever uses it; nothing as a rule."""
        return ""

    def prepare(  # noqa: B027
        self, model: ScoreModel, x0: Tensor, cond: Tensor | None = None
    ) -> None:
        """Make the weights that depend on the model, from the global random stream; once, before
        the optimiser is told of them. Most objectives have none.

        Args:
            model: The score model, where it will be trained.
            x0: One sample or more in the shape, dtype and device of a batch, [B, ...].
            cond: Conditioning that goes with them.
        """

    @abstractmethod
    def draw(self, sde: SDE, shape: Sequence[int], generator: Generator) -> dict[str, Tensor]:
        """Everything random about the loss of a batch of ``shape`` [B, ...]: tensors [B, ...] on
        the CPU. The model is not asked."""

    @abstractmethod
    def loss(
        self,
        model: ScoreModel,
        x0: Tensor,
        draws: Mapping[str, Tensor],
        cond: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample [B]; does not wait for the device.

        Args:
            model: The score model.
            x0: Data in model units, [B, ...].
            draws: What :meth:`draw` gave, on the device of ``x0``.
            cond: Conditioning passed to the network.
        """

    def observe(self, draws: Mapping[str, Tensor], losses: Tensor) -> None:  # noqa: B027
        """Hear of the ``losses`` [B] of a whole batch and of those of its ``draws`` that are one
        number a sample, after its update."""

    def __call__(
        self,
        model: ScoreModel,
        x0: Tensor,
        generator: Generator = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Per-sample loss [B] at fresh randomness."""
        draws = self.draw(model.sde, x0.shape, generator)
        return self.loss(model, x0, {k: v.to(x0.device) for k, v in draws.items()}, cond)
