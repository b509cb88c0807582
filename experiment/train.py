"""mode=train: train, evaluate, draw; or go on where an earlier run stopped."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiment.augment import Augmentation, augmentation
from experiment.batches import Batches
from experiment.checkpoint import (
    Saver,
    check_weights,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    restoring,
    stored_config,
)
from experiment.data import Dataset
from experiment.dequantizer import dequantizer
from experiment.errors import RunError
from experiment.estimators import estimate, show_estimates
from experiment.evaluation import Evaluation, evaluate, show
from experiment.fitted import digest_of
from experiment.ledger import append_evaluation, evaluated
from experiment.processes import Processes
from experiment.progress import say
from experiment.record import Record
from experiment.report import renew_report
from experiment.run import Run
from experiment.sample import draw_and_save
from experiment.settings import Likelihood
from experiment.shards import first_alone, from_first, in_first, rank
from experiment.snapshots import cut_snapshots, save_snapshot
from experiment.speed import Speed, keep_freed_memory
from experiment.state import State, all_in_memory
from experiment.stopping import REQUEUE, Stopping
from experiment.trackers import Tracker
from experiment.trackers.first_process import in_first_process
from experiment.training import Training, fit
from experiment.variance_heads import learned_variance
from likelihood import Dequantization
from score_models import Objective, ScoreModel
from score_models.acceleration import PRECISIONS
from score_models.model_size import ModelSize, describe
from sde_lib import validation
from sde_lib.reverse_variance import VARIANCES
from sde_lib.samplers import Sampler, SamplingError


def train(run: Run, *, quick_samples: int = 64, requeue_code: int = REQUEUE) -> None:
    """Train the configured model, evaluate its average on the test set, and write the report.

    A run that exists already goes on from its newest checkpoint; if it is finished, this says so.

    Args:
        run: The composed configuration.
        quick_samples: Samples of the grid drawn at each evaluation.
        requeue_code: Exit code after SIGUSR1, by which a scheduler knows that it goes on.
    """
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
    validation.installed("matplotlib")  # for the pictures: not found missing after an hour
    settings: Training = run.build("training")
    stopping = Stopping(settings.max_seconds, requeue_code)
    likelihood: Likelihood = run.build("likelihood")
    sampler: Sampler = run.build("sampler")
    data: Dataset = run.build("data")
    likelihood.check(
        data, on_centres=not settings.dequantize, label_dropout=settings.label_dropout
    )
    Batches(len(data.train), settings.batch_size, run.seed)  # refuses a batch that is too large
    run = run.measured(data)
    augment = augmentation(run, data)
    if settings.label_dropout and data.cond is None:
        raise RunError(
            f"training.label_dropout={settings.label_dropout:g} drops conditions, and {data.name} "
            "come without; add data.conditional=true, or leave it out."
        )
    speed: Speed = run.build("speed")
    processes: Processes = run.build("distributed")
    processes.share(settings.batch_size)  # refuses a batch that is too small
    if run.device().type == "cpu":
        keep_freed_memory()
    model, objective = _seeded(run, data)
    speed.check(objective, run.device())
    processes.check(objective)
    sampler.check(model.sde)
    for name in sorted(sampler.wanted):
        raise RunError(
            f"variance={name} is found out about a trained model; train with another sampler, "
            f"then run {VARIANCES[name].mode} and mode=sample with this one."
        )
    rows = -(-len(processes.share(settings.batch_size)) // speed.accumulate)
    size = describe(
        model.network,
        data.shape,
        rows,
        averages=len(settings.profiles),
        dtype=PRECISIONS[speed.precision],
    )
    processes.join()
    tracker = in_first_process(lambda: run.build("tracking"))
    with ExitStack() as held:
        in_first(lambda: _own(run, held))
        state = State(
            model,
            objective,
            settings.profiles,
            settings.adam,
            speed=speed,
            processes=processes,
        )
        resumed = _resume(run, state, settings)
        whole = likelihood.count(data)
        scored = in_first(lambda: evaluated(run.path, state.iteration, whole))
        if from_first(resumed and state.iteration >= settings.steps and scored):
            say(
                f"already finished: {run.path} has {state.iteration} iterations. "
                "`mode=likelihood` and `mode=sample` use it; training.steps=N goes on; "
                "run.fresh=true starts over."
            )
            return
        trainer = _Trainer(run, settings, likelihood, sampler, data, tracker, quick_samples)
        trainer.augment, trainer.size = augment, size
        trainer.go(state, stopping)


def _seeded(run: Run, data: Dataset) -> tuple[ScoreModel, Objective]:
    """Model and objective with weights that depend on the seed alone."""
    torch.manual_seed(run.seed)
    with all_in_memory():
        model = run.build_model().to(run.device())
    objective = run.build("objective")
    some = data.units.encode(data.train[:2], torch.Generator().manual_seed(0)).to(run.device())
    cond = None if data.cond is None else data.train_cond[:2].to(run.device())
    objective.prepare(model, some, cond)
    return model, objective


def _own(run: Run, held: ExitStack) -> None:
    """Take the directory of ``run`` while ``held`` lasts, and write what is being trained."""
    if run.fresh:
        run.set_aside()
    held.enter_context(run.owned())
    run.write_config()


def _newest(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint, that of the first process in all of them.

    Raises:
        RunError: If another process does not find it.
    """
    there = rank() == 0 and bool(list_checkpoints(run.checkpoints))
    newest = load_newest(run.checkpoints) if there else None
    path = from_first(newest and newest[0])
    if path is None or rank() == 0:
        return newest
    if not path.exists():
        raise RunError(
            f"process {rank()}, on {socket.gethostname()}, does not find {path.absolute()}, from "
            "which the first goes on; run.root must be a directory that all machines share."
        )
    return path, load_checkpoint(path)


