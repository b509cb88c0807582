"""The features of a network: what enters its last layer, kept from its latest evaluation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Features:
    """Watches the last layer of a network, its attribute ``leave``, and keeps what enters it.

    A second head on the same features then costs no second pass, whoever asked for the first: a
    sampler, a wrapper that counts, guidance. Models that share a network share what is kept, and
    each knows whether the latest was its own. Copies and files hold no features.

    Args:
        network: With a module called ``leave`` that turns features [B, ...] into the output.

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
        self._entrance = _Entrance.of(leave)
        self._forget()

    def _forget(self) -> None:
        self._own: Callable[[], Any] = _nothing
        self._asked: list[tuple[Callable[[], Any], int | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without the latest: weak references cannot be pickled, and what they are to is gone."""
        return {"_entrance": self._entrance}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def latest(self) -> Tensor | None:
        """The features [B, ...] of the latest evaluation, without a graph."""
        return self._entrance.latest

    def listen(self) -> None:
        """Say that an evaluation begins."""
        self._entrance.latest = None
        self._forget()

    def note(self, *asked: Any) -> None:  # noqa: ANN401
        """Say what the evaluation that has just ended was of.

        Raises:
            RuntimeError: If the last layer was not heard of meanwhile.
        """
        if self.latest is None:
            raise RuntimeError(
                "the network was evaluated without calling its module `leave` where hooks see it, "
                "as a network compiled before may do; without features there is no second head. "
                "Leave out compile, or take a variance that needs no head."
            )
        self._own = weakref.ref(self.latest)
        self._asked = [(_recall(value), _version(value)) for value in asked]

    def are_of(self, *asked: Any) -> bool:  # noqa: ANN401
        """Whether they are of these very objects, none of them written to since; of the first of
        what was noted, where fewer are asked for.

        Never of tensors made in inference mode, where writing leaves no trace.
        """
        own = self.latest is not None and self._own() is self.latest
        return own and all(
            recall() is value and version is not None and version == _version(value)
            for (recall, version), value in zip(self._asked, asked, strict=False)
        )


class _Entrance:
    """What entered a layer in its latest call: one for each layer, for all who ask.

    The layer holds it, so that a copy of the layer has one of its own.
    """

    def __init__(self) -> None:
        self.latest: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> _Entrance:
        """That of ``layer``; made where there is none."""
        there = layer.__dict__.get("_entrance")
        if there is None:
            there = layer._entrance = cls()
            layer.register_forward_pre_hook(there.keep)
        return there

    def keep(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """The hook."""
        self.latest = arguments[0].detach()

    def __getstate__(self) -> dict[str, Any]:
        return {"latest": None}


def _nothing() -> None:
    """What a reference to nothing refers to."""


def _recall(value: Any) -> Callable[[], Any]:  # noqa: ANN401
    """How to get ``value`` back; a tensor is not kept alive for it."""
    return weakref.ref(value) if torch.is_tensor(value) else lambda: value


def _version(value: Any) -> int | None:  # noqa: ANN401
    """How often a tensor was written to, None if nobody counts; numbers do not change."""
    if not torch.is_tensor(value):
        return 0
    return None if value.is_inference() else value._version
