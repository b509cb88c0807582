"""What every data source returns: checked samples and the units they come in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from experiment.data.samples import Samples, each_block
from experiment.data.survey import Survey, first_of_a_constant, survey
from likelihood.dequantize import UniformDequantization
from likelihood.standardize import Standardization
from score_models.conditioning import Classes, Vector
from sde_lib import validation


@dataclass(frozen=True)
class Dataset:
    """Training and test samples and the units they come in.

    Samples may lie on disk: they are then gone through once, block by block, and never held in
    memory together. Bytes of 256 levels cannot be out of range and are not gone through.

    Args:
        name: What messages and reports call the data.
        train: Samples [N, *shape], N >= 2: integers in 0..levels-1 for K-level data, float32 for
            continuous data. Images are channel-first.
        test: Samples [M, *shape], M >= 2, of the same shape and dtype.
        levels: K, or None for continuous data.
        entropy: Differential entropy of the source in nats, data units, where known.
        log_density: The true log p in nats, data units: [B, d] -> [B], where known.
        cond: What goes with each sample, classes or a vector; None for nothing.
        train_cond: That of the training samples, int64 [N] or float32 [N, d].
        test_cond: That of the test samples.

    Raises:
        ValueError: For an empty set, a single sample, NaN or Inf, values that are no level, a
            wrong dtype, two shapes, or data that are constant; names the data and the first bad
            value. Also for conditions that do not go with the samples.
    """

    name: str
    train: Samples
    test: Samples
    levels: int | None = None
    entropy: float | None = None
    log_density: Callable[[Tensor], Tensor] | None = None
    cond: Classes | Vector | None = None
    train_cond: Samples | None = None
    test_cond: Samples | None = None
    _train_survey: Survey | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.levels is not None:
            object.__setattr__(
                self, "levels", validation.count(self.name, "levels", self.levels, at_least=2)
            )
        found = check_samples(self.name, "train", self.train, self.levels)
        object.__setattr__(self, "_train_survey", found)
        check_samples(self.name, "test", self.test, self.levels)
        if self.train.shape[1:] != self.test.shape[1:] or self.train.dtype != self.test.dtype:
            raise ValueError(
                f"{self.name}: train and test samples must be alike; got {_kind(self.train)} and "
                f"{_kind(self.test)}."
            )
        self._check_variation()
        self._check_cond()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train.shape[1:])

    @cached_property
    def units(self) -> UniformDequantization | Standardization:
        """Data to model units and back: bins for K-level data, else zero mean, unit variance."""
        if self.levels is None:
            return self._train_survey.moments.standardization()
        return UniformDequantization(self.levels)

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest value: of K-level data what they may be, else in the training set."""
        if self.levels is not None:
            return 0.0, self.levels - 1.0
        return self._train_survey.range

    def in_units(self, units: Standardization) -> Dataset:
        """The same continuous data, taken to model units as a model is used to."""
        view = copy.copy(self)  # not built anew: nothing has to be gone through again
        view.__dict__["units"] = units
        return view

    def _check_variation(self) -> None:
        found = self._train_survey
        constant = _constant(self.name, self.train, found)
        if constant is not None:
            raise ValueError(
                f"{self.name}: every value of the train set is {constant:g}; constant data have "
                "no density to learn. Check how the file was written."
            )
        if self.levels is None and len(self.shape) == 1:
            still = found.low == found.high
            if bool(still.any()):
                raise ValueError(
                    f"{self.name}: column {still.nonzero()[0].item()} is the same in all training "
                    "samples, so that its density is infinite. Drop the column."
                )

    def _check_cond(self) -> None:
        given = [self.cond is not None, self.train_cond is not None, self.test_cond is not None]
        if any(given) != all(given):
            raise ValueError(
                f"{self.name}: cond, train_cond and test_cond go together: what a condition is, "
                f"and that of each sample; got {sum(given)} of the three."
            )
        if not any(given):
            return
        for part in ("train", "test"):
            samples, conds = getattr(self, part), getattr(self, f"{part}_cond")
            if len(samples) != len(conds):
                raise ValueError(
                    f"{self.name}: there are {len(samples)} {part} samples and {len(conds)} "
                    "labels or conditions of them; there must be one for each."
                )
            _check_conds(self.name, part, conds, self.cond)


