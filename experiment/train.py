"""mode=train: train, evaluate, draw; or go on where an earlier run stopped."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from experiment.checkpoint import list_checkpoints, load_newest, load_weights, save_checkpoint
from experiment.data import Dataset
from experiment.evaluation import Likelihood, append_evaluation, evaluate
from experiment.likelihood import show
from experiment.record import Record
from experiment.report import write_report
from experiment.run import Run
from experiment.sample import draw_and_save
from experiment.trackers import Safe, Tracker
from experiment.training import State, Training, fit
from sde_lib.samplers import Sampler


def train(run: Run, *, quick_samples: int = 64) -> None:
    """Train the configured model, evaluate its average on the test set, and write the report.

    A run that exists already goes on from its newest checkpoint; if it is finished, this says so.

    Args:
        run: The composed configuration.
        quick_samples: Samples of the grid drawn at each evaluation.
    """
    settings: Training = run.build("training")
    likelihood: Likelihood = run.build("likelihood")
    sampler: Sampler = run.build("sampler")
    data: Dataset = run.build("data")
    run = run.measured(data)
    objective = run.build("objective")
    model = _seeded(run)
    sampler.check(model.sde)
    state = State.fresh(model, settings)
    tracker = Safe(run.build("tracking"))
    if run.config["run"]["fresh"]:
        run.set_aside()
    with run.owned():
        run.write_config()
        resumed = _resume(run, state)
        if resumed and state.iteration >= settings.steps:
            print(
                f"already finished: {run.path} has {state.iteration} iterations. "
                "`mode=likelihood` and `mode=sample` use it; training.steps=N goes on; "
                "run.fresh=true starts over."
            )
            return
        _Trainer(run, settings, likelihood, sampler, data, tracker, quick_samples).go(
            state, objective
        )


def _seeded(run: Run):  # noqa: ANN202
    """The model with weights that depend on the seed alone."""
    torch.manual_seed(run.seed)
    return run.build_model().to(run.device())


def _resume(run: Run, state: State) -> bool:
    """Load the newest whole checkpoint into ``state``; False if there is none."""
    newest = load_newest(run.checkpoints) if list_checkpoints(run.checkpoints) else None
    if newest is None:
        return False
    path, stored = newest
    load_weights(state.ema, stored.get("ema"), path)  # names every difference
    state.load(stored)
    print(f"going on from {path}, iteration {state.iteration}", flush=True)
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

    def go(self, state: State, objective: Callable[..., Any]) -> None:
        """Train from ``state`` to the end, evaluate, report, and say where to look."""
        run = self.run
        self.record.cut(state.iteration)
        name = run.config["run"]["name"]
        weights = sum(p.numel() for p in state.model.parameters())
        print(
            f"{name}: {len(self.data.train)} training samples of shape "
            f"{self.data.shape}, {weights:,} weights, "
            f"{self.settings.steps} iterations on {run.device()}",
            flush=True,
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
                    on_evaluate=self.evaluate,
                    should_stop=lambda: self.stop_signal != 0,
                )
            if done:
                self.evaluate(state, final=True)
                exit_code = 0
            run.set_state("finished" if done else "stopped")
        except BaseException:
            run.set_state("failed")
            raise
        finally:
            report = write_report(run.path)
            self.tracker.finish(exit_code if not self.stop_signal else 128 + self.stop_signal)
        if not done:
            print(
                f"stopped at iteration {state.iteration}; the same command goes on from there.",
                flush=True,
            )
            raise SystemExit(128 + self.stop_signal)
        print(f"took {time.monotonic() - self.began:.0f} s\nreport: {report}")
        if self.tracker.describe():
            print(self.tracker.describe())

    def log(self, values: dict[str, float], iteration: int) -> None:
        """Metrics to the record and to the tracker."""
        self.record.log(values, iteration)
        self.tracker.log(values, iteration)
        if (
            "train/loss" in values
            and iteration % max(1, self.settings.steps // 10) < self.settings.log_every
        ):
            print(
                f"iteration {iteration}: loss {values['train/loss']:.4f}, "
                f"{values['perf/images_per_s']:.0f} samples/s, "
                f"{time.monotonic() - self.began:.0f} s",
                flush=True,
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
            print(
                f"warning: checkpoint at iteration {state.iteration} not written "
                f"({error}); the one before it stays.",
                flush=True,
            )

    def evaluate(self, state: State, final: bool = False) -> None:
        """Likelihood, sample grid and strip of the averaged model; the whole test set at the
        end.
        """
        settings = self.likelihood if final else self._quick()
        result = evaluate(
            state.ema,
            self.data,
            settings,
            seed=self.run.seed,
            description="test likelihood" if final else "likelihood of a part",
        )
        self.log(result.as_metrics(), state.iteration)
        show(
            result,
            self.data,
            f"iteration {state.iteration}: test" + ("" if final else f" ({result.num_samples})"),
        )
        if final:
            append_evaluation(
                self.run.path,
                result,
                state.iteration,
                state.ema,
                self.data,
                settings,
                list_checkpoints(self.run.checkpoints)[-1].name,
            )
        picture = draw_and_save(
            self.run, state.ema, self.sampler, self.data, state.iteration, self.quick_samples
        )
        if picture is not None:
            self.tracker.image("samples/grid", picture, state.iteration)
        write_report(self.run.path)

    def _quick(self) -> Likelihood:
        """A cheaper evaluation for the curve: a part of the test set, one probe, a loose
        solver.
        """
        from dataclasses import replace

        count = min(128, self.likelihood.max_samples or 128, len(self.data.test))
        return replace(
            self.likelihood,
            max_samples=count,
            draws=1,
            rtol=max(1e-3, self.likelihood.rtol),
            atol=max(1e-3, self.likelihood.atol),
        )


class _Signals:
    """SIGTERM, SIGINT and SIGUSR1 finish the step, save and stop; a second one stops at once."""

    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self.handle) for number in self.caught}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.trainer.stop_signal:
            raise KeyboardInterrupt
        self.trainer.stop_signal = number
