"""Tables of numbers that every batch asks for, made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")

_memory: dict[Hashable, Any] = {}


def remembered(function: Callable[..., Value], *args: Hashable) -> Value:
    """``function(*args)``, kept for the next time: every batch asks for the same table of numbers.

    Not kept where an argument may still change: of objects, only frozen dataclasses of numbers,
    strings and their like cannot.
    """
    if not all(_fixed(arg) for arg in args):
        return function(*args)
    if torch.is_inference_mode_enabled():  # what is kept must serve outside of it too
        with torch.inference_mode(False), torch.no_grad():
            return remembered(function, *args)
    key = function, args
    if key in _memory:
        return _memory[key]
    while len(_memory) >= 64:
        _memory.pop(next(iter(_memory)))
    return _memory.setdefault(key, function(*args))


def _fixed(value: Hashable) -> bool:
    if is_dataclass(value) and not isinstance(value, type):
        compared = (getattr(value, part.name) for part in fields(value) if part.compare)
        return type(value).__dataclass_params__.frozen and all(map(_fixed, compared))
    if isinstance(value, tuple):
        return all(map(_fixed, value))
    return isinstance(value, str | int | float | None)
