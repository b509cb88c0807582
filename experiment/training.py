"""The training loop: flat, resumable to the bit, and a function of (seed, iteration)."""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.checkpoint import write_atomically
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.progress import progress
from experiment.seeds import stream
from likelihood import Dequantization, Standardization, TruncatedNormalDequantization
from score_models import Objective, ScoreModel
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
        beta2: Decay of AdamW's second moment.
        weight_decay: AdamW's weight decay, >= 0.
        clip: Gradients are scaled down to this norm.
        dequantize: Whether K-level data are spread over their bins; false trains on bin centres,
            which ``likelihood.dequantization=truncated_normal`` wants.
        ema: Decay of the averaged weights, which are the ones evaluated; it warms up as (1 + n) /
            (10 + n).
        max_skipped: How many iterations with a loss or gradient that is not finite may be passed
            over without an update; one more stops training.
        log_every: Iterations between lines of the record.
        checkpoint_every: Iterations between checkpoints.
        evaluate_every: Iterations between evaluations; the end is always evaluated.
    """

    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    decay: bool = True
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip: float = 1.0
    dequantize: bool = True
    ema: float = 0.999
    max_skipped: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    evaluate_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "evaluate_every"):
            object.__setattr__(self, name, validation.count("training", name, getattr(self, name)))
        for name in ("warmup", "max_skipped"):
            whole = validation.count("training", name, getattr(self, name), at_least=0)
            object.__setattr__(self, name, whole)
        validation.real("training", "lr", self.lr, above=0)
        validation.real("training", "clip", self.clip, above=0)
        validation.real("training", "weight_decay", self.weight_decay, at_least=0)
        validation.real("training", "ema", self.ema, at_least=0, below=1)
        validation.real("training", "beta2", self.beta2, above=0, below=1)
        validation.flag("training", "decay", self.decay)
        validation.flag("training", "dequantize", self.dequantize)

    def lr_at(self, iteration: int) -> float:
        """Learning rate of an iteration, counted from 0."""
        rate = self.lr * min(1.0, (iteration + 1) / max(1, self.warmup))
        return (
            rate * 0.5 * (1 + math.cos(math.pi * iteration / self.steps)) if self.decay else rate
        )

    def ema_at(self, iteration: int) -> float:
        """Decay of the average at an iteration, counted from 0: short at first."""
        return min(self.ema, (1 + iteration) / (10 + iteration))


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


@dataclass
class State:
    """What training changes: the model, its average and the optimiser."""

    model: ScoreModel
    ema: ScoreModel
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    skipped: int = 0

    @classmethod
    def fresh(cls, model: ScoreModel, settings: Training) -> State:
        """The state before the first iteration."""
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.lr,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        return cls(model, ema, optimizer)

    @torch.no_grad()
    def update(self, lr: float, decay: float) -> None:
        """One step of the optimiser, and of the average behind it; buffers are copied."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        averages, weights = list(self.ema.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on to the bit; batches and noise follow from (seed, iteration)."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.skipped = int(state["iteration"]), int(state["skipped"])


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
        first, last = start // self.size, (start + self.batch_size - 1) // self.size
        shuffled = torch.cat([self._epoch(epoch) for epoch in range(first, last + 1)])
        offset = start - first * self.size
        return shuffled[offset : offset + self.batch_size]

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = torch.randperm(
                self.size, generator=stream(self.seed, "epoch", epoch)
            )
        return self._epochs[epoch]