def check_samples(name: str, part: str, samples: Samples, levels: int | None) -> Survey | None:
    """Refuse what is no set of samples; what one pass has found, None where none was needed.

    Raises:
        ValueError: Naming the data, the part and the first bad value.
    """
    _check_shape(name, part, samples)
    if levels is None:
        return _check_continuous(name, part, samples)
    return _check_levels(name, part, samples, levels)


def _check_conds(name: str, part: str, conds: Samples, cond: Classes | Vector) -> None:
    """Refuse conditions that are none of ``cond``, or that stand for none at all."""
    start = 0
    for block in each_block(conds, f"checking {name}"):
        cond.check(f"{name}: the {part} set", block, len(block))
        nothing = cond.null(len(block), block.device)
        bad = ((block == nothing) | ~torch.isfinite(block)).flatten(1 if block.ndim > 1 else 0)
        bad = bad.any(1) if bad.ndim > 1 else bad
        if bool(bad.any()):
            row = bad.nonzero()[0].item()
            raise ValueError(
                f"{name}: the condition of {part} sample {start + row} is {block[row].tolist()}, "
                f"which is none of {cond}. Repair it or remove the sample."
            )
        start += len(block)


def _constant(name: str, samples: Samples, found: Survey | None) -> float | None:
    """The value of all numbers, if there is but one."""
    if found is None:
        return first_of_a_constant(name, samples)
    low, high = found.range
    return low if low == high else None


def _check_shape(name: str, part: str, samples: Samples) -> None:
    shape = tuple(samples.shape)
    if len(shape) < 2 or math.prod(shape[1:]) == 0:
        raise ValueError(
            f"{name}: the {part} set must have shape [N, ...] with samples of one number or more; "
            f"got {shape}. Scalars are samples of shape [1]."
        )
    if len(samples) < 2:
        raise ValueError(
            f"{name}: the {part} set needs at least two samples (a spread and a standard error "
            f"need them); got {len(samples)}."
        )


def _check_continuous(name: str, part: str, samples: Samples) -> Survey:
    if samples.dtype != torch.float32:
        raise ValueError(
            f"{name}: continuous data must be float32; the {part} set is {_kind(samples)}. "
            "Convert it, or give levels=K if these are integers in 0..K-1."
        )
    found = survey(name, samples, lambda block: ~torch.isfinite(block), moments=part == "train")
    if found.first is not None:
        raise ValueError(
            f"{name}: the {part} set holds NaN or Inf, first {found.value} at index "
            f"{found.first}, {found.bad} in all. Remove these samples or repair them."
        )
    return found


def _check_levels(name: str, part: str, samples: Samples, levels: int) -> Survey | None:
    dtype = samples.dtype
    wanted = f"{name}: data of {levels} levels must be"
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(
            f"{wanted} integers in 0..{levels - 1}; the {part} set is {_kind(samples)}, "
            f"{_range(name, samples)}. Scale it to that range and round it to integers, or leave "
            "levels out for continuous data."
        )
    if dtype == torch.uint8 and levels >= 256:
        return None
    found = survey(name, samples, lambda block: _outside(block, levels), moments=False)
    if found.first is not None:
        raise ValueError(
            f"{wanted} in 0..{levels - 1}; the {part} set has {_range_of(found)}, first "
            f"{found.value} at index {found.first}. Check levels."
        )
    return found


def _outside(block: Tensor, levels: int) -> Tensor:
    wide = block.long()  # K need not fit into the dtype of the values
    return (wide < 0) | (wide >= levels)


def _kind(samples: Samples) -> str:
    return f"{str(samples.dtype).removeprefix('torch.')} of shape {tuple(samples.shape)}"


def _range(name: str, samples: Samples) -> str:
    if samples.dtype.is_complex or samples.dtype == torch.bool:
        return "which has no range"
    return _range_of(survey(name, samples, torch.isnan, moments=False))


def _range_of(found: Survey) -> str:
    low, high = found.range
    return f"values from {low:g} to {high:g}"
