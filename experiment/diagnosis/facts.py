"""What a data set is: how many, how many twice, far out, on which values, of which classes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from experiment.data import Dataset
from experiment.diagnosis.samples import Part, Units

FAR = 6.0  # robust standard deviations of the distance from the mean


@dataclass(frozen=True)
class Facts:
    """Counts of a data set.

    Attributes:
        name: Of the data.
        shape: Of one sample.
        dims: D, numbers of a sample.
        levels: K that the data are declared to have, or None.
        sizes: Samples of each part.
        looked_at: How many of them were looked at; what follows is about these.
        twice: Training samples that are bit by bit like an earlier one.
        leaked: Test samples that are bit by bit like a training sample.
        constant: Coordinates that are the same in all training samples.
        far: Training samples whose distance from the mean is more than 6 robust standard
            deviations (1.4826 times the median deviation) above the median distance.
        farthest: Index of the farthest of these that were looked at.
        farthest_z: How many robust standard deviations it is out.
        largest_z: Largest deviation of one number from the mean of its coordinate, in standard
            deviations.
        classes: Training samples of each class, where there are classes.
    """

    name: str
    shape: tuple[int, ...]
    dims: int
    levels: int | None
    sizes: Mapping[str, int]
    looked_at: Mapping[str, int]
    twice: int
    leaked: int
    constant: int
    far: int
    farthest: int
    farthest_z: float
    largest_z: float
    classes: list[int] | None

    def as_row(self) -> dict[str, Any]:
        """What of it goes into a JSON file."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What is to be said of it."""
        train, test = self.sizes["train"], self.sizes["test"]
        kind = "continuous" if self.levels is None else f"{self.levels} levels"
        said = [
            f"{self.name}: {train} training and {test} test samples of {tuple(self.shape)}, "
            f"{self.dims} numbers each, {kind}"
        ]
        if self.looked_at != self.sizes:
            said.append(
                f"looked at one by one: {self.looked_at['train']} and {self.looked_at['test']}, "
                "chosen at random"
            )
        said.append(f"twice in the training set: {self.twice}; test samples in it: {self.leaked}")
        said.append(
            f"coordinates that never change: {self.constant}; far out: {self.far} samples, the "
            f"farthest {self.farthest} ({self.farthest_z:.1f} robust standard deviations)"
        )
        return said + self._class_lines()

    def _class_lines(self) -> list[str]:
        if not self.classes:
            return []
        low, high = min(self.classes), max(self.classes)
        return [f"classes: {len(self.classes)}, with {low} to {high} training samples each"]


def facts(data: Dataset, train: Part, test: Part, spread: Coordinates, radii: Tensor) -> Facts:
    """The counts of ``data``.

    Args:
        data: What they are of.
        train: Its training part.
        test: Its test part.
        spread: Of the coordinates of the training part.
        radii: Distances of the training samples looked at from their mean, [N].
    """
    seen, twice = _digests(train)
    leaked = sum(digest in seen for digest in _each_digest(test))
    z = robust_z(radii)
    return Facts(
        data.name,
        data.shape,
        train.dims,
        data.levels,
        {part.name: len(part.samples) for part in (train, test)},
        {part.name: len(part) for part in (train, test)},
        twice,
        leaked,
        spread.constant,
        int((z > FAR).sum()),
        int(train.index()[z.argmax()]),
        float(z.max()),
        spread.largest_z,
        _classes(data),
    )


def robust_z(values: Tensor) -> Tensor:
    """Deviation from the median over 1.4826 times the median deviation, [N]; 0 without any."""
    deviation = values - values.median()
    scale = 1.4826 * deviation.abs().median()
    return deviation / scale if scale > 0 else torch.zeros_like(deviation)


def _each_digest(part: Part):  # noqa: ANN202
    for block in part.blocks():
        for row in block.flatten(1).contiguous().cpu().numpy():
            yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _digests(part: Part) -> tuple[set[bytes], int]:
    """Digests of the samples of ``part``, and how many of these had come before."""
    seen: set[bytes] = set()
    twice = 0
    for digest in _each_digest(part):
        twice += digest in seen
        seen.add(digest)
    return seen, twice


