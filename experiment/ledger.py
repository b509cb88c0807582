"""``likelihood.json``: one row for every evaluation of a run, with what it takes to repeat it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiment.checkpoint import write_atomically
from experiment.data import Dataset
from experiment.estimators import Estimates
from experiment.evaluation import Evaluation
from experiment.settings import CONDS, UNITS, Likelihood, units_of
from experiment.side_files import read_json
from score_models import ScoreModel


def evaluated(run_dir: Path, iteration: int, samples: int) -> bool:
    """Whether ``likelihood.json`` has this run at this iteration, on as many ``samples``."""
    return any(
        row.get("iteration") == iteration and is_own(row) and row.get("num_samples", 0) >= samples
        for row in _rows(run_dir / "likelihood.json")
    )


def newest(run_dir: Path) -> str | None:
    """The newest result of this run with its error, as it is printed; None if there is none."""
    rows = [row for row in _rows(run_dir / "likelihood.json") if is_own(row)]
    if not rows:
        return None
    row = rows[-1]
    value = f"{row['value']:.4f} ± {row['standard_error']:.4f} {UNITS[row['metric']]}"
    return f"{value}; {row['caveat']}" if row.get("caveat") else value


def is_own(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``likelihood.json`` is of a checkpoint of the run that it lies in, and of
    the average that training evaluates."""
    name = str(row.get("checkpoint", ""))
    return Path(name).name == name and not row.get("average")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_json(path, list) if isinstance(row, dict)]


def _dequantized(data: Dataset, settings: Likelihood) -> str:
    if data.levels is None:
        return "none (continuous data)"
    weighed = ", weighed by importance" if settings.importance else ""
    return f"{settings.dequantization.replace('_', ' ')}, {settings.draws} draw(s){weighed}"


def _where(model: ScoreModel, data: Dataset, settings: Likelihood) -> str:
    """The time at which the density is that of the number."""
    if data.levels is None or settings.dequantization != "truncated_normal":
        return f"t_min = {model.sde.t_min:g}"
    start = units_of(data, settings, None).start_time(model.sde)
    return f"t = {start:.4g}, where the noise fills the bins"


def append_evaluation(
    run_dir: Path,
    result: Evaluation,
    iteration: int,
    model: ScoreModel,
    data: Dataset,
    settings: Likelihood,
    checkpoint: str,
    bounds: Estimates | None = None,
    average: Mapping[str, Any] | None = None,
    caveat: str = "",
) -> None:
    """Add one row to ``likelihood.json``, with what it takes to repeat it.

    ``checkpoint`` is the name of a file of this run, or the path of another run's; ``bounds`` what
    else was estimated of the same samples; ``average`` which of the weights, if not the first;
    ``caveat`` why the number does not mean what it usually does.
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
        **(average or {}),
        **({"caveat": caveat} if caveat else {}),
        "dequantization": _dequantized(data, settings),
        "settings": str(settings),
        "condition": CONDS[settings.cond] if data.cond is not None else "none",
        "note": f"probability-flow ODE; density at {_where(model, data, settings)}",
    }
    write_atomically(path, json.dumps([*_rows(path), row], indent=1).encode())


def keep_samples(folder: Path, result: Evaluation, label: str, seed: int) -> Path:
    """Write the value of each sample and its errors to ``likelihood-<label>-<digest>.npz``.

    The digest tells other settings and seeds apart: one evaluation does not replace another.
    """
    digest = hashlib.sha256(f"{result.how} {seed}".encode()).hexdigest()[:6]
    path = folder / f"likelihood-{label}-{digest}.npz"
    np.savez(
        path,
        **{result.metric: result.per_sample.numpy(), "seed": seed, "how": result.how},
        **{name: values.numpy() for name, values in result.errors.items()},
        clock=result.information[0].numpy(),
        information=result.information[1].numpy(),
        **({"log_posterior": result.posterior.numpy()} if result.posterior.numel() else {}),
    )
    return path


def keep_bounds(values: Path, estimates: Estimates) -> Path:
    """Write the bounds of each sample to ``bounds-...T<steps>.npz`` beside the ``values`` that
    :func:`keep_samples` wrote: an array [N] by the name of each, the ODE's among them."""
    name = f"{values.stem.replace('likelihood', 'bounds', 1)}-T{estimates.steps}.npz"
    path = values.with_name(name)
    arrays = {name: cost.numpy() for name, cost in estimates.per_sample.items()}
    np.savez(path, metric=estimates.metric, **arrays)
    return path
