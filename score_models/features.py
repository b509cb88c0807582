"""The features of a network: what enters its last layer, kept from its latest evaluation."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn


class Features:
    """Watches the last layer of a network, its attribute ``leave``, and keeps what enters it.

    A second head on the same features then costs no second pass, whoever asked for the first: a
    sampler, a wrapper that counts, guidance.

    Args:
        network: With a module called ``leave`` that turns features [B, ...] into the output.

    Attributes:
        latest: The features of the latest evaluation, without a graph.

    Raises:
        ValueError: If there is no such module.
    """

    def __init__(self, network: nn.Module) -> None:
        leave = getattr(network, "leave", None)
        if not isinstance(leave, nn.Module):
            raise ValueError(
                f"a second head needs the features of {type(network).__name__}, that is what "
                "enters its last layer; got a network without a module called `leave`. Let its "
                "forward end in self.leave(features), as MLP and UNet do."
            )
        self.latest: Tensor | None = None
        self._heard = False
        self._x: weakref.ref[Tensor] | None = None
        self._version, self._t = -1, None
        leave.register_forward_pre_hook(self._keep)

    def _keep(self, leave: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.latest, self._x, self._heard = arguments[0].detach(), None, True

    def note(self, x: Tensor, t: Any) -> None:  # noqa: ANN401
        """Say what the latest evaluation was of.

        Raises:
            RuntimeError: If the last layer was not heard of meanwhile.
        """
        if not self._heard:
            raise RuntimeError(
                "the network was evaluated without calling its module `leave` where hooks see it, "
                "as a network compiled before may do; without features there is no second head. "
                "Leave out compile, or take a variance that needs no head."
            )
        self._x, self._version, self._t, self._heard = weakref.ref(x), _version(x), t, False

    def are_of(self, x: Tensor, t: Any) -> bool:  # noqa: ANN401
        """Whether they are of these two objects, and ``x`` has not been written to since."""
        same = self._x is not None and self._x() is x and self._t is t
        return same and self._version == _version(x)


def _version(x: Tensor) -> int:
    """How often ``x`` was written to; inference tensors do not count, the object must do."""
    return -1 if x.is_inference() else x._version