def _resume(run: Run, state: State, settings: Training) -> bool:
    """Load the newest whole checkpoint into ``state``; False if there is none."""
    newest = _newest(run)
    if newest is None:
        return False
    path, stored = newest
    check_weights(state.model, stored.get("ema"), path)  # names every difference
    with restoring(path):
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
        self.save = Saver(run.checkpoints)
        self.first = rank() == 0
        self.augment: Augmentation | None = None
        self.size: ModelSize | None = None

    def go(self, state: State, stopping: Stopping) -> None:
        """Train from ``state`` to the end, evaluate, report, and say where to look."""
        run = self.run
        if self.first:
            self.record.cut(state.iteration)
            cut_snapshots(self.run.snapshots, state.iteration)
        name = run.config["run"]["name"]
        say(
            f"{name}: {len(self.data.train)} training samples of shape {self.data.shape}, "
            f"{self.settings.steps} iterations on {run.device()}"
        )
        say(str(self.size))
        self.tracker.start(run.path, run.config, name)
        exit_code = 1
        try:
            with stopping:
                done = fit(
                    state,
                    self.data,
                    self.settings,
                    seed=run.seed,
                    failure_folder=run.path,
                    on_log=self.log,
                    on_checkpoint=self.checkpoint,
                    on_evaluate=self.glance,
                    on_snapshot=self.snapshot,
                    should_stop=stopping.wanted,
                    augment=self.augment,
                )
                if not done:  # the signal may have come to another process
                    stopping.signal = state.processes.largest(stopping.signal)
                if done:
                    stopping.saved = True
                    if stopping.signal:  # it came with the last iteration
                        raise SystemExit(stopping.exit_code)
                    self.evaluate(state)
                    exit_code = 0
            self.became("finished" if done else "stopped")
        except BaseException:
            self.became("failed" if state.iteration < self.settings.steps else "not evaluated")
            raise
        finally:
            report = renew_report(run.path) if self.first else ""
            self.tracker.finish(stopping.exit_code if stopping.wanted() else exit_code)
        if not done:
            say(
                f"stopped at iteration {state.iteration} by {stopping.reason}; "
                "the same command goes on from there."
            )
            raise SystemExit(stopping.exit_code)
        say(f"took {time.monotonic() - self.began:.0f} s\n{report}")
        if self.tracker.describe():
            say(self.tracker.describe())

    def became(self, state: str) -> None:
        """Note how far the run is."""
        if self.first:
            self.run.set_state(state)

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
        self.save(state.iteration, contents, last=state.iteration >= self.settings.steps)

    def snapshot(self, state: State) -> None:
        """Keep the power averages; a full disk costs this snapshot and not the run."""
        averages = state.snapshot()
        if not self.first:
            return
        try:
            save_snapshot(self.run.snapshots, state.iteration, averages)
        except OSError as error:
            say(
                f"warning: snapshot at iteration {state.iteration} not written ({error}); "
                "averages will be put together without it."
            )

    def glance(self, state: State) -> None:
        """A point of the curve: likelihood of a part of the test set, samples; never fatal."""
        settings = self.likelihood.quick(128)
        try:
            self.score(state, settings, "likelihood of a part")
            self.draw(state)
        except SamplingError as error:  # an early model may be too rough for a solver
            say(f"warning: evaluation at iteration {state.iteration} left out ({error})")
        in_first(lambda: renew_report(self.run.path))  # within an iteration the others wait less

    def evaluate(self, state: State) -> None:
        """Likelihood of the whole test set and samples: the result of the run."""
        settings, run, model = self.likelihood, self.run, state.ema
        label = f"{state.iteration:08d}"
        made = first_alone(
            lambda: dequantizer(settings, self.data, model, run.path, label, seed=run.seed)
        )
        result = self.score(state, settings, "test likelihood", made)
        path, bounds = list_checkpoints(run.checkpoints)[-1], None
        if settings.bounds:
            learned = learned_variance(
                path, digest_of(path), model, self.data.shape, folder=run.fitted
            )
            more = {"dequantization": made, "learned": learned}
            bounds = estimate(model, self.data, settings, result, seed=run.seed, **more)
            show_estimates(bounds)
        if self.first:
            append_evaluation(
                run.path, result, state.iteration, model, self.data, settings, path.name, bounds
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
