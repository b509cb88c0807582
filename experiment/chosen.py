"""Which average of the weights is used: that of training, another, or one made of those kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiment.averages import Exponential, Power
from experiment.errors import RunError
from experiment.progress import say
from experiment.snapshots import Snapshots, Weights, sources

POWER = re.compile(r"power:([^@]+)(?:@(\d+))?")


@dataclass(frozen=True)
class Label:
    """What tells weights from those that training evaluates.

    Attributes:
        name: As in ``average=NAME`` without the colon; empty for the first of ``training.ema``.
        error: Of the profile of one that was put together, see
            :class:`experiment.posthoc.Combination`; None for one that was kept.
        objective: What the objective has learned, averaged likewise; None with an empty name.
    """

    name: str = ""
    error: float | None = None
    objective: Weights | None = field(default=None, repr=False)

    @property
    def suffix(self) -> str:
        """Behind the names of files."""
        return f"-{self.name}" if self.name else ""

    def as_row(self) -> dict[str, Any]:
        """What stands in the record of what was made; nothing for the average of training."""
        if not self.name:
            return {}
        return {"average": self.name, "average_error": self.error}


@dataclass(frozen=True)
class Chosen:
    """The weights of an average, by name, and what they are of."""

    label: Label
    weights: Weights | None
    iteration: int


def choose(
    asked: object, checkpoint: Path, state: Mapping[str, Any], training: Mapping[str, Any]
) -> Chosen:
    """The average that ``average=...`` names.

    Args:
        asked: None for the first of ``training.ema``; a number for that decay; ``power:WIDTH`` for
            a share of the training, kept or put together from snapshots, and
            ``power:WIDTH@ITERATION`` for that of an earlier iteration.
        checkpoint: Path of the checkpoint.
        state: What it holds.
        training: The configuration of the training, as stored with it.

    Raises:
        RunError: If it is not there, with those there are; or cannot be put together.
    """
    iteration = int(state["iteration"])
    if asked is None:
        return Chosen(Label(), state.get("ema"), iteration)
    match = POWER.fullmatch(asked) if isinstance(asked, str) else None
    if match is None:
        return _decay(asked, checkpoint, state, _widths(state, training))
    width = _width(match[1])
    at = iteration if match[2] is None else int(match[2])
    if not 1 <= at <= iteration:
        raise RunError(
            f"average={asked} is of an iteration that {checkpoint} has not seen; it is of "
            f"iteration {iteration}."
        )
    return _power(width, at, _snapshots(checkpoint, state, training))


def refuse_all(
    asked: Sequence[float], checkpoint: Path, state: Mapping[str, Any], training: Mapping[str, Any]
) -> None:
    """See that one of several widths can be had, from what was kept and without any weights.

    Args:
        asked: Widths of power averages, one or more.
        checkpoint: Path of the checkpoint.
        state: What it holds.
        training: The configuration of the training, as stored with it.

    Raises:
        RunError: If there is none, with the reason of the first.
    """
    snapshots, reasons = _snapshots(checkpoint, state, training), []
    for width in asked:
        try:
            snapshots.combination(width, int(state["iteration"]))
        except RunError as error:
            reasons.append(str(error))
    if len(reasons) == len(asked):
        raise RunError(f"no width can be had, the first of them so: {reasons[0]}")


def _snapshots(
    checkpoint: Path, state: Mapping[str, Any], training: Mapping[str, Any]
) -> Snapshots:
    widths = _widths(state, training)
    return Snapshots(widths, sources(checkpoint, state, widths))


def _widths(state: Mapping[str, Any], training: Mapping[str, Any]) -> list[float]:
    """Those of the training that the checkpoint has."""
    return [w for w in training.get("power_ema") or () if Power(w).name in _stored(state)]


def _decay(
    asked: object, checkpoint: Path, state: Mapping[str, Any], widths: list[float]
) -> Chosen:
    """The exponential average of that decay."""
    there = _stored(state)
    number = isinstance(asked, int | float) and not isinstance(asked, bool)
    name = Exponential(asked).name if number and 0 <= asked < 1 else None
    if name not in there:
        decays = [stored.removeprefix("ema-") for stored in there if stored.startswith("ema-")]
        kept = [*decays, *(f"power:{width:g}" for width in widths)]
        more = ", and power:WIDTH by its snapshots" if widths else ""
        raise RunError(
            f"average={asked} is not in checkpoint {checkpoint}; there are "
            f"{', '.join(kept) or 'none but the first, average=null'}{more}."
        )
    first, parts = name == next(iter(there)), there[name]
    label = Label() if first else Label(name, objective=parts["objective"])
    return Chosen(label, parts["model"], int(state["iteration"]))


def _power(width: float, iteration: int, snapshots: Snapshots) -> Chosen:
    """The average of that width, as it was kept or put together."""
    found = snapshots.combination(width, iteration)
    last = snapshots.sources[-1].iteration
    name = Power(width).name + (f"@{iteration}" if iteration != last else "")
    if found.error:
        say(
            f"{name}: put together from {len(snapshots.sources)} iterations with averages of "
            f"widths {', '.join(f'{w:g}' for w in snapshots.widths)}; its profile is off by "
            f"{found.error:.2g}"
        )
    parts = snapshots.put_together(found)
    return Chosen(Label(name, found.error or None, parts["objective"]), parts["model"], iteration)


def _stored(state: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return state.get("averages", {})


def _width(text: str) -> float:
    try:
        return Power(float(text)).width
    except ValueError as error:
        raise RunError(
            f"average=power:{text} needs a width > 0 and <= 0.28, the share of the training that "
            "is averaged over, as in average=power:0.1."
        ) from error
