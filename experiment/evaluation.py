"""The likelihood of a test set: one number, its standard error, and how it came about."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.checkpoint import write_atomically
from experiment.data import Dataset
from experiment.progress import progress, say
from experiment.seeds import sample_streams
from experiment.shards import gathered, halving, share
from likelihood import (
    Basis,
    Cosine,
    Divergence,
    FixedGrid,
    LogLikelihood,
    Pixel,
    Principal,
    Solver,
    log_likelihood,
    plan,
    suited,
)
from score_models import ScoreModel
from sde_lib import ProbabilityFlow, probability_flow, validation
from sde_lib.samplers import SamplingError

UNITS = {"bits_per_dim": "bits/dim", "nll": "nats"}


@dataclass(frozen=True)
class Likelihood:
    """How to evaluate a likelihood.

    Args:
        solver: :class:`likelihood.FixedGrid` or :class:`likelihood.Adaptive`; 64 fixed nodes if
            not given.
        divergence: Exact or Hutchinson; chosen by the number of dimensions if not given.
        basis: Where probes are drawn: auto (pixels or cosines, by a pilot), pixel, cosine, or
            principal (axes of the training data).
        budget: Wanted standard error of one sample by its probes, in the metric's unit; nodes and
            probes are then chosen, and those of ``solver`` and ``divergence`` are not used.
        batch_size: Samples solved together; halved where memory runs out.
        draws: Dequantizations of each sample that are averaged; continuous data need one.
        max_samples: Evaluate only so many of the test set; all if null.
    """

    solver: Solver | None = None
    divergence: Divergence | None = None
    basis: str = "auto"
    budget: float | None = None
    batch_size: int = 128
    draws: int = 1
    max_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "draws"):
            object.__setattr__(
                self, name, validation.count("likelihood", name, getattr(self, name))
            )
        validation.choice("likelihood", "basis", self.basis, BASES)
        if self.budget is not None:
            validation.real("likelihood", "budget", self.budget, above=0)
        if self.max_samples is not None:
            count = validation.count("likelihood", "max_samples", self.max_samples, at_least=2)
            object.__setattr__(self, "max_samples", count)

    def quick(self, most: int) -> Likelihood:
        """The same on at most ``most`` samples and no finer than a curve needs."""
        return replace(
            self,
            solver=(self.solver or FixedGrid()).quick(),
            budget=None,
            draws=1,
            max_samples=min(most, self.max_samples or most),
        )

    def __str__(self) -> str:
        divergence = self.divergence or "exact up to 16 dimensions, else Hutchinson"
        wanted = (
            "" if self.budget is None else f", planned for a standard error of {self.budget:g}"
        )
        return f"{self.solver or FixedGrid()}, {divergence}, basis {self.basis}{wanted}"


BASES: dict[str, Callable[[tuple[int, ...], Callable[[], Tensor]], Basis | None]] = {
    "auto": lambda shape, train: None,
    "pixel": lambda shape, train: Pixel(),
    "cosine": lambda shape, train: Cosine(len(shape)),
    "principal": lambda shape, train: Principal.of(train()),
}


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
        solver_error: Mean over samples of the size of the integration error, NaN with an adaptive
            solver; it does not average out.
        truncation: Mean change that going on from t_min to t = 0 would make, to first order.
        prior_mismatch: Mean change that the score's own density at t_max would make in place of
            the prior.
        errors: Per sample [N]: probe_error, dequantization_error, solver_error, truncation,
            prior_mismatch.
        information: Clock u [M], increasing, and the metric's information per unit of u [M]
            averaged over samples; empty with an adaptive solver.
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
    solver_error: float = math.nan
    truncation: float = math.nan
    prior_mismatch: float = math.nan
    errors: Mapping[str, Tensor] = field(default_factory=dict)
    information: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
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
            if part.name not in ("per_sample", "errors", "information")
        }
        row["information"] = [part.tolist() for part in self.information]
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

    Raises:
        SamplingError: If samples are not finite; all others are done first, and its ``partial`` is
            their values, NaN for those that failed.
    """
    began = time.monotonic()
    device = next(model.parameters()).device
    flow = probability_flow(model.sde, model.score)
    test = data.test[: settings.max_samples]
    draws = settings.draws if data.levels is not None else 1
    solver, divergence = _chosen(flow, data, settings, device)
    failures: list[SamplingError] = []

    def solve(rows: range) -> LogLikelihood:
        values = test[rows.start : rows.stop].repeat_interleave(draws, 0)
        indices = range(rows.start * draws, rows.stop * draws)
        streams = sample_streams(seed, "likelihood", indices, device)
        x = data.units.encode(values.to(device), streams)
        try:
            return log_likelihood(flow, x, solver=solver, divergence=divergence, generator=streams)
        except SamplingError as error:
            if getattr(error, "partial", None) is None:
                raise
            failures.append(error)
            return error.partial

    own = share(len(test))
    starts = range(own.start, own.stop, settings.batch_size)
    results = [
        part
        for start in progress(starts, description)
        for part in halving(solve, range(start, min(start + settings.batch_size, own.stop)))
    ]
    rows = gathered([_row(result, data, draws) for result in results])
    result = _summary(rows, data, draws, solver, divergence, time.monotonic() - began)
    if failures:
        failures[0].partial = result.per_sample
        raise failures[0]
    return result


