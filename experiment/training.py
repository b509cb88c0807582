"""The training loop: flat, resumable to the bit, and a function of (seed, iteration)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.averages import Exponential, Power, Profile
from experiment.batches import Recipe, trained_units
from experiment.checkpoint import write_atomically
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.feed import Feed
from experiment.progress import progress
from experiment.state import State
from experiment.step import Step
from experiment.window import Window
from sde_lib import validation


@dataclass(frozen=True)
class Training:
    """How to optimise.

    Args:
        steps: Iterations of the optimiser.
        batch_size: Samples an iteration; at most the size of the training set.
        lr: Learning rate of AdamW after warm-up.
        warmup: Iterations over which it rises from zero.
        decay: Whether it falls to zero along a cosine; else it stays.
        beta1: Decay of AdamW's first moment.
        beta2: Decay of its second moment.
        weight_decay: AdamW's weight decay, >= 0.
        clip: Gradients are scaled down to this norm.
        dequantize: Whether K-level data are spread over their bins; false trains on bin centres,
            which ``likelihood.dequantization=truncated_normal`` wants.
        ema: Decay of the averaged weights, which are the ones evaluated, or several decays, the
            first for that; see :class:`experiment.averages.Exponential`.
        power_ema: Widths of averages over a share of the training, for
            :mod:`experiment.posthoc`; see :class:`experiment.averages.Power`.
        snapshot_every: Iterations between snapshots of these, of which the average of any width is
            made after training. None: there are none.
        label_dropout: Share of samples trained without their conditioning, for classifier-free
            guidance, in [0, 1).
        max_skipped: How many iterations with a loss or gradient that is not finite may be passed
            over without an update; one more stops training.
        log_every: Iterations between lines of the record.
        checkpoint_every: Iterations between checkpoints.
        evaluate_every: Iterations between evaluations; the end is always evaluated.
        max_seconds: After so long training saves and stops; the same command goes on. None: never.
    """

    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    decay: bool = True
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip: float = 1.0
    dequantize: bool = True
    ema: float | Sequence[float] = 0.999
    power_ema: Sequence[float] = ()
    snapshot_every: int | None = None
    label_dropout: float = 0.0
    max_skipped: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    evaluate_every: int = 1000
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "evaluate_every"):
            object.__setattr__(self, name, validation.count("training", name, getattr(self, name)))
        for name in ("warmup", "max_skipped"):
            whole = validation.count("training", name, getattr(self, name), at_least=0)
            object.__setattr__(self, name, whole)
        validation.real("training", "lr", self.lr, above=0)
        validation.real("training", "clip", self.clip, above=0)
        validation.real("training", "weight_decay", self.weight_decay, at_least=0)
        validation.real("training", "beta1", self.beta1, at_least=0, below=1)
        validation.real("training", "beta2", self.beta2, above=0, below=1)
        validation.real("training", "label_dropout", self.label_dropout, at_least=0, below=1)
        if self.max_seconds is not None:
            validation.real("training", "max_seconds", self.max_seconds, above=0)
        if self.snapshot_every is not None:
            every = validation.count("training", "snapshot_every", self.snapshot_every)
            object.__setattr__(self, "snapshot_every", every)
            if not self.power_ema:
                raise ValueError(
                    "training.snapshot_every is about the averages of training.power_ema, and "
                    "there are none; add training.power_ema=[0.05,0.1], or leave it out."
                )
        names = [profile.name for profile in self.profiles]
        if len({*names}) < len(names):
            raise ValueError(f"training needs averages that differ; got {', '.join(names)}.")
        validation.flag("training", "decay", self.decay)
        validation.flag("training", "dequantize", self.dequantize)

    def lr_at(self, iteration: int) -> float:
        """Learning rate of an iteration, counted from 0."""
        rate = self.lr * min(1.0, (iteration + 1) / max(1, self.warmup))
        return (
            rate * 0.5 * (1 + math.cos(math.pi * iteration / self.steps)) if self.decay else rate
        )

    @property
    def profiles(self) -> list[Profile]:
        """Of the averages of the weights; the first is the one that is evaluated."""
        decays = self.ema if isinstance(self.ema, Sequence) and self.ema else [self.ema]
        widths = self.power_ema or ()
        return [*(Exponential(decay) for decay in decays), *(Power(width) for width in widths)]

    @property
    def adam(self) -> dict[str, Any]:
        """Arguments of the optimiser."""
        betas = self.beta1, self.beta2
        return {"lr": self.lr, "betas": betas, "weight_decay": self.weight_decay}


def fit(
    state: State,
    data: Dataset,
    settings: Training,
    *,
    seed: int,
    failure_folder: Path,
    on_log: Callable[[dict[str, float], int], None],
    on_checkpoint: Callable[[State], None],
    on_evaluate: Callable[[State], None],
    on_snapshot: Callable[[State], None] = lambda state: None,
    should_stop: Callable[[], int] = lambda: 0,
    augment: Callable[[Tensor, Any], Tensor] | None = None,
) -> bool:
    """Train from ``state.iteration`` to ``settings.steps``, calling back as it goes.

    On a GPU the host waits for the device where something is logged, saved or evaluated, and
    nowhere else.

    Args:
        state: Changed in place.
        data: Its training part is used.
        settings: How to optimise.
        seed: Seed of batches, times, noise and dropout.
        failure_folder: Where a batch that gave NaN is saved.
        on_log: Receives the metrics since the last call and the iteration.
        on_checkpoint: Called every ``checkpoint_every`` iterations and at the end.
        on_evaluate: Called every ``evaluate_every`` iterations, not at the end.
        on_snapshot: Called every ``snapshot_every`` iterations, before ``on_checkpoint``, so
            that none is missing from behind a checkpoint after a crash.
        should_stop: Asked after each iteration; anything but 0 in one of the processes ends
            training early in all of them, after a checkpoint.
        augment: (samples, generator) -> samples, in the units of the data.

    Returns:
        Whether all steps were done.

    Raises:
        RunError: When loss or gradient is not finite; with the weights as before, after the batch
            was saved.
    """
    together, speed = state.processes, state.speed
    state.faults.allowed = settings.max_skipped
    recipe = Recipe(
        data,
        trained_units(asdict(settings), data),
        state.objective,
        state.model.sde,
        settings.batch_size,
        seed,
        augment,
        settings.label_dropout,
    )
    feed = Feed(
        recipe,
        together.share(settings.batch_size),
        state.device,
        ahead=speed.batches_ahead(state.device),
        workers=speed.workers,
    )
    step, window = Step(state, settings, seed), Window(state)
    state.trained.train()
    with feed.running():
        bar = progress(range(state.iteration, settings.steps), "training")
        for iteration in bar:
            with window.waiting():
                batch = feed(iteration)
            window.add(*step(batch, iteration), settings.clip)
            state.iteration = done = iteration + 1
            stopping = together.largest(int(should_stop())) != 0
            logs = done % settings.log_every == 0 or done == settings.steps or stopping
            saves = done % settings.checkpoint_every == 0 or done == settings.steps or stopping
            evaluates = done % settings.evaluate_every == 0 and done < settings.steps
            snaps = settings.snapshot_every is not None and done % settings.snapshot_every == 0
            if logs or saves or snaps or evaluates or state.device.type == "cpu":
                _check(state, recipe, seed, failure_folder)  # the one wait for the device
            if logs:
                metrics = window.close(settings.batch_size)
                on_log(metrics | {"train/lr": settings.lr_at(iteration)}, done)
                bar.note(f"loss {metrics['train/loss']:.4f}")
            if snaps:
                on_snapshot(state)
            if saves:
                on_checkpoint(state)
            if stopping and done < settings.steps:
                return False
            if evaluates:
                on_evaluate(state)
                state.trained.train()
            if saves or snaps or evaluates:
                window.restart_clock()
    return True


def _check(state: State, recipe: Recipe, seed: int, folder: Path) -> None:
    """Stop if there was one iteration too many that is not finite, after saving what it was."""
    iteration = int(state.faults.fatal)
    if iteration < 0:
        return
    loss, norm = state.faults.values.tolist()
    state.iteration = iteration
    culprit = {"iteration": iteration, "seed": seed, "loss": loss, "norm": norm}
    culprit["batch"] = recipe(iteration, range(recipe.batch_size)).x0
    contents, where = culprit | state.state_dict(), "with the first process"
    if state.processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        where = folder / f"failure-{iteration:08d}.pt"
        content = io.BytesIO()
        torch.save(contents, content)
        write_atomically(where, content.getbuffer())
    raise RunError(
        f"loss {loss:g} with gradient norm {norm:g} at iteration {iteration}, after "
        f"{state.faults.skipped} skipped; the weights are as before it. Batch and state are in "
        f"{where}. Look at the batch for bad samples, allow training.max_skipped=N, or start over "
        "with a lower training.lr."
    )
