"""The batch of an iteration: samples and randomness as a function of (seed, iteration, row)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiment.data import Dataset
from experiment.seeds import hashed, stream
from likelihood import Dequantization, Standardization, TruncatedNormalDequantization
from score_models import Objective
from sde_lib import SDE, BatchRows
from sde_lib.noise import rand


@dataclass
class Batches:
    """Which samples each iteration sees: shuffled epochs, a function of (seed, iteration) alone.

    Args:
        size: Samples in the training set.
        batch_size: At most ``size``.
        seed: Seed of the shuffles.
    """

    size: int
    batch_size: int
    seed: int
    _epochs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size > self.size:
            raise ValueError(
                f"training.batch_size={self.batch_size} is larger than the training "
                f"set of {self.size} samples; "
                "make it smaller."
            )

    def __call__(self, iteration: int) -> Tensor:
        """Indices [batch_size] of an iteration, from 0; an epoch's rest opens the next batch."""
        start = iteration * self.batch_size
        stop, parts = start + self.batch_size, []
        while start < stop:
            epoch, offset = divmod(start, self.size)
            parts.append(self._epoch(epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        order = self._epochs.get(epoch)
        if order is None:
            order = torch.randperm(self.size, generator=stream(self.seed, "epoch", epoch))
            before = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs = {**before, epoch: order}  # replaced at once: a thread may look too
        return order


class Batch(NamedTuple):
    """Some rows of a batch: data in model units, what the loss is random by, conditioning."""

    x0: Tensor
    draws: dict[str, Tensor]
    cond: Tensor | None

    def __getitem__(self, rows: slice) -> Batch:  # type: ignore[override]
        """Some of these rows."""
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Batch:
        """On ``device``; from pinned memory the host does not wait for the copy."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from by itself."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Each tensor changed."""
        draws = {name: change(values) for name, values in self.draws.items()}
        return Batch(change(self.x0), draws, None if self.cond is None else change(self.cond))


@dataclass
class Recipe:
    """How the rows of an iteration's batch come about, whoever asks for them.

    Rows are a function of (seed, iteration, row): the same for any number of processes, workers
    and parts of a batch. It can be sent to another process.

    Args:
        data: Its training part is used.
        units: What makes model units of it.
        objective: Says what is random about its loss.
        sde: The forward process.
        batch_size: Of all processes together.
        seed: Of everything.
        augment: (samples, generator) -> samples, in the units of the data; None for none.
        label_dropout: Share of samples whose conditioning is dropped, in [0, 1).
    """

    data: Dataset
    units: Dequantization | Standardization
    objective: Objective
    sde: SDE
    batch_size: int
    seed: int
    augment: Callable[[Tensor, BatchRows], Tensor] | None = None
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        self.batches = Batches(len(self.data.train), self.batch_size, self.seed)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which draws: what an objective has on a GPU stays there."""
        objective = self.objective
        if isinstance(objective, nn.Module):
            objective = copy.deepcopy(objective).cpu()
        return {**self.__dict__, "objective": objective}

    def __call__(self, iteration: int, rows: range) -> Batch:
        """Some ``rows`` of the batch of an iteration."""
        indices = self.batches(iteration)[rows.start : rows.stop]
        key = hashed(self.seed, "iteration", iteration)
        generator = BatchRows(key, self.batch_size, rows)
        values = self.data.train[indices]
        if self.augment is not None:
            values = self.augment(values, generator)
        x0 = self.units.encode(values, generator)
        return Batch(
            x0, self.objective.draw(self.sde, x0.shape, generator), self._cond(indices, generator)
        )

    def _cond(self, indices: Tensor, generator: BatchRows) -> Tensor | None:
        """Conditioning of the samples, with that of some of them dropped."""
        if self.data.cond is None:
            return None
        cond = self.data.train_cond[indices]
        if self.label_dropout == 0:
            return cond
        return self.data.cond.drop(cond, rand((len(cond),), generator) < self.label_dropout)


def trained_units(training: Mapping[str, Any], data: Dataset) -> Dequantization | Standardization:
    """What makes of ``data`` the samples that a model is trained on.

    All that is measured on training data for a model has to use these.

    Args:
        training: The configuration of its training, as stored with the model.
        data: Of K levels, or continuous.
    """
    if data.levels is None or training.get("dequantize", True):
        return data.units
    return TruncatedNormalDequantization(data.levels, data.units.low, data.units.high)
