"""The likelihood of a test set: one number, its standard error, and how it came about."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

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
    Dequantization,
    Divergence,
    FixedGrid,
    LogLikelihood,
    Pixel,
    Principal,
    Solver,
    Standardization,
    TruncatedNormalDequantization,
    importance_weighted,
    log_likelihood,
    plan,
    suited,
)
from likelihood.dequantize import Drawn
from likelihood.importance import noise_bias
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
        dequantization: uniform, truncated_normal (for a model trained on bin centres, see
            ``training.dequantize``) or variational (a small flow, fitted once to the model).
        importance: Whether the draws are combined by their importance weights, which tightens
            the bound, instead of averaged.
        bounds: T; the ELBO and the bound of the model in T steps are then computed beside the
            likelihood; null: they are not.
        max_samples: Evaluate only so many of the test set; all if null.
    """

    solver: Solver | None = None
    divergence: Divergence | None = None
    basis: str = "auto"
    budget: float | None = None
    batch_size: int = 128
    draws: int = 1
    dequantization: str = "uniform"
    importance: bool = False
    bounds: int | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "draws"):
            object.__setattr__(
                self, name, validation.count("likelihood", name, getattr(self, name))
            )
        validation.choice("likelihood", "basis", self.basis, BASES)
        validation.choice("likelihood", "dequantization", self.dequantization, DEQUANTIZATIONS)
        if validation.flag("likelihood", "importance", self.importance) and self.draws < 2:
            raise ValueError(
                f"likelihood needs draws >= 2 to weigh them by importance; got draws={self.draws}."
            )
        if self.bounds is not None:
            steps = validation.count("likelihood", "bounds", self.bounds, at_least=2)
            object.__setattr__(self, "bounds", steps)
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
            importance=False,
            bounds=None,
            dequantization=self.dequantization.replace("variational", "uniform"),
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
        effective_draws: Mean effective number of draws where they are weighed by importance.
        solver_error: Mean over samples of the size of the integration error, NaN with an adaptive
            solver; it does not average out.
        truncation: Mean change that going on from t_min to t = 0 would make, to first order.
        prior_mismatch: Mean change that the score's own density at t_max would make in place of
            the prior.
        errors: Per sample [N]: probe_error, dequantization_error, effective_draws, solver_error,
            truncation, prior_mismatch.
        information: Clock u [M], increasing, and the information per unit of u [N, M] in the unit
            of the metric: what each sample's telling apart from finer noise costs; empty with an
            adaptive solver.
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
        clock, information = self.information
        row["information"] = [clock.tolist(), information.mean(0).tolist()]
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }


