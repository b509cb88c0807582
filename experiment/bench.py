"""Where samplers are compared: one model, one noise, one test set, and a converged solve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.batches import trained_units
from experiment.conditions import Conditions
from experiment.contenders import Trial, trials
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.fitted import fitted
from experiment.progress import say
from experiment.run import Run
from experiment.seeds import sample_paths, stream
from experiment.shards import halving
from score_models import ScoreModel
from sde_lib import Counted, validation
from sde_lib.distances import (
    energy_distance,
    median_bandwidths,
    mmd_squared,
    root_mean_square,
    sliced_wasserstein,
)
from sde_lib.reverse_variance import AnalyticVariance
from sde_lib.samplers import FlowAdams, Sampler, SamplingError

FEWEST = 20  # samples; the normal intervals of the distances mean little below
EXAMPLES = {"samplers": "[flow_adams,heun]", "nfe": "[5,10,20]", "tolerances": "[1e-2,1e-3]"}


@dataclass(frozen=True)
class Asked:
    """What is to be compared, checked; see :func:`experiment.compare.compare`."""

    samplers: Sequence[str]
    nfe: Sequence[int]
    tolerances: Sequence[float]
    num_samples: int
    batch_size: int
    endpoints: int
    reference_steps: int

    def __post_init__(self) -> None:
        for name in ("samplers", "nfe", "tolerances"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not value:
                raise ValueError(
                    f"mode=compare needs a list of {name} with one entry or more, such as "
                    f"mode.{name}={EXAMPLES[name]}; got {value!r}."
                )
        counted = [validation.count("mode=compare", "each nfe", n) for n in self.nfe]
        object.__setattr__(self, "nfe", sorted(set(counted)))
        for value in self.tolerances:
            validation.real("mode=compare", "each of tolerances", value, above=0, below=1)
        least = {"num_samples": FEWEST, "batch_size": 1, "endpoints": 2, "reference_steps": 10}
        for name, few in least.items():
            value = validation.count("mode=compare", name, getattr(self, name), at_least=few)
            object.__setattr__(self, name, value)

    def check(self, data: Dataset) -> None:
        """Refuse data with too few samples to compare with.

        Raises:
            RunError: Saying how many there are.
        """
        if len(data.test) < FEWEST:
            raise RunError(
                f"mode=compare needs {FEWEST} test samples or more, since it estimates errors "
                f"from them; {data.name} has {len(data.test)}."
            )
        if len(data.train) < self.num_samples:
            raise RunError(
                f"mode=compare holds num_samples={self.num_samples} samples to as many of the "
                f"training set, and {data.name} has {len(data.train)}; use "
                f"mode.num_samples={len(data.train)} or less."
            )


STAND_IN = AnalyticVariance(torch.tensor([-99.0, 99.0]).double(), torch.ones(2).double(), 1.0)


@dataclass(frozen=True)
class Bench:
    """What every sampler of a comparison gets: the same model, noise and test set.

    Args:
        run: With the configuration that is stored with the model.
        model: In evaluation mode.
        path: Its checkpoint.
        asked: The numbers of the comparison.
        conditions: Of the samples, those of mode=sample: a mixture as the data are.
        train: Training samples in model units, [N, ...].
        test: Test samples in model units, [M, ...].
        bandwidths: Of the kernels.
        truth: Converged ends of the first samples, [E, ...]; None if there are none.
        about_truth: How they were found, and how far half the steps end from them, RMS.
    """

    run: Run
    model: ScoreModel
    path: Path
    asked: Asked
    conditions: Conditions
    train: Tensor
    test: Tensor
    bandwidths: tuple[float, ...]
    truth: Tensor | None = None
    about_truth: dict[str, Any] | None = None

    @classmethod
    def of(cls, run: Run, model: ScoreModel, data: Dataset, path: Path, asked: Asked) -> Bench:
        """With the data in the units of the model."""
        units = trained_units(run.config["training"], data)
        train, test = (
            units.encode(values[: asked.num_samples], stream(run.seed, "compare", i))
            for i, values in enumerate((data.train, data.test))
        )
        train, test = train.to(run.device()), test.to(run.device())
        conditions = Conditions(data, run.seed)
        return cls(run, model, path, asked, conditions, train, test, median_bandwidths(test))

    def planned(self, chosen: dict[str, Sampler]) -> list[Trial]:
        """All that is to be tried, each sampler fitted to the model, before anything is drawn.

        Raises:
            RunError: If one cannot work on this process, or wants to be calibrated first.
        """
        for sampler in chosen.values():
            sampler.check(self.model.sde)
        for sampler in chosen.values():
            if sampler.wanted:  # by another mode, which is missed before the first pilot
                self.fitted(sampler)
        return [trial for item in chosen.items() for trial in self._priced(*item)]

    def _priced(self, name: str, sampler: Sampler) -> list[Trial]:
        """``sampler`` at each price, with what it wants to know of the model."""
        try:
            made = self.fitted(sampler)
        except SamplingError as error:  # the model breaks under its pilot
            return [Trial(name, "any price", None, str(error))]
        if sampler.wanted:  # steps are counted on one number, which no trained head goes with
            made = sampler.given(dict.fromkeys(sampler.wanted, STAND_IN))
        each = trials(name, made, self.model.sde, self.asked.nfe, self.asked.tolerances)
        return [self._refitted(trial, sampler) for trial in each]

    def _refitted(self, trial: Trial, asked: Sampler) -> Trial:
        """Fitted to its number of steps too, which may ask for another rule."""
        if trial.sampler is None or not hasattr(asked, "steps"):
            return trial
        return replace(trial, sampler=self.fitted(replace(asked, steps=trial.sampler.steps)))

    def fitted(self, sampler: Sampler) -> Sampler:
        """As mode=sample has it."""
        where = {"checkpoint": self.path, "folder": self.run.fitted}
        where |= {"objective": self.run.average.objective, "conditions": self.conditions}
        return fitted(sampler, self.model, self.train[:1], **where)

    def draw(self, sampler: Sampler, count: int) -> tuple[Tensor, int]:
        """Samples [count, ...] and the evaluations of each; sample i depends on seed i alone."""

        def drawn(rows: range) -> tuple[Tensor, int]:
            score = Counted(self.conditions.score(self.model, rows))
            streams = sample_paths(self.run.seed, "samples", rows, self.run.device())
            shape = (len(rows), *self.test.shape[1:])
            start = self.model.sde.prior_sample(shape, generator=streams, device=streams.device)
            return sampler(score, self.model.sde, start, generator=streams), score.nfe

        size = self.asked.batch_size
        batches = [range(i, min(i + size, count)) for i in range(0, count, size)]
        parts = [part for rows in batches for part in halving(drawn, rows)]
        return torch.cat([samples for samples, _ in parts]), max(nfe for _, nfe in parts)

    def solved(self) -> Bench:
        """With the ends of a converged solve; without, if the model breaks on the way."""
        count = min(self.asked.endpoints, self.asked.num_samples)
        try:
            rough = self.fitted(FlowAdams(self.asked.reference_steps))
            fine = replace(rough, steps=2 * rough.steps)
            before, truth = (self.draw(sampler, count)[0] for sampler in (rough, fine))
        except SamplingError as error:
            say(f"no endpoint errors, for want of a reference: {error}")
            return self
        doubt = root_mean_square(before - truth).value
        about = {"sampler": repr(fine), "samples": count, "good_to": doubt}
        return replace(self, truth=truth, about_truth=about)

    def distances(self, samples: Tensor) -> dict[str, Any]:
        """Of ``samples`` from the test set, by name."""
        directions = stream(self.run.seed, "directions", 0)
        found = {
            "sliced_w2": sliced_wasserstein(samples, self.test, generator=directions),
            "energy_distance": energy_distance(samples, self.test),
            "mmd_squared": mmd_squared(samples, self.test, self.bandwidths),
        }
        return {name: asdict(estimate) for name, estimate in found.items()}

    def row(self, trial: Trial) -> dict[str, Any]:
        """What is found of one sampler at one price, or why nothing is."""
        about = {"sampler": trial.name, "asked": trial.asked}
        if trial.sampler is None:
            return about | {"failed": trial.refused}
        about |= {"repr": repr(trial.sampler)}
        grid = getattr(trial.sampler, "grid", None)
        about |= {} if grid is None else {"grid": repr(grid)}
        about |= {"stochastic": getattr(trial.sampler, "stochastic", True)}
        began = time.monotonic()
        try:
            samples, nfe = self.draw(trial.sampler, self.asked.num_samples)
        except SamplingError as error:
            return about | {"failed": str(error)}
        about |= {"nfe": nfe, "seconds": time.monotonic() - began}
        return about | self._error(samples, about["stochastic"]) | self.distances(samples)

    def _error(self, samples: Tensor, stochastic: bool) -> dict[str, Any]:
        if stochastic or self.truth is None:
            return {}
        error = root_mean_square(samples[: len(self.truth)] - self.truth)
        return {"endpoint_error": asdict(error)}

    def about(self) -> dict[str, Any]:
        """What the numbers of a comparison mean, and how far training samples are."""
        return {
            "num_samples": self.asked.num_samples,
            "test_samples": len(self.test),
            "units": "model",
            "interval": 0.95,
            "bandwidths": list(self.bandwidths),
            "reference": self.about_truth,
            "floor": self.distances(self.train),
        }
