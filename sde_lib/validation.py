"""Checks at the door: one clear sentence for a number of the wrong kind or out of range."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Collection


def real(
    owner: str,
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """``value`` as a float if it is a finite number in the stated range.

    Args:
        owner: What the argument belongs to, for the message.
        name: Name of the argument.
        value: What was given.
        above: Strict lower bound.
        below: Strict upper bound.
        at_least: Lower bound.
        at_most: Upper bound.

    Raises:
        ValueError: Naming owner, argument, allowed range and the value that was given.
    """
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
        if math.isfinite(bound)
    ]
    wanted = "a finite number" + (" " + " and ".join(bounds) if bounds else "")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{owner} needs {name} to be {wanted}; got {name}={value!r}.")
    if not (above < value < below and at_least <= value <= at_most):
        raise ValueError(f"{owner} needs {name} to be {wanted}; got {name}={value:g}.")
    return float(value)


def count(owner: str, name: str, value: float, *, at_least: int = 1) -> int:
    """``value`` as an int; 1e3 counts as 1000, as people write it, 1.5 does not.

    Raises:
        ValueError: Naming owner, argument, allowed range and the value that was given.
    """
    whole = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and float(value).is_integer()
    )
    if not whole or value < at_least:
        raise ValueError(
            f"{owner} needs {name} to be a whole number >= {at_least}; got {name}={value!r}."
        )
    return int(value)


def flag(owner: str, name: str, value: bool) -> bool:
    """``value`` if it is true or false, and not merely something that counts as one of them.

    Raises:
        ValueError: Naming owner, argument and the value that was given.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{owner} needs {name} to be true or false; got {name}={value!r}.")
    return value


def choice(owner: str, name: str, value: str, allowed: Collection[str]) -> str:
    """``value`` if it is one of ``allowed``.

    Raises:
        ValueError: Listing what is allowed.
    """
    if value not in allowed:
        raise ValueError(
            f"{owner} needs {name} to be one of {', '.join(sorted(allowed))}; got "
            f"{name}={value!r}."
        )
    return value


def installed(package: str) -> None:
    """Refuse at the door, not after hours, when an optional package will be needed.

    Raises:
        ModuleNotFoundError: Naming the package and how to get it.
    """
    loaded = sys.modules.get(package) is not None  # find_spec wants those to have one
    if not loaded and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is needed: `pip install {package}`.", name=package)
