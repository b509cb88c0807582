"""What a training is made of: all parts, checked against each other before any is used."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from experiment.augment import Augmentation, augmentation
from experiment.batches import Batches
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.processes import Processes
from experiment.run import Run
from experiment.settings import Likelihood
from experiment.speed import Speed
from experiment.state import State, all_in_memory
from experiment.training import Training
from score_models import Objective, ScoreModel
from score_models.acceleration import PRECISIONS
from score_models.model_size import ModelSize, describe
from sde_lib import SDE, validation
from sde_lib.reverse_variance import VARIANCES
from sde_lib.samplers import Sampler


@dataclass(frozen=True)
class Choices:
    """The parts of a training that fit together.

    Attributes:
        run: With what was measured of the data.
        settings: How long, how fast, what is kept.
        likelihood: How it is scored.
        sampler: What draws its pictures.
        data: What it learns.
        augment: What training changes about samples.
        speed: How a step is computed.
        processes: Who computes it.
        model: With its first weights, which depend on the seed alone.
        objective: Likewise.
    """

    run: Run
    settings: Training
    likelihood: Likelihood
    sampler: Sampler
    data: Dataset
    augment: Augmentation | None
    speed: Speed
    processes: Processes
    model: ScoreModel
    objective: Objective

    @classmethod
    def of(cls, run: Run, settings: Training) -> Choices:
        """Those of a composed configuration, whose ``settings`` have been made already.

        Raises:
            RunError: What does not fit, like the errors of the parts themselves.
        """
        likelihood, sampler, speed, processes = before_data(run, settings)
        data: Dataset = run.build("data")
        _check_data(data, settings, likelihood, run.seed)
        run = run.measured(data)
        augment = augmentation(run, data)
        model, objective = _seeded(run, data)
        speed.check(objective, run.device())
        processes.check(objective)
        run = replace(run, caveat=objective.caveat)
        return cls(
            run, settings, likelihood, sampler, data, augment, speed, processes, model, objective
        )

    @property
    def size(self) -> ModelSize:
        """What the model takes in memory."""
        share = len(self.processes.share(self.settings.batch_size))
        rows = -(-share // self.speed.accumulate)
        dtype, averages = PRECISIONS[self.speed.precision], len(self.settings.profiles)
        return describe(self.model.network, self.data.shape, rows, averages=averages, dtype=dtype)

    def state(self) -> State:
        """A training that has not begun."""
        return State(
            self.model,
            self.objective,
            self.settings.profiles,
            self.settings.adam,
            speed=self.speed,
            processes=self.processes,
        )


def before_data(run: Run, settings: Training) -> tuple[Likelihood, Sampler, Speed, Processes]:
    """The parts that need no data, checked as far as that goes without.

    Raises:
        RunError: What does not fit, like the errors of the parts themselves.
    """
    _refuse_trained(run)
    validation.installed("matplotlib")  # for the pictures: not found missing after an hour
    likelihood: Likelihood = run.build("likelihood")
    sampler: Sampler = run.build("sampler")
    _check_sampler(sampler, run.build("sde"))
    speed: Speed = run.build("speed")
    processes: Processes = run.build("distributed")
    speed.parts(processes.share(settings.batch_size))
    return likelihood, sampler, speed, processes


def _refuse_trained(run: Run) -> None:
    if run.config["checkpoint"]:
        raise RunError(
            f"checkpoint={run.config['checkpoint']} is for mode=likelihood and mode=sample; "
            "training goes on from the newest checkpoint of its own directory, run.root/run.name."
        )
    if run.config.get("average") is not None:
        raise RunError(
            f"average={run.config['average']} is for the modes that use a trained model; training "
            "keeps those of training.ema and training.power_ema, and evaluates the first."
        )


def _check_data(data: Dataset, settings: Training, likelihood: Likelihood, seed: int) -> None:
    likelihood.check(
        data, on_centres=not settings.dequantize, label_dropout=settings.label_dropout
    )
    Batches(len(data.train), settings.batch_size, seed)  # refuses a batch that is too large
    if settings.label_dropout and data.cond is None:
        raise RunError(
            f"training.label_dropout={settings.label_dropout:g} drops conditions, and {data.name} "
            "come without; add data.conditional=true, or leave it out."
        )


def _check_sampler(sampler: Sampler, sde: SDE) -> None:
    sampler.check(sde)
    for name in sorted(sampler.wanted):
        raise RunError(
            f"variance={name} is found out about a trained model; train with another sampler, "
            f"then run {VARIANCES[name].mode} and mode=sample with this one."
        )


def _seeded(run: Run, data: Dataset) -> tuple[ScoreModel, Objective]:
    """Model and objective with weights that depend on the seed alone."""
    torch.manual_seed(run.seed)
    with all_in_memory():
        model = run.build_model().to(run.device())
    objective = run.build("objective")
    some = data.units.encode(data.train[:2], torch.Generator().manual_seed(0)).to(run.device())
    cond = None if data.cond is None else data.train_cond[:2].to(run.device())
    objective.prepare(model, some, cond)
    objective.draw(model.sde, some.shape, torch.Generator())  # refuses samples it is not for
    return model, objective
