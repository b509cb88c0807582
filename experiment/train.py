"""mode=train: train, evaluate, draw; or go on where an earlier run stopped."""

from __future__ import annotations

import json
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from types import FrameType

import torch

from experiment.augment import Augmentation, augmentation
from experiment.batches import Batches
from experiment.checkpoint import (
    check_weights,
    list_checkpoints,
    load_newest,
    save_checkpoint,
    stored_config,
)
from experiment.data import Dataset
from experiment.dequantizer import dequantizer
from experiment.errors import RunError
from experiment.estimators import estimate, show_estimates
from experiment.evaluation import Evaluation, evaluate, show
from experiment.ledger import append_evaluation, evaluated
from experiment.processes import Processes
from experiment.progress import say
from experiment.record import Record
from experiment.report import write_report
from experiment.run import Run
from experiment.sample import draw_and_save
from experiment.settings import Likelihood
from experiment.shards import rank
from experiment.speed import Speed, keep_freed_memory
from experiment.state import State
from experiment.trackers import Tracker
from experiment.trackers.first_process import in_first_process
from experiment.training import Training, fit
from likelihood import Dequantization
from score_models import Objective, ScoreModel
from sde_lib import validation
from sde_lib.reverse_variance import VARIANCES
from sde_lib.samplers import Sampler, SamplingError


def train(run: Run, *, quick_samples: int = 64) -> None:
    """Train the configured model, evaluate its average on the test set, and write the report.

    A run that exists already goes on from its newest checkpoint; if it is finished, this says so.

    Args:
        run: The composed configuration.
        quick_samples: Samples of the grid drawn at each evaluation.
    """
    if run.config["checkpoint"]:
        raise RunError(
            f"checkpoint={run.config['checkpoint']} is for mode=likelihood and mode=sample; "
            "training goes on from the newest checkpoint of its own directory, run.root/run.name."
        )
    validation.installed("matplotlib")  # for the pictures: not found missing after an hour
    settings: Training = run.build("training")
    likelihood: Likelihood = run.build("likelihood")
    sampler: Sampler = run.build("sampler")
    data: Dataset = run.build("data")
    likelihood.check(
        data, on_centres=not settings.dequantize, label_dropout=settings.label_dropout
    )
    Batches(len(data.train), settings.batch_size, run.seed)  # refuses a batch that is too large
    run = run.measured(data)
    augment = augmentation(run, data)
    speed: Speed = run.build("speed")
    processes: Processes = run.build("distributed")
    processes.share(settings.batch_size)  # refuses a batch that is too small
    if run.device().type == "cpu":
        keep_freed_memory()
    model, objective = _seeded(run, data)
    sampler.check(model.sde)
    for name in sorted(sampler.wanted):
        raise RunError(
            f"variance={name} is found out about a trained model; train with another sampler, "
            f"then run {VARIANCES[name].mode} and mode=sample with this one."
        )
    processes.join()
    first = processes.rank == 0
    tracker = in_first_process(lambda: run.build("tracking"))
    if run.fresh and first:
        run.set_aside()
    with run.owned() if first else nullcontext():
        if first:
            run.write_config()
        processes.largest(0)  # the directory is there, and all are
        state = State(
            model,
            objective,
            settings.profiles,
            settings.adam,
            speed=speed,
            processes=processes,
        )
        resumed = _resume(run, state, settings)
        whole = min(likelihood.max_samples or len(data.test), len(data.test))
        scored = evaluated(run.path, state.iteration, whole)
        if resumed and state.iteration >= settings.steps and scored:
            say(
                f"already finished: {run.path} has {state.iteration} iterations. "
                "`mode=likelihood` and `mode=sample` use it; training.steps=N goes on; "
                "run.fresh=true starts over."
            )
            return
        trainer = _Trainer(run, settings, likelihood, sampler, data, tracker, quick_samples)
        trainer.augment = augment
        trainer.go(state)


