"""The samplers of a comparison: built by name, with the steps that a budget buys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from experiment.errors import RunError
from experiment.run import Run
from experiment.variants import variant
from sde_lib import SDE, Counted, PerSample
from sde_lib.oracles import Gaussian
from sde_lib.samplers import Sampler


@dataclass(frozen=True)
class Trial:
    """One sampler at one price.

    Args:
        name: As it was asked for.
        asked: What was asked for, in words.
        sampler: With the steps that this buys; None if it buys none.
        refused: Why there is none.
    """

    name: str
    asked: str
    sampler: Sampler | None
    refused: str = ""


def contenders(run: Run, entries: Sequence[str]) -> dict[str, Sampler]:
    """The samplers of these entries, in this order, by their entries; see
    :func:`experiment.variants.variant`.

    All of them end at E[x_0 | x], so that their ends can be compared.

    Raises:
        RunError: For an entry that cannot be read, or one that comes twice.
    """
    labels = [" ".join(str(entry).split()) for entry in entries]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise RunError(
            f"mode.samplers names {', '.join(twice)} more than once; each is compared once."
        )
    nodes = {label: variant(run.conf, label) for label in labels}
    return {label: run.instantiate(node) for label, node in nodes.items()}


@torch.no_grad()
def evaluations(sampler: Sampler, sde: SDE) -> int:
    """Network evaluations of a trajectory, counted on one number and a score in closed form."""
    score = Counted(Gaussian(torch.zeros(1), 1.0).score(sde))
    states = sampler.trajectory(score, sde, torch.zeros(1, 1), generator=PerSample([0]))
    for _ in states:
        pass
    return score.nfe


def spending(sampler: Sampler, sde: SDE, most: int) -> Sampler:
    """``sampler`` with as many steps as ``most`` evaluations buy, by counting and bisection.

    A step costs one evaluation at the least, and more of them cost more; numbers of steps that
    the sampler or its grid refuses are passed over.

    Raises:
        ValueError: If no number of steps fits.
    """
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        cost = _cost(sampler, sde, middle)[0]
        fits, too_many = (middle, too_many) if cost <= most else (fits, middle)
    for steps in range(fits + 1, most + 1):  # what lies beyond a refused number
        cost, why = _cost(sampler, sde, steps)
        if not why and cost > most:
            break
        fits = fits if why else steps
    if fits:
        return replace(sampler, steps=fits)
    cost, why = _cost(sampler, sde, 1)
    raise ValueError(why or f"takes {cost} evaluations at least")


def _cost(sampler: Sampler, sde: SDE, steps: int) -> tuple[float, str]:
    """Evaluations of so many steps; infinitely many, and why, if there cannot be so many."""
    try:
        return evaluations(replace(sampler, steps=steps), sde), ""
    except ValueError as error:
        return math.inf, str(error)


def trials(
    name: str, sampler: Sampler, sde: SDE, nfe: Sequence[int], tolerances: Sequence[float]
) -> list[Trial]:
    """``sampler`` at each number of evaluations, or at each tolerance where it has no steps.

    What two of them buy alike is tried once.
    """
    if hasattr(sampler, "steps"):
        asked = {f"{n} evaluations": partial(spending, sampler, sde, n) for n in nfe}
    else:
        asked = {
            f"tolerance {value:g}": partial(replace, sampler, rtol=value, atol=value)
            for value in tolerances
        }
    found: dict[str, Trial] = {}
    for trial in _made(name, asked):
        found.setdefault(repr(trial.sampler or trial), trial)
    return list(found.values())


def _made(name: str, asked: dict[str, Callable[[], Sampler]]) -> Iterator[Trial]:
    for words, make in asked.items():
        try:
            yield Trial(name, words, make())
        except ValueError as error:
            yield Trial(name, words, None, str(error))