def fit(
    state: State,
    objective: Objective,
    data: Dataset,
    settings: Training,
    *,
    seed: int,
    failure_folder: Path,
    on_log: Callable[[dict[str, float], int], None],
    on_checkpoint: Callable[[State], None],
    on_evaluate: Callable[[State], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from ``state.iteration`` to ``settings.steps``, calling back as it goes.

    Args:
        state: Changed in place.
        objective: Per-sample loss.
        data: Its training part is used.
        settings: How to optimise.
        seed: Seed of batches, times, noise and dropout.
        failure_folder: Where a batch that gave NaN is saved.
        on_log: Receives the metrics since the last call and the iteration.
        on_checkpoint: Called every ``checkpoint_every`` iterations and at the end.
        on_evaluate: Called every ``evaluate_every`` iterations, not at the end.
        should_stop: Asked after each iteration; True ends training early, after a checkpoint.

    Returns:
        Whether all steps were done.

    Raises:
        RunError: When loss or gradient is not finite; before the weights are touched, after the
            batch was saved.
    """
    device = next(state.model.parameters()).device
    batches = Batches(len(data.train), settings.batch_size, seed)
    units, window = trained_units(asdict(settings), data), _Window(device)
    state.model.train()
    bar = progress(range(state.iteration, settings.steps), "training")
    for iteration in bar:
        generator = stream(seed, "iteration", iteration)
        # dropout draws from the global stream
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        x0 = units.encode(data.train[batches(iteration)], generator).to(device)
        loss, norm = _gradient(state, objective, x0, generator, settings)
        if torch.isfinite(loss + norm):  # the one wait for the device in an iteration
            state.update(settings.lr_at(iteration), settings.ema_at(iteration))
            window.add(loss, norm)
        elif state.skipped < settings.max_skipped:
            state.skipped += 1
        else:
            _fail(state, x0, loss, norm, iteration, seed, failure_folder)
        state.iteration = done = iteration + 1
        stopping = should_stop()
        if done % settings.log_every == 0 or done == settings.steps or stopping:
            metrics = window.close(settings.batch_size)
            metrics |= {"train/lr": settings.lr_at(iteration), "train/skipped": state.skipped}
            on_log(metrics, done)
            bar.note(f"loss {metrics['train/loss']:.4f}")
        if done % settings.checkpoint_every == 0 or done == settings.steps or stopping:
            on_checkpoint(state)
        if stopping and done < settings.steps:
            return False
        if done % settings.evaluate_every == 0 and done < settings.steps:
            on_evaluate(state)
            state.model.train()
            window.restart_clock()
    return True


def _gradient(
    state: State, objective: Objective, x0: Tensor, generator: torch.Generator, settings: Training
) -> tuple[Tensor, Tensor]:
    """Leave the clipped gradient in the model; loss and norm before clipping, on the device."""
    loss = objective(state.model, x0, generator).mean()
    state.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(state.model.parameters()), settings.clip)
    return loss.detach(), norm


class _Window:
    """Means since the last line of the record, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._empty()

    def _empty(self) -> None:
        self.sums, self.count = torch.zeros(2, device=self.device), 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Forget the time that something else took."""
        self.timed, self.since = 0, time.monotonic()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """One more iteration."""
        self.sums += torch.stack([loss, norm]).to(self.sums)
        self.count += 1
        self.timed += 1

    def close(self, batch_size: int) -> dict[str, float]:
        """The metrics of the window, NaN if all of it was skipped; the next one begins."""
        loss, norm = (self.sums / self.count).tolist()
        seconds = max(time.monotonic() - self.since, 1e-9)
        speed = self.timed * batch_size / seconds
        self._empty()
        return {"train/loss": loss, "train/grad_norm": norm, "perf/images_per_s": speed}


def _fail(
    state: State, x0: Tensor, loss: Tensor, norm: Tensor, iteration: int, seed: int, folder: Path
) -> None:
    """Save what gave NaN, and stop before the update."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"failure-{iteration:08d}.pt"
    culprit = {"iteration": iteration, "seed": seed, "batch": x0.cpu(), "loss": loss.cpu()}
    content = io.BytesIO()
    torch.save(culprit | state.state_dict(), content)
    write_atomically(path, content.getbuffer())
    raise RunError(
        f"loss {float(loss):g} with gradient norm {float(norm):g} at iteration {iteration}, after "
        f"{state.skipped} skipped; the weights are as before it. Batch and state are in {path}. "
        "Look at the batch for bad samples, allow training.max_skipped=N, or start over with a "
        "lower training.lr."
    )