def _seeded(run: Run, data: Dataset) -> tuple[ScoreModel, Objective]:
    """Model and objective with weights that depend on the seed alone."""
    torch.manual_seed(run.seed)
    model, objective = run.build_model().to(run.device()), run.build("objective")
    some = data.units.encode(data.train[:2], torch.Generator().manual_seed(0)).to(run.device())
    cond = None if data.cond is None else data.train_cond[:2].to(run.device())
    objective.prepare(model, some, cond)
    return model, objective


def _resume(run: Run, state: State, settings: Training) -> bool:
    """Load the newest whole checkpoint into ``state``; False if there is none."""
    newest = load_newest(run.checkpoints) if list_checkpoints(run.checkpoints) else None
    if newest is None:
        return False
    path, stored = newest
    check_weights(state.shapes, stored.get("ema"), path)  # names every difference
    state.load(stored)
    say(f"going on from {path}, iteration {state.iteration}")
    planned = stored_config(path, stored).get("training", {}).get("steps", settings.steps)
    if settings.decay and planned != settings.steps:
        before = replace(settings, steps=int(planned)).lr_at(max(0, state.iteration - 1))
        now = settings.lr_at(state.iteration)
        say(
            f"the schedule is now laid over {settings.steps} iterations and not over {planned}: "
            f"the learning rate was {before:.3g} and goes on at {now:.3g}"
        )
    return True


