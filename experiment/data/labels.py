"""What goes with each sample: its class, or a vector of numbers."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from score_models.conditioning import Classes, Vector


def conditions(
    name: str, train: numpy.ndarray, test: numpy.ndarray, count: int | None = None
) -> dict[str, Any]:
    """Integers [N] as classes, floats [N, d] as vectors, in the words that `Dataset` takes.

    Floats are taken as they are: nothing is standardised, since what they are told by later comes
    without a training set.

    Args:
        name: Of the data, for messages.
        train: Of the training samples.
        test: Of the test samples.
        count: How many classes there are; by default one more than the largest of ``train``.

    Raises:
        ValueError: For what is neither; for a class out of range or a number that is not finite,
            with the first sample that has it.
    """
    for part, values in (("train", train), ("test", test)):
        _check_kind(name, part, values)
    if train.dtype.kind == "f":
        parts = {"train_cond": _vectors(train), "test_cond": _vectors(test)}
        return {"cond": Vector(train.shape[1]), **parts}
    count = int(train.max()) + 1 if count is None and train.size else count
    parts = {
        "train_cond": _classes(name, "train", train, count),
        "test_cond": _classes(name, "test", test, count),
    }
    return {"cond": Classes(count), **parts}


def _check_kind(name: str, part: str, values: numpy.ndarray) -> None:
    whole, real = values.dtype.kind in "iu", values.dtype.kind == "f"
    if not (whole and values.ndim == 1 or real and values.ndim == 2 and values.shape[1] > 0):
        raise ValueError(
            f"{name}: conditions are integers [N], the class of each sample, or floats [N, d]; "
            f"those of the {part} set are {values.dtype} of shape {values.shape}."
        )


def _vectors(values: numpy.ndarray) -> Tensor:
    with numpy.errstate(over="ignore"):  # what float32 cannot hold is reported as Inf
        return torch.from_numpy(values.astype(numpy.float32, order="C"))


def _classes(name: str, part: str, values: numpy.ndarray, count: int | None) -> Tensor:
    wide = values.astype(numpy.int64)
    bad = numpy.flatnonzero((wide < 0) | (wide >= (count or 0)))
    if len(bad):
        raise ValueError(
            f"{name}: labels must be in 0..{(count or 0) - 1}; that of {part} sample {bad[0]} is "
            f"{wide[bad[0]]}. Check the file of the labels."
        )
    return torch.from_numpy(wide)
