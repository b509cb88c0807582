"""The likelihood of a test set: one number, its standard error, and how it came about."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.checkpoint import write_atomically
from experiment.data import Dataset
from experiment.progress import progress, say
from experiment.seeds import sample_streams
from likelihood import Divergence, log_likelihood
from score_models import ScoreModel
from sde_lib import probability_flow, validation
from sde_lib.samplers.adaptive import check_solver


@dataclass(frozen=True)
class Likelihood:
    """How to evaluate a likelihood.

    Args:
        divergence: Exact or Hutchinson; chosen by the number of dimensions if not given.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance.
        method: Adaptive method of torchdiffeq.
        batch_size: Samples solved together.
        draws: Dequantizations of each sample that are averaged; continuous data need one.
        max_samples: Evaluate only so many of the test set; all if null.
        max_evaluations: Evaluations a batch after which to give up.
    """

    divergence: Divergence | None = None
    rtol: float = 1e-4
    atol: float = 1e-4
    method: str = "dopri5"
    batch_size: int = 128
    draws: int = 1
    max_samples: int | None = None
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        check_solver("likelihood", self.rtol, self.atol, self.method, torch.float32)
        for name in ("batch_size", "draws", "max_evaluations"):
            object.__setattr__(
                self, name, validation.count("likelihood", name, getattr(self, name))
            )
        if self.max_samples is not None:
            count = validation.count("likelihood", "max_samples", self.max_samples, at_least=2)
            object.__setattr__(self, "max_samples", count)


@dataclass(frozen=True)
class Evaluation:
    """The likelihood of a test set.

    Attributes:
        metric: bits_per_dim, or nll in nats a sample and data units.
        value: Mean over the test set.
        standard_error: Of that mean: spread of the samples, in which probes and dequantization are
            contained.
        probe_error: The part of it that is Hutchinson noise; NaN with a single probe, 0 with the
            exact trace.
        num_samples: Test samples.
        nfe: Forward passes a sample, on average.
        seconds: Wall time.
        per_sample: The metric of each sample, [N].
    """

    metric: str
    value: float
    standard_error: float
    probe_error: float
    num_samples: int
    nfe: float
    seconds: float
    per_sample: Tensor

    def __str__(self) -> str:
        unit = {"bits_per_dim": "bits/dim", "nll": "nats"}[self.metric]
        return f"{self.value:.4f} ± {self.standard_error:.4f} {unit}"

    def as_metrics(self) -> dict[str, float]:
        """Rows of the record."""
        return {
            f"eval/{self.metric}": self.value,
            f"eval/{self.metric}_stderr": self.standard_error,
            "eval/nfe": self.nfe,
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

    Dequantization and probes of sample i depend on (seed, i) alone: not on batch size or order.

    Args:
        model: In evaluation mode.
        data: Its test part is used.
        settings: How.
        seed: Seed of all randomness.
        description: In front of the progress bar.
    """
    device = next(model.parameters()).device
    flow = probability_flow(model.sde, model.score)
    test = data.test[: settings.max_samples]
    draws = settings.draws if data.levels is not None else 1
    began, nfe, rows, errors = time.monotonic(), 0, [], []
    for start in progress(range(0, len(test), settings.batch_size), description):
        values = test[start : start + settings.batch_size].repeat_interleave(draws, 0)
        indices = range(start * draws, start * draws + len(values))
        streams = sample_streams(seed, "likelihood", indices, device)
        x = data.units.encode(values.to(device), streams)
        result = log_likelihood(
            flow,
            x,
            divergence=settings.divergence,
            generator=streams,
            rtol=settings.rtol,
            atol=settings.atol,
            method=settings.method,
            max_evaluations=settings.max_evaluations,
        )
        measured = data.units.measure(result.log_prob.cpu().double(), data.shape)
        zero, nat = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        per_nat = float(data.units.measure(zero, data.shape) - data.units.measure(nat, data.shape))
        rows.append(measured.reshape(-1, draws).mean(1))
        error = result.standard_error.cpu().double().reshape(-1, draws)
        errors.append(error.square().mean(1).sqrt() * per_nat / draws**0.5)
        nfe += result.nfe * len(values)
    per_sample, error = torch.cat(rows), torch.cat(errors)
    return Evaluation(
        metric=data.units.metric,
        value=float(per_sample.mean()),
        standard_error=float(per_sample.std() / len(per_sample) ** 0.5),
        probe_error=float(error.square().sum().sqrt() / len(error)),
        num_samples=len(per_sample),
        nfe=nfe / len(per_sample),
        seconds=time.monotonic() - began,
        per_sample=per_sample,
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
        f"{what}: {result}  ({result.num_samples} samples, {result.nfe:.0f} evaluations each, "
        f"{result.seconds:.0f} s)"
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
    row = {key: value for key, value in asdict(result).items() if key != "per_sample"}
    row = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    row |= {
        "iteration": iteration,
        "sde": repr(model.sde),
        "data": data.name,
        "entropy": data.entropy,
        "checkpoint": checkpoint,
        "divergence": str(settings.divergence or "exact up to 16 dimensions, else Hutchinson"),
        "dequantization": f"uniform, {settings.draws} draw(s)"
        if data.levels
        else "none (continuous data)",
        "note": f"probability-flow ODE, {settings.method}, rtol {settings.rtol:g}, "
        f"atol {settings.atol:g}; "
        f"density at t_min = {model.sde.t_min:g}",
    }
    write_atomically(path, json.dumps([*_rows(path), row], indent=1).encode())