class _Trainer:
    """The callbacks of one training run: record, tracker, checkpoints, evaluations, report."""

    def __init__(
        self,
        run: Run,
        settings: Training,
        likelihood: Likelihood,
        sampler: Sampler,
        data: Dataset,
        tracker: Tracker,
        quick_samples: int,
    ) -> None:
        self.run, self.settings, self.likelihood, self.sampler = run, settings, likelihood, sampler
        self.data, self.tracker, self.quick_samples = data, tracker, quick_samples
        self.record = Record(run.path)
        self.config_text = json.dumps(run.config)
        self.began = time.monotonic()
        self.stop_signal = 0
        self.evaluating = False
        self.unsaved = 0
        self.first = rank() == 0
        self.augment: Augmentation | None = None

    def go(self, state: State) -> None:
        """Train from ``state`` to the end, evaluate, report, and say where to look."""
        run = self.run
        if self.first:
            self.record.cut(state.iteration)
        name = run.config["run"]["name"]
        weights = sum(p.numel() for p in state.model.parameters())
        say(
            f"{name}: {len(self.data.train)} training samples of shape "
            f"{self.data.shape}, {weights:,} weights, "
            f"{self.settings.steps} iterations on {run.device()}"
        )
        self.tracker.start(run.path, run.config, name)
        exit_code = 1
        try:
            with _Signals(self):
                done = fit(
                    state,
                    self.data,
                    self.settings,
                    seed=run.seed,
                    failure_folder=run.path,
                    on_log=self.log,
                    on_checkpoint=self.checkpoint,
                    on_evaluate=self.glance,
                    should_stop=self.stopping,
                    augment=self.augment,
                )
                if done:
                    self.evaluating = True
                    self.evaluate(state)
                    exit_code = 0
            self.became("finished" if done else "stopped")
        except BaseException:
            self.became("failed" if state.iteration < self.settings.steps else "not evaluated")
            raise
        finally:
            report = write_report(run.path) if self.first else None
            self.tracker.finish(128 + self.stop_signal if self.stop_signal else exit_code)
        if not done:
            why = "" if self.stop_signal else f" after {self.settings.max_seconds:g} seconds"
            say(
                f"stopped{why} at iteration {state.iteration}; the same command goes on from "
                "there."
            )
            raise SystemExit(128 + self.stop_signal if self.stop_signal else 0)
        say(f"took {time.monotonic() - self.began:.0f} s\nreport: {report}")
        if self.tracker.describe():
            say(self.tracker.describe())

    def became(self, state: str) -> None:
        """Note how far the run is."""
        if self.first:
            self.run.set_state(state)

    def stopping(self) -> int:
        """Whether to stop: a signal came, or the time is over."""
        limit = self.settings.max_seconds
        over = limit is not None and time.monotonic() - self.began > limit
        return self.stop_signal or int(over)

    def log(self, values: dict[str, float], iteration: int) -> None:
        """Metrics to the record and to the tracker."""
        if not self.first:
            return
        self.record.log(values, iteration)
        self.tracker.log(values, iteration)
        if (
            "train/loss" in values
            and iteration % max(1, self.settings.steps // 10) < self.settings.log_every
        ):
            say(
                f"iteration {iteration}: loss {values['train/loss']:.4f}, "
                f"{values['perf/images_per_s']:.0f} samples/s, "
                f"{time.monotonic() - self.began:.0f} s"
            )

    def checkpoint(self, state: State) -> None:
        """Save everything; a full disk costs this checkpoint and not the run."""
        contents = {
            "config": self.config_text,
            "torch": str(torch.__version__),
            **state.state_dict(),
        }
        if not self.first:
            return
        try:
            save_checkpoint(self.run.checkpoints, state.iteration, contents)
            self.unsaved = 0
        except OSError as error:
            self.unsaved += 1
            if (
                not list_checkpoints(self.run.checkpoints)
                or state.iteration >= self.settings.steps
                or self.unsaved >= MOST_UNSAVED
            ):
                raise
            say(
                f"warning: checkpoint at iteration {state.iteration} not written "
                f"({error}); the one before it stays."
            )

    def glance(self, state: State) -> None:
        """A point of the curve: likelihood of a part of the test set, samples; never fatal."""
        settings = self.likelihood.quick(128)
        try:
            self.score(state, settings, "likelihood of a part")
            self.draw(state)
        except SamplingError as error:  # an early model may be too rough for a solver
            say(f"warning: evaluation at iteration {state.iteration} left out ({error})")
        if self.first:
            write_report(self.run.path)

    def evaluate(self, state: State) -> None:
        """Likelihood of the whole test set and samples: the result of the run."""
        settings, run, model = self.likelihood, self.run, state.ema
        made = dequantizer(
            settings, self.data, model, run.path, f"{state.iteration:08d}", seed=run.seed
        )
        result = self.score(state, settings, "test likelihood", made)
        bounds = None
        if settings.bounds:
            bounds = estimate(
                model, self.data, settings, result, seed=run.seed, dequantization=made
            )
            show_estimates(bounds)
        if self.first:
            name = list_checkpoints(run.checkpoints)[-1].name
            append_evaluation(
                run.path, result, state.iteration, model, self.data, settings, name, bounds
            )
        self.draw(state)

    def score(
        self,
        state: State,
        settings: Likelihood,
        description: str,
        dequantization: Dequantization | None = None,
    ) -> Evaluation:
        """Likelihood under the averaged weights, to the record and the screen."""
        result = evaluate(
            state.ema,
            self.data,
            settings,
            seed=self.run.seed,
            description=description,
            dequantization=dequantization,
        )
        self.log(result.as_metrics(), state.iteration)
        show(result, self.data, f"iteration {state.iteration}: test set")
        return result

    def draw(self, state: State) -> None:
        """Grid and strip of the averaged model."""
        model = state.ema
        if not self.first:
            return
        picture = draw_and_save(
            self.run, model, self.sampler, self.data, state.iteration, self.quick_samples
        )
        if picture is not None:
            self.tracker.image("samples/grid", picture, state.iteration)


MOST_UNSAVED = 3  # checkpoints in a row that may fail


class _Signals:
    """SIGTERM, SIGINT and SIGUSR1 finish the step, save and stop; a second one stops at once.

    So does the first during the final evaluation: all is saved then, and the same command does the
    evaluation again.
    """

    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self.handle) for number in self.caught}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, or leave."""
        if self.trainer.stop_signal or self.trainer.evaluating:
            raise SystemExit(128 + number)
        self.trainer.stop_signal = number
