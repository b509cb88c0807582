"""What mode=diagnose measures on a trained model, level by level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.checkpoint import load_checkpoint, stored_config
from experiment.config import check_targets
from experiment.diagnosis.floor import known_floor, without_gaps
from experiment.diagnosis.levels import SURE, Curve, Wanted, gaussian_curve
from experiment.diagnosis.model import (
    GROUPS,
    Errors,
    Gradients,
    OwnLevels,
    even_levels,
    gradients,
    noise_errors,
    own_levels,
)
from experiment.diagnosis.probes import Bases, measured_bases
from experiment.diagnosis.samples import Part
from experiment.diagnosis.seen import Seen
from experiment.run import Run
from experiment.seeds import stream
from score_models import ScoreModel

LOSS_NUMBERS = 20_000  # of the samples of few numbers that are looked at
PROBED = 16  # test samples that probes are tried on


@dataclass(frozen=True)
class Trained:
    """A model and what it was trained with.

    Args:
        run: As :meth:`experiment.run.Run.trained` returns it.
        model: Averaged weights, in evaluation mode.
        checkpoint: Where it is from.
        iteration: Of the checkpoint.
    """

    run: Run
    model: ScoreModel
    checkpoint: Path
    iteration: int

    def objective(self) -> Any:  # noqa: ANN401
        """The objective that it was trained with, from the configuration stored with it."""
        stored = stored_config(self.checkpoint, load_checkpoint(self.checkpoint))
        node = stored.get("objective", self.run.config["objective"])
        check_targets({"objective": node}, f"checkpoint {self.checkpoint}", ("score_models",))
        return self.run.instantiate(node)


@dataclass(frozen=True)
class ByLevel:
    """What was measured.

    Attributes:
        train: Errors of training samples.
        test: Errors of test samples.
        gaussian: Error of the best linear denoiser.
        floor: Least possible error where it is known, else None.
        gradients: Of the error on training samples; None if not asked for.
        own: The draws of the objective; None where it has no such density.
        bases: Noise of probes on the model; None for one dimension.
    """

    train: Errors
    test: Errors
    gaussian: Tensor
    floor: Tensor | None
    gradients: Gradients | None
    own: OwnLevels | None
    bases: Bases | None

    @property
    def clock(self) -> Tensor:
        """u, [L]."""
        return self.test.clock

    def wanted(self) -> Wanted:
        """The density of levels that the least error known asks for.

        That is the floor; without one the error of the model on test samples, where it is below
        that of the best linear denoiser by two standard errors, and else the latter.
        """
        better = self.test.mean + SURE * self.test.standard_error < self.gaussian
        least = torch.where(better, self.test.mean, self.gaussian)
        known = least if self.floor is None else without_gaps(self.floor, self.clock)
        return Curve(self.clock, known, "the model").wanted()

    def gap(self) -> tuple[float, float]:
        """Test minus training error, integrated over u, nats a dimension; its standard error."""
        (test, test_error), (train, train_error) = self.test.integral(), self.train.integral()
        return test - train, math.hypot(test_error, train_error)

    def excess(self) -> tuple[float, float] | None:
        """Test error above the floor, likewise: the divergence of the model from the source."""
        if self.floor is None:
            return None
        known = self.floor.isfinite()
        over = Errors(self.clock[known], (self.test.each - self.floor)[:, known])
        return over.integral()

    def as_row(self) -> dict[str, Any]:
        """What goes into a JSON file."""
        row: dict[str, Any] = {"clock": self.clock.tolist(), "gaussian": self.gaussian.tolist()}
        for name, errors in (("train", self.train), ("test", self.test)):
            row[name] = errors.mean.tolist()
            row[f"{name}_error"] = errors.standard_error.tolist()
            row[f"{name}_samples"] = len(errors.each)
        row["floor"] = None if self.floor is None else numbers(self.floor)
        row["gap"], row["gap_error"] = self.gap()
        row["excess"] = self.excess()
        return row | self._levels() | self._gradients()

    def _levels(self) -> dict[str, Any]:
        wanted = self.wanted()
        row: dict[str, Any] = {"wanted": wanted.density.tolist()}
        row |= {"wanted_mean": wanted.mean, "wanted_std": wanted.std}
        if self.own is not None:
            row |= {"own": self.own.density.tolist()}
            row |= {"efficiency": wanted.efficiency(self.own.density)}
        return row

    def _gradients(self) -> dict[str, Any]:
        if self.gradients is None:
            return {}
        row: dict[str, Any] = {
            "gradient_norm": self.gradients.norm.tolist(),
            "gradient_agreed": self.gradients.agreed.tolist(),
            "gradient_samples": self.gradients.samples,
        }
        if self.own is not None:
            row["gradient_share"] = self.own.share(self.gradients).tolist()
        return row


def numbers(values: Tensor) -> list[float | None]:
    """As JSON has them: what is not finite is null."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def by_level(
    trained: Trained,
    seen: Seen,
    *,
    levels: int,
    loss_samples: int,
    gradient_samples: int,
) -> ByLevel:
    """Measure a trained model.

    Args:
        trained: The model.
        seen: What it was trained on.
        levels: How many, even from t_min to t_max.
        loss_samples: Of each part; more, 20,000 numbers, where samples are small.
        gradient_samples: Of the training part; 0 leaves the gradients out.
    """
    model = trained.model
    clock = even_levels(model.sde, levels)
    train, test = (_draws(seen, part, model, loss_samples) for part in (seen.train, seen.test))
    few = min(gradient_samples, len(train[0])) // GROUPS * GROUPS
    spectrum = seen.spectrum
    x0, noise, cond = (None if each is None else each[:few] for each in train)
    return ByLevel(
        noise_errors(model, *train[:2], clock, train[2]),
        noise_errors(model, *test[:2], clock, test[2]),
        gaussian_curve(spectrum.variances, clock, spectrum.shares).error,
        known_floor(seen.data, clock),
        gradients(model, x0, noise, clock, cond) if few else None,
        own_levels(trained.objective(), model.sde, clock),
        _bases(model, test, clock, seen),
    )


def _bases(
    model: ScoreModel, test: tuple[Tensor, Tensor, Tensor | None], clock: Tensor, seen: Seen
) -> Bases | None:
    """Noise of probes on the first test samples."""
    few = tuple(None if each is None else each[:PROBED] for each in test)
    return measured_bases(model, few, clock, seen.some, stream(seen.seed, "diagnose probes", 0))


def _draws(
    seen: Seen, part: Part, model: ScoreModel, loss_samples: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Samples [M, ...], their noise, and their conditions where the network takes any."""
    count = max(loss_samples, LOSS_NUMBERS // part.dims)
    x0 = part.some(count, seen.units, "loss").float().reshape(-1, *part.shape)
    # one noise for both parts: most of its share in their difference goes
    noise = torch.randn(x0.shape, generator=stream(seen.seed, "diagnose noise", 0))
    conditions = getattr(seen.data, f"{part.name}_cond", None)
    if conditions is None or getattr(model.network, "cond", None) is None:
        return x0, noise, None
    return x0, noise, conditions[part.chosen(count, "loss")]
