"""mode=train_variance: a second head on a frozen model, for the variance of a reverse step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiment.batches import Batches, trained_units
from experiment.calibrate import calibrated
from experiment.conditions import score_of_rows
from experiment.data import Dataset
from experiment.estimators import bound_times
from experiment.fitted import digest_of, kept_variance
from experiment.measured import as_trained
from experiment.progress import progress, say
from experiment.run import Run
from experiment.seeds import sample_streams, stream
from experiment.settings import UNITS, per_nat
from experiment.shards import alone
from experiment.variance_heads import (
    HeadSettings,
    StoredHead,
    head_path,
    keep_head,
    new_head,
    read_head,
    undamaged,
    unfinished_path,
    variance_of_head,
)
from likelihood import discrete_bounds
from score_models import ScoreModel
from score_models.variance_head import VarianceHead
from score_models.variance_kinds import head_loss
from sde_lib import probability_flow, validation
from sde_lib.reverse_variance import AnalyticVariance, ReverseVariance

WRITE_EVERY = 250  # iterations that a kill may cost
WARMUP = 50
STEP_COUNTS = (10, 25, 50, 100)


def train_variance(
    run: Run,
    *,
    kind: str = "npr",
    steps: int = 1500,
    batch_size: int = 128,
    lr: float = 2e-3,
    width: int = 32,
    blocks: int = 2,
    grid_steps: int | None = None,
    num_test: int = 256,
    fresh: bool = False,
) -> None:
    """Train a variance head on the newest checkpoint, or on ``checkpoint=PATH``, and say what it
    gains in the bound of held-out data.

    Kept in ``fitted/`` of the run by the digest of the weights, where ``sampler=npr_ddpm`` and
    its like find it. The same command goes on with a training that was cut short, and does
    nothing where it is finished.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
        kind: npr, sn or learned.
        steps: See :class:`HeadSettings`, as for the next five.
        batch_size: At most the size of the training set.
        lr: Learning rate.
        width: Channels.
        blocks: Residual blocks.
        grid_steps: Of kind=learned.
        num_test: Test samples that the gain is measured on.
        fresh: Whether to train anew, from the start; one that is there is kept until then.
    """
    alone("train_variance")
    settings = HeadSettings(kind, steps, batch_size, lr, width, blocks, grid_steps)
    num_test = validation.count("mode=train_variance", "num_test", num_test, at_least=2)
    validation.flag("mode=train_variance", "fresh", fresh)
    data: Dataset = run.build("data")
    Batches(len(data.train), settings.batch_size, run.seed)  # refuses a batch that is too large
    run, model, checkpoint, _ = run.trained()
    data = as_trained(data, run.config)
    weights, folder = digest_of(checkpoint), run.fitted
    path, half_way = (at(kind, weights, folder) for at in (head_path, unfinished_path))
    there = None if fresh else read_head(path, kind, weights)
    if there is not None and there.finished:
        other = there.differences(settings, run.seed)
        trained = f", trained with {other}" if other else ""
        say(f"already there: {path}{trained}; mode.fresh=true trains it anew.")
        say("\n".join(there.gains))
        return
    analytic = _analytic(run, model, data, checkpoint, folder)
    training = _Training(run, model, data, settings, analytic, half_way, weights)
    head = training.fit(None if fresh else read_head(half_way, kind, weights))
    variance = variance_of_head(model, head, settings, analytic)
    lines = gains(run, model, data, {"analytic": analytic, kind: variance}, num_test)
    more = {"finished": True, "seed": run.seed, "gains": lines}
    keep_head(path, weights, settings, analytic, head, **more)
    half_way.unlink(missing_ok=True)
    say("\n".join(lines))
    say(f"{kind} variance of {checkpoint.name}: {path}")


def _analytic(
    run: Run, model: ScoreModel, data: Dataset, checkpoint: Path, folder: Path
) -> AnalyticVariance:
    """The isotropic variance that mode=calibrate has stored, or else measured and stored now."""
    kept = kept_variance(checkpoint, folder)
    if kept is not None:
        return kept
    say("measuring the analytic variance, from which a head starts")
    calibrated(run, model, data, checkpoint)
    return kept_variance(checkpoint, folder)  # from the file, so that both ways give the same


@dataclass(frozen=True)
class _Training:
    """One training of a head: a function of (seed, iteration), so that it can be cut anywhere."""

    run: Run
    model: ScoreModel
    data: Dataset
    settings: HeadSettings
    analytic: AnalyticVariance
    path: Path
    weights: str

    def fit(self, begun: StoredHead | None) -> VarianceHead:
        """The head after all iterations, from where an earlier one of the same choices stopped.

        It is written every 250 iterations.
        """
        torch.manual_seed(self.run.seed)
        head = new_head(self.model, self.data.shape, self.settings)
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.settings.lr, weight_decay=0.0)
        first = self._resume(begun, head, optimizer)
        batches = Batches(len(self.data.train), self.settings.batch_size, self.run.seed)
        lost = []
        for iteration in progress(range(first, self.settings.steps), "variance head"):
            lost.append(self._iteration(head, optimizer, batches(iteration), iteration))
            done = iteration + 1
            if done % max(1, self.settings.steps // 10) == 0:
                say(f"iteration {done}: loss {torch.stack(lost).mean():.4f}")
                lost = []
            if done % WRITE_EVERY == 0:
                self._write(head, optimizer, done)
        return head

    def _iteration(
        self, head: VarianceHead, optimizer: torch.optim.Optimizer, rows: Tensor, iteration: int
    ) -> Tensor:
        """One update on the samples ``rows``; the loss, on the device."""
        settings = self.settings
        generator = stream(self.run.seed, f"variance {settings.kind}", iteration)
        units = trained_units(self.run.config["training"], self.data)
        x0 = units.encode(self.data.train[rows], generator).to(self.run.device())
        cond = None if self.data.cond is None else self.data.train_cond[rows].to(x0.device)
        kind = settings.meaning(self.analytic)
        loss = head_loss(kind, self.model, head, x0, generator, cond)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(head.parameters()), 1.0)
        falling = 0.5 * (1 + math.cos(math.pi * iteration / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (iteration + 1) / WARMUP) * falling
        optimizer.step()
        return loss.detach()

    def _write(self, head: VarianceHead, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        more = {"finished": False, "seed": self.run.seed, "iteration": iteration}
        more["optimizer"] = optimizer.state_dict()
        keep_head(self.path, self.weights, self.settings, self.analytic, head, **more)

    def _resume(
        self, begun: StoredHead | None, head: VarianceHead, optimizer: torch.optim.Optimizer
    ) -> int:
        """The iteration to go on from; other choices, another analytic variance: from 0."""
        if begun is None:
            return 0
        other = begun.differences(self.settings, self.run.seed)
        if not begun.starts_from(self.analytic):
            other = ", ".join(filter(None, [other, "another analytic variance"]))
        if other:
            say(f"{self.path} was begun with other choices ({other}); from the start")
            return 0
        with undamaged(self.path, self.settings.kind):
            head.load_state_dict(begun.head.state_dict())
            optimizer.load_state_dict(begun.optimizer)
        say(f"going on from iteration {begun.iteration} of {self.path}")
        return begun.iteration


@torch.no_grad()
def gains(
    run: Run,
    model: ScoreModel,
    data: Dataset,
    variances: Mapping[str, ReverseVariance],
    num_test: int,
) -> list[str]:
    """What the steps of a model cost on test data under DDPM's two variances and ``variances``,
    as lines: the sum of their KL terms, with standard errors; the last against ``analytic``."""
    metric = per_nat(data)
    values = data.test[:num_test]
    units = trained_units(run.config["training"], data)
    x = units.encode(values, stream(run.seed, "variance test", 0)).to(run.device())
    flow = probability_flow(model.sde, score_of_rows(model, data, "test", len(x)))
    reverse = {"posterior": "posterior", "forward": "forward", **variances}
    lines = [f"cost of the steps, {UNITS[data.units.metric]}, of {len(x)} test samples:"]
    for steps in STEP_COUNTS:
        times, found = bound_times(flow, data, steps), {name: [] for name in reverse}
        for start in range(0, len(x), 128):
            rows = range(start, min(start + 128, len(x)))
            some, own = x[start : start + 128], flow.for_rows(rows)
            streams = sample_streams(run.seed, f"variance vlb {steps}", rows, x.device)
            bounds = discrete_bounds(own, some, reverse, times=times, generator=streams)
            for name, bound in bounds.items():
                found[name].append(bound.terms[1:-1].sum(0).cpu() * metric)
        costs = {name: torch.cat(parts) for name, parts in found.items()}
        lines.append(f"  K = {steps:<4}" + "  ".join(f"{n} {_mean(c)}" for n, c in costs.items()))
        last = list(costs)[-1]
        lines[-1] += f"  {last} less analytic {_mean(costs[last] - costs['analytic'])}"
    return lines


def _mean(values: Tensor) -> str:
    return f"{float(values.mean()):.4f} ± {float(values.std()) / len(values) ** 0.5:.4f}"
