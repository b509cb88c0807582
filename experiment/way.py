"""The way from noise to data: which of its states are shown, and how noisy each is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sde_lib import SDE

FRAMES = 11  # of a way, its two ends among them
MOST = 40  # states kept until it is known how many there are


class Frame(NamedTuple):
    """A state [B, ...] in model units, which of all it was, its time, and sigma/alpha there."""

    index: int
    t: float
    noise: float
    x: Tensor


def frames(states: Iterable[tuple[float, Tensor]], sde: SDE) -> list[Frame]:
    """At most eleven ``states`` of a trajectory, as even in log(sigma/alpha) as it allows.

    By the number of steps a grid that is dense near one end would show little else. Where few
    levels are visited, as by Langevin dynamics at one, frames are even in steps instead.

    Args:
        states: As (time, x), the first from the prior and the last the samples.
        sde: The process.
    """
    nearest, even = _Nearest(sde), _Even()
    for index, (t, x) in enumerate(states):
        last = Frame(index, t, math.exp(_clock(sde, t)), x)
        nearest.see(last)
        even.see(last)
    ends = [even.kept[0], last]
    chosen = _distinct([*ends, *nearest.kept.values()])
    return chosen if len(chosen) > FRAMES // 2 else _distinct([*ends, *even.chosen()])


def labels(shown: Sequence[Frame]) -> list[str]:
    """sigma/alpha of each frame in few letters, and ``samples`` for the last."""
    return [_short(frame.noise) for frame in shown[:-1]] + ["samples"]


class _Nearest:
    """The states that come nearest to marks between the ends, even in log(sigma/alpha)."""

    def __init__(self, sde: SDE) -> None:
        ends = (_clock(sde, t) for t in (sde.t_max, sde.t_min))
        self.marks = torch.linspace(*ends, FRAMES).tolist()[1:-1]
        self.kept: dict[float, Frame] = {}

    def see(self, frame: Frame) -> None:
        u = math.log(frame.noise)
        for mark in self.marks:
            best = self.kept.get(mark, frame)
            if abs(u - mark) <= abs(math.log(best.noise) - mark):  # of equals the last
                self.kept[mark] = frame


class _Even:
    """Evenly spaced states, MOST of them at most: a thousand would not fit."""

    def __init__(self) -> None:
        self.kept: list[Frame] = []
        self.stride = 1

    def see(self, frame: Frame) -> None:
        if frame.index % self.stride == 0:
            self.kept.append(frame)
        if len(self.kept) > MOST:
            self.kept, self.stride = self.kept[::2], 2 * self.stride

    def chosen(self) -> list[Frame]:
        last = len(self.kept) - 1
        return [self.kept[round(i * last / (FRAMES - 1))] for i in range(FRAMES - 1)]


def _clock(sde: SDE, t: float) -> float:
    """log(sigma/alpha)."""
    return -0.5 * float(sde.log_snr(torch.tensor(t, dtype=torch.float64)))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _distinct(found: Iterable[Frame]) -> list[Frame]:
    """Each state once, in the order of the way."""
    return [frame for _, frame in sorted({frame.index: frame for frame in found}.items())]
