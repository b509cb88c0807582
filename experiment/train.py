"""mode=train: train, evaluate, draw; or go on where an earlier run stopped."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import torch

from experiment.checkpoint import (
    list_checkpoints,
    load_newest,
    load_weights,
    save_checkpoint,
    stored_config,
)
from experiment.data import Dataset
from experiment.dequantizer import dequantizer
from experiment.errors import RunError
from experiment.estimators import estimate, show_estimates
from experiment.evaluation import Evaluation, evaluate, show
from experiment.ledger import append_evaluation, evaluated
from experiment.progress import say
from experiment.record import Record
from experiment.report import write_report
from experiment.run import Run
from experiment.sample import draw_and_save
from experiment.settings import Likelihood
from experiment.shards import alone
from experiment.trackers import Safe, Tracker
from experiment.training import Batches, State, Training, fit
from likelihood import Dequantization
from score_models import ScoreModel
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
    alone("train")
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
    likelihood.check(data, on_centres=not settings.dequantize)
    Batches(len(data.train), settings.batch_size, run.seed)  # refuses a batch that is too large
    run = run.measured(data)
    objective = run.build("objective")
    model = _seeded(run)
    sampler.check(model.sde)
    for name in sorted(sampler.wanted):
        raise RunError(
            f"variance={name} is found out about a trained model; train with another sampler, "
            f"then run {VARIANCES[name].mode} and mode=sample with this one."
        )
    state = State.fresh(model, settings)
    tracker = Safe(run.build("tracking"))
    if run.fresh:
        run.set_aside()
    with run.owned():
        run.write_config()
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
        _Trainer(run, settings, likelihood, sampler, data, tracker, quick_samples).go(
            state, objective
        )


def _seeded(run: Run) -> ScoreModel:
    """The model with weights that depend on the seed alone."""
    torch.manual_seed(run.seed)
    return run.build_model().to(run.device())


def _resume(run: Run, state: State, settings: Training) -> bool:
    """Load the newest whole checkpoint into ``state``; False if there is none."""
    newest = load_newest(run.checkpoints) if list_checkpoints(run.checkpoints) else None
    if newest is None:
        return False
    path, stored = newest
    load_weights(state.ema, stored.get("ema"), path)  # names every difference
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

    def go(self, state: State, objective: Callable[..., Any]) -> None:
        """Train from ``state`` to the end, evaluate, report, and say where to look."""
        run = self.run
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
                    objective,
                    self.data,
                    self.settings,
                    seed=run.seed,
                    failure_folder=run.path,
                    on_log=self.log,
                    on_checkpoint=self.checkpoint,
                    on_evaluate=self.glance,
                    should_stop=lambda: self.stop_signal != 0,
                )
                if done:
                    self.evaluating = True
                    self.evaluate(state)
                    exit_code = 0
            run.set_state("finished" if done else "stopped")
        except BaseException:
            run.set_state("failed" if state.iteration < self.settings.steps else "not evaluated")
            raise
        finally:
            report = write_report(run.path)
            self.tracker.finish(128 + self.stop_signal if self.stop_signal else exit_code)
        if not done:
            say(f"stopped at iteration {state.iteration}; the same command goes on from there.")
            raise SystemExit(128 + self.stop_signal)
        say(f"took {time.monotonic() - self.began:.0f} s\nreport: {report}")
        if self.tracker.describe():
            say(self.tracker.describe())

    def log(self, values: dict[str, float], iteration: int) -> None:
        """Metrics to the record and to the tracker."""
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
        try:
            save_checkpoint(self.run.checkpoints, state.iteration, contents)
        except OSError as error:
            if (
                not list_checkpoints(self.run.checkpoints)
                or state.iteration >= self.settings.steps
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
        write_report(self.run.path)

    def evaluate(self, state: State) -> None:
        """Likelihood of the whole test set and samples: the result of the run."""
        settings, run = self.likelihood, self.run
        made = dequantizer(
            settings, self.data, state.ema, run.path, f"{state.iteration:08d}", seed=run.seed
        )
        result = self.score(state, settings, "test likelihood", made)
        bounds = None
        if settings.bounds:
            bounds = estimate(
                state.ema, self.data, settings, result, seed=run.seed, dequantization=made
            )
            show_estimates(bounds)
        name = list_checkpoints(run.checkpoints)[-1].name
        append_evaluation(
            run.path, result, state.iteration, state.ema, self.data, settings, name, bounds
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
        picture = draw_and_save(
            self.run, state.ema, self.sampler, self.data, state.iteration, self.quick_samples
        )
        if picture is not None:
            self.tracker.image("samples/grid", picture, state.iteration)


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