DEQUANTIZATIONS = ("uniform", "truncated_normal", "variational")


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
        SamplingError: If samples are not finite; all others are done first, and its ``partial`` is
            their values, NaN for those that failed.
    """
    began = time.monotonic()
    device = next(model.parameters()).device
    flow = probability_flow(model.sde, model.score)
    test = data.test[: settings.max_samples]
    draws = settings.draws if data.levels is not None else 1
    units = _units(data, settings, dequantization)
    flow = replace(flow, t_start=units.start_time(model.sde))
    solver, divergence = _chosen(flow, data, settings, device)
    failures: list[SamplingError] = []

    def solve(rows: range) -> dict[str, Any]:
        values = test[rows.start : rows.stop].repeat_interleave(draws, 0)
        indices = range(rows.start * draws, rows.stop * draws)
        streams = sample_streams(seed, "likelihood", indices, device)
        drawn = units.draw(values.to(device), streams, sde=model.sde)
        try:
            result = log_likelihood(
                flow, drawn.x, solver=solver, divergence=divergence, generator=streams
            )
        except SamplingError as error:
            if getattr(error, "partial", None) is None:
                raise
            failures.append(error)
            result = error.partial
        return _row(result, drawn, data, draws, settings.importance)

    own = share(len(test))
    starts = range(own.start, own.stop, settings.batch_size)
    parts = [
        part
        for start in progress(starts, description)
        for part in halving(solve, range(start, min(start + settings.batch_size, own.stop)))
    ]
    how = f"{solver}, {divergence}; {units if data.levels else 'continuous'}, {draws} draw(s)"
    result = _summary(
        gathered(parts), data.units.metric, how, time.monotonic() - began, settings.importance
    )
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
    return 1.0 if data.levels is None else 1 / (math.prod(data.shape) * math.log(2))


def _units(
    data: Dataset, settings: Likelihood, dequantization: Dequantization | None
) -> Dequantization | Standardization:
    """What turns test samples into points of the model: the dequantization asked for, if any."""
    if data.levels is None or dequantization is not None:
        return dequantization or data.units
    if settings.dequantization == "variational":
        raise ValueError("a variational dequantization is fitted first and then passed on.")
    if settings.dequantization == "truncated_normal":
        return TruncatedNormalDequantization(data.levels, data.units.low, data.units.high)
    return data.units


def _row(
    result: LogLikelihood,
    drawn: Drawn,
    data: Dataset,
    draws: int,
    importance: bool,
) -> dict[str, Any]:
    """One batch in the unit of the metric, the draws of a sample put together, on the CPU."""
    per_nat = _per_nat(data)

    def by_sample(values: Tensor) -> Tensor:
        return values.cpu().double().reshape(-1, draws)

    nats = by_sample(drawn.bound(result.log_prob.double()))
    probes = by_sample(result.standard_error)
    spread = nats.std(1) if draws > 1 else torch.full((len(nats),), math.nan).double()
    value, spread = nats.mean(1), spread / draws**0.5
    share = torch.full((len(nats), draws), 1 / draws, dtype=torch.float64)
    effective = torch.full((len(nats),), float(draws), dtype=torch.float64)
    if importance:
        weighted = importance_weighted(nats.T)
        # noise in the exponent lifts the mean of exponentials: what the probes add is taken off
        value = weighted.log_prob - noise_bias(probes.T, nats.T)
        spread, effective = weighted.standard_error, weighted.effective_sample_size
        share = nats.softmax(1)
    return {
        "per_sample": -value * per_nat,
        "probe_error": (share * probes).square().sum(1).sqrt() * per_nat,
        "dequantization_error": spread * per_nat,
        "effective_draws": effective,
        "solver_error": by_sample(result.solver_error).mean(1) * per_nat,
        "truncation": -by_sample(result.truncation).mean(1) * per_nat,
        "prior_mismatch": -by_sample(result.prior_mismatch).mean(1) * per_nat,
        "nfe": result.nfe * draws,
        "passes": result.passes * draws,
        "pilot_nfe": result.pilot_nfe,
        "clock": result.clock.cpu(),
        "information": result.information().T.cpu().double() * per_nat,
    }


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


def _dequantized(data: Dataset, settings: Likelihood) -> str:
    if data.levels is None:
        return "none (continuous data)"
    weighed = ", weighed by importance" if settings.importance else ""
    return f"{settings.dequantization.replace('_', ' ')}, {settings.draws} draw(s){weighed}"


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


class HasRow(Protocol):
    """What stands beside an evaluation in its file."""

    def as_row(self) -> dict[str, Any]:
        """Numbers, strings and lists of them."""
        ...


def append_evaluation(
    run_dir: Path,
    result: Evaluation,
    iteration: int,
    model: ScoreModel,
    data: Dataset,
    settings: Likelihood,
    checkpoint: str,
    bounds: HasRow | None = None,
) -> None:
    """Add one row to ``likelihood.json``, with what it takes to repeat it.

    ``checkpoint`` is the name of a file of this run, or the path of another run's; ``bounds`` what
    else was estimated of the same samples.
    """
    path = run_dir / "likelihood.json"
    row = result.as_row()
    if bounds is not None:
        row["bounds"] = bounds.as_row()
    row |= {
        "iteration": iteration,
        "sde": repr(model.sde),
        "data": data.name,
        "entropy": data.entropy,
        "checkpoint": checkpoint,
        "dequantization": _dequantized(data, settings),
        "settings": str(settings),
        "note": f"probability-flow ODE; density at t_min = {model.sde.t_min:g}",
    }
    write_atomically(path, json.dumps([*_rows(path), row], indent=1).encode())
