"""One iteration: the gradient of a batch, in as many parts as memory asks for, and the update."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from experiment.batches import Batch
from experiment.progress import say
from experiment.seeds import hashed
from experiment.state import State
from score_models import Objective
from sde_lib.memory import out_of_memory


class Settings(Protocol):
    """What a step asks of how to optimise."""

    batch_size: int
    clip: float

    def lr_at(self, iteration: int) -> float:
        """Learning rate of an iteration."""
        ...


class Step:
    """One iteration: the gradient, in as many parts as memory asks for, and the update.

    Args:
        state: Changed in place.
        settings: How to optimise.
        seed: Seed of dropout.
    """

    def __init__(self, state: State, settings: Settings, seed: int) -> None:
        self.state, self.settings, self.seed = state, settings, seed
        self.rows = state.processes.share(settings.batch_size)
        self.parts = state.speed.parts(self.rows)
        self.observes = type(state.objective).observe is not Objective.observe

    def __call__(self, batch: Batch, iteration: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and norm, means over the whole batch, and whether the update was left out."""
        losses = self._gradient(batch, iteration)
        state, size = self.state, self.settings.batch_size
        loss = state.processes.mean(losses.sum() * (state.processes.size / size))
        norm, skip = state.update(loss, self.settings.lr_at(iteration), self.settings.clip)
        if self.observes:
            rows = state.processes.rows
            numbers = {k: v for k, v in batch.draws.items() if v.ndim == 1}  # not the noise
            draws = {name: rows(values, size) for name, values in numbers.items()}
            state.objective.observe(draws, rows(losses, size))
        return loss, norm, skip

    def _gradient(self, batch: Batch, iteration: int) -> Tensor:
        """Loss of each sample [b]; the gradient of their mean is left in the model."""
        while True:
            try:
                return self._in_parts(batch, iteration)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(iteration, error)

    def _in_parts(self, batch: Batch, iteration: int) -> Tensor:
        state, losses = self.state, []
        state.trained.zero_grad(set_to_none=True)
        for number in range(self.parts):
            start, stop = (len(batch.x0) * n // self.parts for n in (number, number + 1))
            # dropout draws from the global stream
            row = self.rows.start + start
            torch.manual_seed(hashed(self.seed, f"dropout {iteration}", row))
            part = batch[start:stop]
            with state.processes.last(state.loss, number == self.parts - 1):
                loss = state.loss(part.x0, part.draws, part.cond)
                share = loss.sum() * (state.processes.size / self.settings.batch_size)
                (share * state.scale.factor).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _halve(self, iteration: int, error: RuntimeError) -> None:
        """Take half as many rows at a time from now on."""
        rows, several = len(self.rows), self.state.processes.size > 1
        if several or self.parts == rows:
            remedy = (
                f"the processes cannot change course one by one: speed.accumulate={2 * self.parts}"
                if several
                else "use a smaller network, network.checkpointing=true or another device"
            )
            raise MemoryError(
                f"out of memory at iteration {iteration} with {-(-rows // self.parts)} samples at "
                f"once; {remedy}, and the same command goes on."
            ) from error
        error.__traceback__ = None  # its frames hold the activations
        self.state.trained.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.parts = min(rows, 2 * self.parts)
        say(
            f"out of memory at iteration {iteration}: from now on {-(-rows // self.parts)} "
            "samples at once, the same gradient"
        )
