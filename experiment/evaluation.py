"""The likelihood of a test set: one number, its standard error, and how it came about."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from experiment.class_marginal import class_words, joined, seen_classes
from experiment.data import Dataset
from experiment.progress import progress, say
from experiment.scoring import COLUMNS, Scoring
from experiment.settings import UNITS, Likelihood, per_nat
from experiment.shards import gathered, halving, rank, share
from likelihood import Dequantization
from score_models import ScoreModel
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
    scoring = Scoring.of(model, data, settings, seed, dequantization)
    rows = in_batches(scoring.row, settings.count(data), settings.batch_size, description)
    result = _summary(rows, scoring, time.monotonic() - began)
    failed = [row["failure"] for row in rows if row["failure"] is not None]
    if failed:
        error = SamplingError(failed[0])
        error.partial = result.per_sample
        raise error
    return result


def in_batches(
    solve: Callable[[range], dict[str, Any]], count: int, size: int, description: str
) -> list[dict[str, Any]]:
    """What ``solve`` finds of each batch of ``count`` samples, of all processes in their order.

    A batch that does not fit into memory is solved in halves; what will take long is said.

    Args:
        solve: Of these samples.
        count: Samples of all processes.
        size: Of a batch.
        description: In front of the progress bar.
    """
    began, own = time.monotonic(), share(count)
    starts = range(own.start, own.stop, size)
    parts: list[dict[str, Any]] = []
    for start in progress(starts, description):
        parts += halving(solve, range(start, min(start + size, own.stop)))
        if start == own.start and rank() == 0:
            _foretell(description, (time.monotonic() - began) * (len(starts) - 1), count)
    return gathered(parts)


def _foretell(description: str, seconds: float, count: int) -> None:
    """Say after the first batch what would otherwise be found out after hours."""
    if seconds > LONG:
        say(
            f"{description} of {count} samples: about {seconds / 60:.0f} minutes from here; "
            "likelihood.max_samples=N takes the first N"
        )


def _summary(rows: Sequence[Mapping[str, Any]], scoring: Scoring, seconds: float) -> Evaluation:
    """All batches put together."""
    columns = {name: torch.cat([row[name] for row in rows]) for name in COLUMNS}
    sizes = [len(row["per_sample"]) for row in rows]
    count = sum(sizes)
    per_sample, importance = columns.pop("per_sample"), scoring.settings.importance

    def over_samples(name: str) -> Any:  # noqa: ANN401
        return sum(size * row[name] for size, row in zip(sizes, rows, strict=True)) / count

    def together(name: str) -> float:
        return float(columns[name].square().sum().sqrt() / count)

    return Evaluation(
        metric=scoring.data.units.metric,
        value=float(per_sample.mean()),
        standard_error=float(per_sample.std() / count**0.5),
        probe_error=together("probe_error"),
        num_samples=count,
        nfe=float(over_samples("nfe")),
        seconds=seconds,
        per_sample=per_sample,
        passes=float(over_samples("passes")),
        pilot_nfe=sum(row["pilot_nfe"] for row in rows) + scoring.planned,
        dequantization_error=together("dequantization_error"),
        effective_draws=float(columns["effective_draws"].mean()) if importance else math.nan,
        solver_error=float(columns["solver_error"].mean()),
        truncation=float(columns["truncation"].mean()),
        prior_mismatch=float(columns["prior_mismatch"].mean()),
        errors=columns,
        information=(rows[0]["clock"], torch.cat([_by_draws(row) for row in rows])),
        how=scoring.how(),
        **_classes(rows, sizes, scoring),
    )


def _classes(
    rows: Sequence[Mapping[str, Any]], sizes: Sequence[int], scoring: Scoring
) -> dict[str, Any]:
    """What the marginal says of the classes of the samples; nothing where there is none."""
    if scoring.shares is None:
        return {}
    posteriors = [row["posterior"] for row in rows]
    posterior = joined(posteriors, sizes, len(scoring.shares), scoring.draws)
    accuracy, nats = seen_classes(posterior, scoring.data.test_cond[: len(posterior)])
    return {"posterior": posterior, "class_accuracy": accuracy, "class_nats": nats}


def _by_draws(row: Mapping[str, Any]) -> Tensor:
    """Information of each sample [n, M], its draws averaged."""
    information = row["information"]
    count = len(row["per_sample"])
    return information.unflatten(0, (count, len(information) // count)).mean(1)


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