def _chosen(
    flow: ProbabilityFlow, data: Dataset, settings: Likelihood, device: torch.device
) -> tuple[Solver, Divergence]:
    """Solver and divergence, those of the budget if there is one."""
    like = torch.empty(1, *data.shape, device=device)
    solver = settings.solver or FixedGrid()
    divergence = settings.divergence or suited(data.shape)

    def train() -> Tensor:
        return data.units.encode(data.train[:20_000], torch.Generator().manual_seed(0))

    basis = BASES[settings.basis](data.shape, train)
    if basis is not None:
        divergence = divergence.in_basis(basis)
    if settings.budget is None:
        return solver, divergence
    return plan(flow, like, settings.budget / _per_nat(data), divergence=divergence)


def _per_nat(data: Dataset) -> float:
    """What a nat of one sample is in the metric."""
    nats = torch.tensor([0.0, 1.0], dtype=torch.float64)
    zero, nat = data.units.measure(nats, data.shape).tolist()
    return abs(nat - zero)


def _row(result: LogLikelihood, data: Dataset, draws: int) -> dict[str, Any]:
    """One batch in the unit of the metric, the draws of a sample averaged, on the CPU."""
    per_nat = _per_nat(data)

    def by_sample(values: Tensor) -> Tensor:
        return values.cpu().double().reshape(-1, draws)

    measured = by_sample(data.units.measure(result.log_prob.cpu().double(), data.shape))
    error = by_sample(result.standard_error) * per_nat
    spread = measured.std(1) if draws > 1 else torch.full((len(measured),), math.nan)
    return {
        "per_sample": measured.mean(1),
        "probe_error": error.square().mean(1).sqrt() / draws**0.5,
        "dequantization_error": spread.double() / draws**0.5,
        "solver_error": by_sample(result.solver_error).mean(1) * per_nat,
        "truncation": -by_sample(result.truncation).mean(1) * per_nat,
        "prior_mismatch": -by_sample(result.prior_mismatch).mean(1) * per_nat,
        "nfe": result.nfe * draws,
        "passes": result.passes * draws,
        "pilot_nfe": result.pilot_nfe,
        "clock": result.clock,
        "information": result.information().cpu().double().mean(1) * per_nat,
    }


def _summary(
    rows: Sequence[Mapping[str, Any]],
    data: Dataset,
    draws: int,
    solver: Solver,
    divergence: Divergence,
    seconds: float,
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
        metric=data.units.metric,
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
        solver_error=float(columns["solver_error"].mean()),
        truncation=float(columns["truncation"].mean()),
        prior_mismatch=float(columns["prior_mismatch"].mean()),
        errors=columns,
        information=(rows[0]["clock"].cpu(), over_samples("information")),
        how=f"{solver}, {divergence}, {draws} draw(s)",
    )


COLUMNS = (
    "per_sample",
    "probe_error",
    "dequantization_error",
    "solver_error",
    "truncation",
    "prior_mismatch",
)


def evaluated(run_dir: Path, iteration: int, samples: int) -> bool:
    """Whether ``likelihood.json`` has this run at this iteration, on as many ``samples``."""
    return any(
        row.get("iteration") == iteration and is_own(row) and row.get("num_samples", 0) >= samples
        for row in _rows(run_dir / "likelihood.json")
    )


def is_own(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``likelihood.json`` is of a checkpoint of the run that it lies in."""
    name = str(row.get("checkpoint", ""))
    return Path(name).name == name


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


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
    if known:
        say(
            f"    of its error: {', '.join(known)}; t_min to 0 would change it by "
            f"{result.truncation:+.2g}, the score's own density at t_max by "
            f"{result.prior_mismatch:+.2g}"
        )
    if data.entropy is not None:
        say(
            f"    entropy of the source {data.entropy:.4f} nats: "
            f"{result.value - data.entropy:+.4f} ± {result.standard_error:.4f} above it"
        )


def append_evaluation(
    run_dir: Path,
    result: Evaluation,
    iteration: int,
    model: ScoreModel,
    data: Dataset,
    settings: Likelihood,
    checkpoint: str,
) -> None:
    """Add one row to ``likelihood.json``, with what it takes to repeat it.

    ``checkpoint`` is the name of a file of this run, or the path of another run's.
    """
    path = run_dir / "likelihood.json"
    row = result.as_row()
    row |= {
        "iteration": iteration,
        "sde": repr(model.sde),
        "data": data.name,
        "entropy": data.entropy,
        "checkpoint": checkpoint,
        "dequantization": f"uniform, {settings.draws} draw(s)"
        if data.levels
        else "none (continuous data)",
        "settings": str(settings),
        "note": f"probability-flow ODE; density at t_min = {model.sde.t_min:g}",
    }
    write_atomically(path, json.dumps([*_rows(path), row], indent=1).encode())