def _classes(data: Dataset) -> list[int] | None:
    """Training samples of each class; None for data without classes."""
    cond = getattr(data, "train_cond", None)
    if cond is None:
        return None
    values = cond[:]
    if values.is_floating_point() or values.ndim != 1:
        return None
    return torch.bincount(values.long(), minlength=data.cond.count).tolist()


@dataclass(frozen=True)
class Coordinates:
    """Coordinates of the training samples looked at, in model units at the middle of bins.

    Attributes:
        mean: [D].
        std: [D].
        low: [D].
        high: [D].
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, part: Part, centres: Units) -> Coordinates:
        """In two passes over ``part``: the variance about a known mean does not cancel."""
        low, high, total = None, None, 0.0
        for x in in_units(part, centres):
            ends = x.amin(0), x.amax(0)
            low = ends[0] if low is None else torch.minimum(low, ends[0])
            high = ends[1] if high is None else torch.maximum(high, ends[1])
            total = total + x.sum(0)
        mean = total / len(part)
        square = sum((x - mean).square().sum(0) for x in in_units(part, centres))
        return cls(mean, (square / len(part)).sqrt(), low, high)

    @property
    def constant(self) -> int:
        """How many never change."""
        return int((self.low == self.high).sum())

    @property
    def largest_z(self) -> float:
        """Largest deviation of a number from its mean, in its standard deviation."""
        z = torch.maximum(self.high - self.mean, self.mean - self.low) / self.std
        return float(z[self.high > self.low].max())

    def radii(self, part: Part, centres: Units) -> Tensor:
        """Distance of each sample looked at from the mean, [N]."""
        return torch.cat([(x - self.mean).norm(dim=1) for x in in_units(part, centres)])


def in_units(part: Part, centres: Units):  # noqa: ANN201
    """Blocks of ``part`` [n, D], float64, at the middle of their bins if they have any."""
    unused = torch.Generator()
    for block in part.blocks():
        yield centres.encode(block, unused).flatten(1).double()


@dataclass(frozen=True)
class Lattice:
    """The values that the numbers of a data set take.

    Attributes:
        distinct: How many; None if they were too many to count.
        low: The smallest.
        high: The largest.
        step: Distance of neighbours if all lie on even steps, else None.
    """

    distinct: int | None
    low: float
    high: float
    step: float | None

    @property
    def levels(self) -> int | None:
        """K of the even steps from the smallest to the largest value."""
        return None if self.step is None else round((self.high - self.low) / self.step) + 1


MOST_VALUES = 65536
OFF_STEP = 0.02  # of a step; float32 leaves a few thousandths at 2^16 steps


def lattice(*parts: Part) -> Lattice:
    """The values of the samples looked at, of all ``parts`` together.

    Numbers lie on steps if they have at most a quarter as many distinct values as there are
    numbers, and all of these are whole multiples of one step above the smallest.
    """
    values, count = torch.empty(0, dtype=torch.float64), 0
    low, high, many = math.inf, -math.inf, False
    for part in parts:
        for block in part.blocks():
            low, high = min(low, float(block.min())), max(high, float(block.max()))
            count += block.numel()
            if not many:
                values = torch.cat([values, block.unique().double()]).unique()
                many = len(values) > MOST_VALUES
    if many:
        return Lattice(None, low, high, None)
    few = 2 <= len(values) <= count / 4
    return Lattice(len(values), low, high, _step(values) if few else None)


def _step(values: Tensor) -> float | None:
    """The step of sorted distinct ``values``, if there is one and it gives at most 2^16 levels."""
    span = float(values[-1] - values[0])
    smallest = float(values.diff().min())
    if span / smallest > MOST_VALUES:
        return None
    step = span / round(span / smallest)  # of the whole span: a single difference is rounded
    multiples = (values - values[0]) / step
    if bool(((multiples - multiples.round()).abs() > OFF_STEP).any()):
        return None
    shared = math.gcd(*multiples.round().long().tolist())
    return step * shared
