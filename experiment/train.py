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

from experiment.checkpoint import (
    Saver,
    check_weights,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    restoring,
    stored_config,
)
from experiment.choices import Choices
from experiment.dequantizer import dequantizer
from experiment.errors import RunError
from experiment.estimators import estimate, show_estimates
from experiment.evaluation import Evaluation, evaluate, show
from experiment.fitted import digest_of
from experiment.hints import tell_slow_precision
from experiment.ledger import append_evaluation, evaluated
from experiment.progress import say
from experiment.record import Record
from experiment.report import renew_report
from experiment.run import Run
from experiment.sample import draw_and_save
from experiment.settings import Likelihood
from experiment.shards import first_alone, from_first, in_first, rank
from experiment.snapshots import cut_snapshots, save_snapshot
from experiment.speed import keep_freed_memory
from experiment.state import State
from experiment.stopping import REQUEUE, Stopping
from experiment.trackers import Tracker
from experiment.trackers.first_process import in_first_process
from experiment.training import Training, fit
from experiment.variance_heads import learned_variance
from likelihood import Dequantization
from sde_lib.samplers import SamplingError


def train(run: Run, *, quick_samples: int = 64, requeue_code: int = REQUEUE) -> None:
    """Train the configured model, evaluate its average on the test set, and write the report.

    A run that exists already goes on from its newest checkpoint; if it is finished, this says so.

    Args:
        run: The composed configuration.
        quick_samples: Samples of the grid drawn at each evaluation.
        requeue_code: Exit code after SIGUSR1, by which a scheduler knows that it goes on.
    """
    settings: Training = run.build("training")
    stopping = Stopping(settings.max_seconds, requeue_code)  # the time counts from here
    tracker = in_first_process(lambda: run.build("tracking"))
    choices = Choices.of(run, settings)
    run = choices.run
    if run.device().type == "cpu":
        keep_freed_memory()
    size = choices.size  # asked of weights that no process has taken apart yet
    choices.processes.join()
    with ExitStack() as held:
        in_first(lambda: _own(run, held))
        state = choices.state()
        planned = _resume(run, state, settings)
        whole = choices.likelihood.count(choices.data)
        scored = in_first(lambda: evaluated(run.path, state.iteration, whole))
        if from_first(planned is not None and state.iteration >= settings.steps and scored):
            say(
                f"already finished: {run.path} has {state.iteration} iterations. "
                "`mode=likelihood` and `mode=sample` use it; training.steps=N, larger than that, "
                "goes on; run.fresh=true starts over."
            )
            return
        in_first(run.write_config)
        if planned is not None:
            _tell_schedule(state.iteration, settings, planned)
        _Trainer(choices, tracker, quick_samples).go(state, stopping, str(size))


def _own(run: Run, held: ExitStack) -> None:
    """Take the directory of ``run`` while ``held`` lasts, if it may go on there."""
    if run.fresh:
        run.set_aside()
    held.enter_context(run.owned())
    run.check_config()


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


def _resume(run: Run, state: State, settings: Training) -> int | None:
    """Load the newest whole checkpoint into ``state``.

    Returns:
        For how many iterations it was trained; None if there is none.
    """
    newest = _newest(run)
    if newest is None:
        return None
    path, stored = newest
    check_weights(state.model, stored.get("ema"), path)  # names every difference
    with restoring(path):
        state.load(stored)
    if state.iteration < settings.steps:
        say(f"going on from {path}, iteration {state.iteration}")
    return int(stored_config(path, stored).get("training", {}).get("steps", settings.steps))


def _tell_schedule(iteration: int, settings: Training, planned: int) -> None:
    """Say what another number of iterations does to the learning rate of those to come."""
    if not settings.decay or planned == settings.steps or iteration >= settings.steps:
        return
    before = replace(settings, steps=planned).lr_at(max(0, iteration - 1))
    say(
        f"the schedule is now laid over {settings.steps} iterations and not over {planned}: "
        f"the learning rate was {before:.3g} and goes on at {settings.lr_at(iteration):.3g}"
    )


class _Trainer:
    """The callbacks of one training run: record, tracker, checkpoints, evaluations, report."""

    def __init__(self, choices: Choices, tracker: Tracker, quick_samples: int) -> None:
        self.run, self.settings, self.data = choices.run, choices.settings, choices.data
        self.choices, self.tracker, self.quick_samples = choices, tracker, quick_samples
        self.record = Record(self.run.path)
        self.config_text = json.dumps(self.run.config)
        self.began = time.monotonic()
        self.save = Saver(self.run.checkpoints)
        self.first = rank() == 0
        self.scored = False

    def go(self, state: State, stopping: Stopping, size: str) -> None:
        """Train from ``state`` to the end, evaluate, report, and say where to look; ``size`` is
        said before."""
        run = self.run
        if self.first:
            self.record.cut(state.iteration)
            cut_snapshots(run.snapshots, state.iteration)
        name = run.config["run"]["name"]
        say(
            f"{name}: {len(self.data.train)} training samples of shape {self.data.shape}, "
            f"{self.settings.steps} iterations on {run.device()}"
        )
        say(size)
        run.warn()
        tell_slow_precision(self.choices.speed.precision, run.device())
        self.tracker.start(run.path, run.config, name)
        exit_code = 1
        try:
            with stopping:
                done = self.fit(state, stopping)
                if done:
                    stopping.saved = True
                    if stopping.signal:  # it came with the last iteration
                        raise SystemExit(stopping.exit_code)
                    self.evaluate(state)
                    exit_code = 0
            self.became("finished" if done else "stopped")
        except BaseException as error:
            over = "finished" if self.scored else "not evaluated"
            self.became("failed" if state.iteration < self.settings.steps else over)
            if isinstance(error, SystemExit):
                kept = f"stopped by {stopping.reason}; the likelihood is kept, mode=sample draws."
                say(kept if self.scored else stopping.farewell)
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

    def fit(self, state: State, stopping: Stopping) -> bool:
        """All iterations that are left; False if something stopped them."""
        done = fit(
            state,
            self.data,
            self.settings,
            seed=self.run.seed,
            failure_folder=self.run.path,
            on_log=self.log,
            on_checkpoint=self.checkpoint,
            on_evaluate=self.glance,
            on_snapshot=self.snapshot,
            should_stop=stopping.wanted,
            augment=self.choices.augment,
        )
        if not done:  # the signal may have come to another process
            stopping.signal = state.processes.largest(stopping.signal)
        return done

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
        settings = self.choices.likelihood.quick(128)
        try:
            self.score(state, settings, "likelihood of a part")
            self.draw(state)
        except SamplingError as error:  # an early model may be too rough for a solver
            say(f"warning: evaluation at iteration {state.iteration} left out ({error})")
        in_first(lambda: renew_report(self.run.path))  # within an iteration the others wait less

    def evaluate(self, state: State) -> None:
        """Likelihood of the whole test set and samples: the result of the run."""
        settings, run, model = self.choices.likelihood, self.run, state.ema
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
            more = {"bounds": bounds, "caveat": run.caveat}
            append_evaluation(
                run.path, result, state.iteration, model, self.data, settings, path.name, **more
            )
        self.scored = True
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
            self.run, model, self.choices.sampler, self.data, state.iteration, self.quick_samples
        )
        if picture is not None:
            self.tracker.image("samples/grid", picture, state.iteration)
