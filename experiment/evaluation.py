"""The likelihood of a test set: one number, its standard error, and how it came about."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from experiment.class_marginal import class_words, joined, log_shares, marginal, seen_classes
from experiment.conditions import score_for, score_of_each
from experiment.data import Dataset
from experiment.progress import progress, say
from experiment.seeds import sample_streams
from experiment.settings import CONDS, UNITS, Likelihood, chosen, per_nat, units_of
from experiment.shards import gathered, halving, rank, share
from likelihood import (
    Dequantization,
    FixedGrid,
    LogLikelihood,
    Pilot,
    importance_weighted,
    log_likelihood,
)
from likelihood.dequantize import Drawn
from likelihood.importance import noise_bias
from score_models import ScoreModel
from sde_lib import PerSample, ProbabilityFlow, probability_flow
from sde_lib.samplers import SamplingError

LARGE = 0.7  # nats of probe noise, whose square halved is what an importance weight is lifted by
LONG = 600.0  # seconds that an evaluation may take before it says so


@dataclass(frozen=True)
class Evaluation:
    """The likelihood of a test set and its error budget, all in the unit of the metric.

    Attributes:
        metric: bits_per_dim, or nll in nats a sample and data units.
        value: Mean over the test set.
        standard_error: Of that mean: spread of the samples, in which probes and dequantization are
            contained.
        probe_error: The part of it that is Hutchinson noise; NaN with a single probe kept along
            the path, 0 with the exact trace.
        num_samples: Test samples.
        nfe: Forward passes a sample, on average, the pilot's left out.
        seconds: Wall time.
        per_sample: The metric of each sample, [N].
        passes: Backward passes a sample, on average.
        pilot_nfe: Forward passes of one sample that went into the pilot.
        dequantization_error: The part of ``standard_error`` that is dequantization and probes,
            from the spread of the draws; NaN for a single draw.
        effective_draws: Mean effective number of draws where they are weighed by importance.
        solver_error: Mean over samples of the size of the integration error, NaN with an adaptive
            solver; it does not average out.
        truncation: Mean change that going on from t_min to t = 0 would make, to first order; NaN
            where the dequantization itself starts later, and nothing is left out.
        prior_mismatch: Mean change that the score's own density at t_max would make in place of
            the prior.
        errors: Per sample [N]: probe_error, dequantization_error, effective_draws, solver_error,
            truncation, prior_mismatch.
        information: Clock u [M], increasing, and the information per unit of u [N, M] in the unit
            of the metric: what each sample's telling apart from finer noise costs; empty with an
            adaptive solver.
        posterior: log p(c | x) of each class, [N, C], of likelihood.cond=marginal; else [N, 0].
        class_accuracy: Share of samples whose class is the likeliest; NaN without a posterior.
        class_nats: Mean of -log p(c | x) at their classes.
        how: Solver and divergence that were used.
    """

    metric: str
    value: float
    standard_error: float
    probe_error: float
    num_samples: int
    nfe: float
    seconds: float
    per_sample: Tensor
    passes: float = math.nan
    pilot_nfe: int = 0
    dequantization_error: float = math.nan
    effective_draws: float = math.nan
    solver_error: float = math.nan
    truncation: float = math.nan
    prior_mismatch: float = math.nan
    errors: Mapping[str, Tensor] = field(default_factory=dict)
    information: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(1, 0))
    posterior: Tensor = torch.empty(1, 0)
    class_accuracy: float = math.nan
    class_nats: float = math.nan
    how: str = ""

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.standard_error:.4f} {UNITS[self.metric]}"

    def as_metrics(self) -> dict[str, float]:
        """Rows of the record."""
        return {
            f"eval/{self.metric}": self.value,
            f"eval/{self.metric}_stderr": self.standard_error,
            "eval/nfe": self.nfe,
        }

    def as_row(self) -> dict[str, Any]:
        """What of it goes into a JSON file: numbers, None for what is not known."""
        row = {
            part.name: getattr(self, part.name)
            for part in fields(self)
            if part.name not in ("per_sample", "errors", "information", "posterior")
        }
        clock, information = self.information
        row["information"] = [clock.tolist(), information.mean(0).tolist()]
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }


def evaluate(
    model: ScoreModel,
    data: Dataset,
    settings: Likelihood,
    *,
    seed: int,
    description: str = "likelihood",
    dequantization: Dequantization | None = None,
) -> Evaluation:
    """Likelihood of the test set under ``model``.

    Dequantization and probes of sample i depend on (seed, i) alone: not on batch size, order or
    the number of processes that share the work.

    Args:
        model: In evaluation mode.
        data: Its test part is used.
        settings: How.
        seed: Seed of all randomness.
        description: In front of the progress bar.
        dequantization: Of K-level data; that of the settings if not given, but a variational one,
            which has to be fitted first, must be.

    Raises:
        ValueError: For settings that are not for such data, see :meth:`Likelihood.check`.
        SamplingError: If samples are not finite; all others are done first, and its ``partial`` is
            their values, NaN for those that failed.
    """
    began = time.monotonic()
    settings.check(data)
    device = next(model.parameters()).device
    count = min(settings.max_samples or len(data.test), len(data.test))
    shares = log_shares(data) if settings.cond == "marginal" else None
    if shares is None:
        flow = probability_flow(model.sde, score_for(model, data, "test", count, settings.cond))
    else:
        flow = probability_flow(model.sde, score_of_each(model, data))
    draws = settings.draws if data.levels is not None else 1
    units = units_of(data, settings, dequantization)
    flow = replace(flow, t_start=units.start_time(model.sde))
    solver, divergence, planned = chosen(flow, data, settings, device)

    def solve_batch(
        x: Tensor, indices: range, streams: PerSample
    ) -> tuple[LogLikelihood, Tensor | None]:
        how = {"solver": solver, "divergence": divergence}
        if shares is None:
            own = flow.for_rows(torch.tensor(indices, device=device) // draws)
            return log_likelihood(own, x, generator=streams, **how), None

        def under(own: ProbabilityFlow) -> LogLikelihood:
            same = sample_streams(seed, "probes of classes", indices, device)  # for all of them
            return log_likelihood(own, x, generator=same, **how)

        return marginal(flow, shares, under)

    def solve(rows: range) -> dict[str, Any]:
        values = data.test[rows.start : rows.stop].repeat_interleave(draws, 0)
        indices = range(rows.start * draws, rows.stop * draws)
        streams = sample_streams(seed, "likelihood", indices, device)
        drawn = units.draw(values.to(device), streams, sde=model.sde)
        posterior, failure = None, None
        try:
            result, posterior = solve_batch(drawn.x, indices, streams)
        except SamplingError as error:  # of one class alone nothing follows
            result, failure = error.partial if shares is None else None, str(error)
        if result is None:
            return _lost(len(rows), failure)
        row = _row(result, drawn, data, draws, settings.importance)
        if flow.t_start is not None:
            row["truncation"] = torch.full_like(row["truncation"], math.nan)
        return row | {"failure": failure, "posterior": posterior}

    own = share(count)
    starts = range(own.start, own.stop, settings.batch_size)
    parts: list[dict[str, Any]] = []
    for start in progress(starts, description):
        parts += halving(solve, range(start, min(start + settings.batch_size, own.stop)))
        if start == own.start and rank() == 0:
            foretell(description, (time.monotonic() - began) * (len(starts) - 1), count)
    rows = gathered(parts)
    if isinstance(solver, FixedGrid):  # in the basis that the pilot chose
        like = torch.empty(1, *data.shape, device=device)
        divergence = Pilot.of(flow, like, divergence).divergence
    how = f"{solver}, {divergence}; {units if data.levels else 'continuous'}, {draws} draw(s)"
    how += ", weighed by importance" if settings.importance else ""
    how += f"; {CONDS[settings.cond]}" if data.cond is not None else ""
    seconds = time.monotonic() - began
    result = _summary(rows, data.units.metric, how, seconds, settings.importance)
    result = replace(result, pilot_nfe=result.pilot_nfe + planned)
    if shares is not None:
        sizes = [len(row["per_sample"]) for row in rows]
        posterior = joined([row["posterior"] for row in rows], sizes, data.cond.count, draws)
        accuracy, nats = seen_classes(posterior, data.test_cond[:count])
        result = replace(result, posterior=posterior, class_accuracy=accuracy, class_nats=nats)
    failed = [row["failure"] for row in rows if row["failure"] is not None]
    if failed:
        error = SamplingError(failed[0])
        error.partial = result.per_sample
        raise error
    return result


def foretell(description: str, seconds: float, count: int) -> None:
    """Say after the first batch what would otherwise be found out after hours."""
    if seconds > LONG:
        say(
            f"{description} of {count} samples: about {seconds / 60:.0f} minutes from here; "
            "likelihood.max_samples=N takes the first N"
        )


def _row(
    result: LogLikelihood,
    drawn: Drawn,
    data: Dataset,
    draws: int,
    importance: bool,
) -> dict[str, Any]:
    """One batch in the unit of the metric, the draws of a sample put together, on the CPU."""
    unit = per_nat(data)

    def by_sample(values: Tensor) -> Tensor:
        return values.cpu().double().reshape(-1, draws)

    nats = by_sample(drawn.bound(result.log_prob.double()))
    nats = nats.masked_fill(~torch.isfinite(nats), math.nan)
    probes = by_sample(result.standard_error)
    spread = nats.std(1) if draws > 1 else torch.full((len(nats),), math.nan).double()
    value, spread = nats.mean(1), spread / draws**0.5
    share = torch.full((len(nats), draws), 1 / draws, dtype=torch.float64)
    effective = torch.full((len(nats),), float(draws), dtype=torch.float64)
    if importance:
        good = (nats + probes).isfinite().all(1)
        value[~good] = math.nan
        if bool(good.any()):
            weighted = importance_weighted(nats[good].T)
            # noise in the exponent lifts the mean of exponentials: what the probes add is off
            value[good] = weighted.log_prob - noise_bias(probes[good].T, nats[good].T)
            spread[good], effective[good] = weighted.standard_error, weighted.effective_sample_size
            share = nats.softmax(1)
    return {
        "per_sample": -value * unit,
        "probe_error": (share * probes).square().sum(1).sqrt() * unit,
        "dequantization_error": spread * unit,
        "effective_draws": effective,
        "solver_error": by_sample(result.solver_error).mean(1) * unit,
        "truncation": -by_sample(result.truncation).mean(1) * unit,
        "prior_mismatch": -by_sample(result.prior_mismatch).mean(1) * unit,
        "nfe": result.nfe * draws,
        "passes": result.passes * draws,
        "pilot_nfe": result.pilot_nfe,
        "clock": result.clock.cpu(),
        "information": result.information().T.cpu().double() * unit,
    }


def _lost(count: int, failure: str) -> dict[str, Any]:
    """A batch of ``count`` samples of which a solver said nothing before it gave up."""
    unknown = torch.full((count,), math.nan, dtype=torch.float64)
    nothing = {"nfe": 0, "passes": 0, "pilot_nfe": 0, "clock": torch.empty(0)}
    empty = {"information": torch.empty(count, 0), "failure": failure, "posterior": None}
    return {name: unknown for name in COLUMNS} | nothing | empty


def _summary(
    rows: Sequence[Mapping[str, Any]], metric: str, how: str, seconds: float, importance: bool
) -> Evaluation:
    """All batches put together."""
    columns = {name: torch.cat([row[name] for row in rows]) for name in COLUMNS}
    sizes = [len(row["per_sample"]) for row in rows]
    count = sum(sizes)
    per_sample = columns.pop("per_sample")

    def over_samples(name: str) -> Any:  # noqa: ANN401
        return sum(size * row[name] for size, row in zip(sizes, rows, strict=True)) / count

    def together(name: str) -> float:
        return float(columns[name].square().sum().sqrt() / count)

    return Evaluation(
        metric=metric,
        value=float(per_sample.mean()),
        standard_error=float(per_sample.std() / count**0.5),
        probe_error=together("probe_error"),
        num_samples=count,
        nfe=float(over_samples("nfe")),
        seconds=seconds,
        per_sample=per_sample,
        passes=float(over_samples("passes")),
        pilot_nfe=sum(row["pilot_nfe"] for row in rows),
        dequantization_error=together("dequantization_error"),
        effective_draws=float(columns["effective_draws"].mean()) if importance else math.nan,
        solver_error=float(columns["solver_error"].mean()),
        truncation=float(columns["truncation"].mean()),
        prior_mismatch=float(columns["prior_mismatch"].mean()),
        errors=columns,
        information=(rows[0]["clock"], torch.cat([_by_draws(row) for row in rows])),
        how=how,
    )


def _by_draws(row: Mapping[str, Any]) -> Tensor:
    """Information of each sample [n, M], its draws averaged."""
    information = row["information"]
    count = len(row["per_sample"])
    return information.unflatten(0, (count, len(information) // count)).mean(1)


COLUMNS = (
    "per_sample",
    "probe_error",
    "dequantization_error",
    "effective_draws",
    "solver_error",
    "truncation",
    "prior_mismatch",
)


def show(result: Evaluation, data: Dataset, what: str) -> None:
    """Print one evaluation with its error bar and what it cost."""
    say(
        f"{what}: {result}  ({result.num_samples} samples, {result.nfe:.0f} forward and "
        f"{result.passes:.0f} backward passes each, {result.seconds:.0f} s)"
    )
    parts = {
        "probes": result.probe_error,
        "dequantization": result.dequantization_error,
        "solver": result.solver_error,
    }
    known = [f"{name} {value:.2g}" for name, value in parts.items() if math.isfinite(value)]
    others = {
        "t_min to 0 would change it by": result.truncation,
        "the score's own density at t_max by": result.prior_mismatch,
    }
    left = [f"{name} {value:+.2g}" for name, value in others.items() if math.isfinite(value)]
    if known or left:
        say(f"    of its error: {', '.join(known) or 'unknown'}; {', '.join(left)}")
    if math.isfinite(result.class_accuracy):
        say(f"    {class_words(result.class_accuracy, result.class_nats, result.num_samples)}")
    if math.isfinite(result.effective_draws):
        say(f"    of the draws {result.effective_draws:.2f} have the weight")
    noise = result.errors.get("probe_error", torch.zeros(1)).median() / per_nat(data)
    if math.isfinite(result.effective_draws) and float(noise) > LARGE:
        say(
            f"    warning: probes of {float(noise):.2g} nats a sample are too noisy for "
            "importance weights: no bound; take likelihood=exact, or likelihood.budget"
        )
    if data.entropy is not None:
        say(
            f"    entropy of the source {data.entropy:.4f} nats: "
            f"{result.value - data.entropy:+.4f} ± {result.standard_error:.4f} above it"
        )
