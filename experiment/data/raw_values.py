"""From what a file holds to samples: which integers are levels, which floats look like bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from experiment.data.samples import each_block, row_indices
from experiment.data.stored import StoredArray
from experiment.errors import RunError
from likelihood.standardize import slices

Raw = numpy.ndarray | StoredArray


def levels_of(name: str, values: Raw, levels: int | None) -> int | None:
    """``levels``, or what stands for it: 256 for uint8, None for floats unlike bytes.

    Raises:
        ValueError: For integers that need it said, and for floats that look like bytes.
    """
    if levels is not None or values.nbytes == 0 or values.dtype.kind not in "fiu":
        return levels
    if values.dtype.kind == "f":
        _refuse_bytes(name, values)
        return None
    if values.dtype != numpy.uint8:
        low, high = _range(values)
        raise ValueError(
            f"{name}: integer data need levels=K, the number of values there can be; the file "
            f"has {values.dtype} from {low} to {high}. Pass data.levels=K."
        )
    if all(part.max() <= 1 for part in _parts(values)):
        raise ValueError(
            f"{name}: bytes are taken for 256 levels, but all of these are 0 or 1. Pass "
            "data.levels=2 if that is what they are; if they were shares of 1 before, multiply "
            "by 255 and round before you convert."
        )
    return 256


def _parts(values: Raw) -> Iterator[numpy.ndarray]:
    if values.ndim == 0:
        yield values
        return
    for part in slices(values.shape):
        yield values[numpy.arange(*part.indices(len(values)))]


def _range(values: Raw) -> tuple[int, int]:
    low, high = zip(*((part.min(), part.max()) for part in _parts(values)), strict=True)
    return min(low), max(high)


_BYTES = ".round().astype('uint8')"
_COUNT = "data.levels=K, how many there can be"
# steps on which bytes lie that were made floats: of 1, of 1/255 in [0, 1], of 2/255 in [-1, 1]
_STEPS = {
    "1": (0, 255, lambda v: v, f"values.astype('uint8') and pass {_COUNT}"),
    "1/255": (0, 1, lambda v: v * 255.0, f"(255 * values){_BYTES}"),
    "2/255": (
        -1,
        1,
        lambda v: (v + 1.0) * 127.5,
        "(127.5 * (values + 1)).round().astype('uint8')",
    ),
}


def _refuse_bytes(name: str, values: Raw) -> None:
    """Levels dressed up as floats have no density, so a likelihood of them means nothing."""
    left, near = list(_STEPS), 255 * numpy.finfo(values.dtype).eps
    least, largest = numpy.inf, -numpy.inf
    for part in _parts(values):
        low, high, part = part.min(), part.max(), part.astype(numpy.float64)
        least, largest = min(least, low), max(largest, high)
        left = [step for step in left if _on_steps(part, low, high, step, near)]
        if not left:  # mostly at once; where NaN is about too, which is reported later
            return
    if least == largest:  # constants: reported later
        return
    raise ValueError(
        f"{name}: the {values.dtype} data look like bytes (range {least:g} to {largest:g}, all on "
        f"steps of {left[0]}); taken as continuous their density has no meaning. Save "
        f"{_STEPS[left[0]][3]}."
    )


def _on_steps(part: numpy.ndarray, low: float, high: float, step: str, near: float) -> bool:
    lowest, highest, scaled, _ = _STEPS[step]
    if not lowest <= low <= high <= highest:
        return False
    whole = scaled(part)
    return bool(numpy.abs(whole - numpy.rint(whole)).max() <= (near if highest == 1 else 0))


def in_memory(name: str, values: numpy.ndarray, levels: int | None) -> Tensor:
    """Floats as float32; levels as bytes where they fit, so that images stay small.

    Raises:
        ValueError: For what are no numbers.
    """
    _check_kind(name, values)
    if values.dtype.kind == "f":
        return _floats(values)
    fits = values.size and values.min() >= 0 and values.max() <= 255
    kind = numpy.uint8 if fits and levels is not None and levels <= 256 else numpy.int64
    return torch.from_numpy(values.astype(kind, order="C"))


def _floats(values: numpy.ndarray) -> Tensor:
    with numpy.errstate(over="ignore"):  # what float32 cannot hold is reported as Inf
        return torch.from_numpy(values.astype(numpy.float32, order="C"))


def _check_kind(name: str, values: Raw) -> None:
    if values.dtype.kind not in "fiu" or values.ndim == 0:
        raise ValueError(
            f"{name}: samples must be integers or floats [N, ...]; got {values.dtype} of shape "
            f"{tuple(values.shape)}."
        )


@dataclass(frozen=True)
class StoredSamples:
    """Samples in a file: each batch is checked as it is read, since files change.

    Args:
        name: Of the data, for messages.
        values: Where they are.
        levels: K, or None for continuous data.

    Raises:
        ValueError: For what are no numbers.
        RunError: From reading, for values that are no level or not finite; names file and sample.
    """

    name: str
    values: StoredArray
    levels: int | None = None

    def __post_init__(self) -> None:
        _check_kind(self.name, self.values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, *shape]."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """float32 of floats; bytes for up to 256 levels, else int64."""
        if self.values.dtype.kind == "f":
            return torch.float32
        return torch.uint8 if self.levels is not None and self.levels <= 256 else torch.int64

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        wanted = row_indices(rows, len(self)).numpy()
        found = self.values[wanted]
        if self.values.dtype.kind == "f":
            made = _floats(found)
            self._refuse(~torch.isfinite(made).numpy(), found, wanted, "finite")
            return made
        if self.levels is not None and (found.dtype != numpy.uint8 or self.levels < 256):
            outside = (found < 0) | (found >= self.levels)
            self._refuse(outside, found, wanted, f"in 0..{self.levels - 1}")
        return torch.from_numpy(found.astype(str(self.dtype).removeprefix("torch.")))

    def check_wide(self) -> None:
        """Read all of what only fits into bytes if the values are right; once, at the door.

        `Dataset` takes bytes of 256 levels to be right, and cannot know that these were wider.
        """
        if self.dtype == torch.uint8 and self.values.dtype != numpy.uint8:
            for _ in each_block(self, f"checking {self.name}"):
                pass

    def _refuse(
        self, bad: numpy.ndarray, found: numpy.ndarray, rows: numpy.ndarray, wanted: str
    ) -> None:
        if not bad.any():
            return
        row, *rest = (int(i) for i in numpy.argwhere(bad)[0])
        raise RunError(
            f"{self.values}: values must be {wanted}; sample {int(rows[row])} holds "
            f"{found[(row, *rest)]} at {tuple(rest)}. Repair or remove it."
        )
