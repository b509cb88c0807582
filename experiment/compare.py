"""mode=compare: how good several samplers of one model are, by what they cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.bench import Asked, Bench
from experiment.checkpoint import write_atomically
from experiment.compare_figure import TITLES, plot_comparison
from experiment.contenders import Trial, contenders
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.progress import progress, say
from experiment.report import uncertain, write_report
from experiment.run import Run
from experiment.shards import alone
from experiment.trackers import Safe
from sde_lib import validation


def compare(
    run: Run,
    *,
    samplers: Sequence[str],
    nfe: Sequence[int],
    tolerances: Sequence[float] = (1e-2, 1e-3, 1e-4),
    num_samples: int = 1000,
    batch_size: int = 256,
    endpoints: int = 64,
    reference_steps: int = 200,
) -> None:
    """Compare samplers on the newest checkpoint of the run, or on ``checkpoint=PATH``.

    Sample i of every sampler starts at the same noise, that of mode=sample. For each there are
    the distances of its samples from the test set, in model units, each with its 95 % interval;
    those of training samples are the floor. For deterministic ones there is also the RMS
    distance, by coordinate, from a converged solve of the same probability flow. All ends are
    denoised.

    Writes ``compare/compare-<iteration>-<digest>.json``, anew after each sampler, and
    ``figures/compare-<iteration>.png``. A sampler that fails is reported as failed.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
        samplers: Names of ``conf/sampler``.
        nfe: Evaluations a sample; each sampler makes as many steps as they buy.
        tolerances: For samplers without steps.
        num_samples: Of each sampler and of the training set; of the test set as far as it goes.
        batch_size: How many at a time.
        endpoints: How many of them, the first, are solved to convergence.
        reference_steps: Of the converged solve, which is made once more with twice as many.

    Raises:
        RunError: If nothing can be compared, or every sampler fails.
    """
    alone("compare")
    validation.installed("matplotlib")
    asked = Asked(samplers, nfe, tolerances, num_samples, batch_size, endpoints, reference_steps)
    _refuse_another(run)
    chosen = contenders(run, asked.samplers)
    data: Dataset = run.build("data")
    asked.check(data)
    tracker = Safe(run.build("tracking"))
    run, model, path, iteration = run.trained()
    bench = Bench.of(run, model, data, path, asked)
    planned = bench.planned(chosen)
    with tracker.watching(run.path, run.config, run.config["run"]["name"]):
        digest = hashlib.sha256(f"{asked} {run.seed} {path.absolute()}".encode()).hexdigest()[:6]
        record = run.path / "compare" / f"compare-{iteration:08d}-{digest}.json"
        about = {"iteration": iteration, "checkpoint": str(path), "seed": run.seed}
        found = measured(bench.solved(), planned, about, record)
        picture = run.path / "figures" / f"compare-{iteration:08d}.png"
        tracker.image("compare", plot_comparison(found, picture), iteration)
    say(f"each interval: {record}\nfigure: {picture}\nreport: {write_report(run.path)}")


def _refuse_another(run: Run) -> None:
    given = [o for o in run.overrides if o.lstrip("+").startswith(("sampler=", "sampler."))]
    if given:
        raise RunError(
            "mode=compare takes its samplers from mode.samplers, each with the numbers of its "
            f"file in conf/sampler; leave out {' '.join(given)}."
        )


def measured(
    bench: Bench, planned: Sequence[Trial], about: Mapping[str, Any], record: Path
) -> dict[str, Any]:
    """All that is found, shown line by line and kept in ``record`` as it comes.

    Raises:
        RunError: If every sampler fails.
    """
    found = {**about, **bench.about(), "results": []}
    for line in _head(found):
        say(line)
    record.parent.mkdir(parents=True, exist_ok=True)
    for trial in progress(planned, "compare"):
        found["results"].append(bench.row(trial))
        say(_row(found["results"][-1]))
        write_atomically(record, json.dumps(found, indent=1).encode())
    reasons = [row.get("failed") for row in found["results"]]
    if all(reasons):
        raise RunError(f"every sampler failed, the first of them so: {reasons[0]}")
    return found


def _head(found: Mapping[str, Any]) -> list[str]:
    truth = found["reference"]
    lines = [
        f"{found['num_samples']} samples of each sampler against {found['test_samples']} of the "
        "test set, in model units; ± is half of the 95 % interval"
    ]
    if truth:
        lines.append(
            f"endpoint error: RMS distance by coordinate of {truth['samples']} samples from "
            f"{truth['sampler']}, which is good to {truth['good_to']:.1g}"
        )
    floor = _line("training set", "", _cells(found["floor"]), "")
    return [*lines, "", _line("Sampler", "NFE", TITLES.values(), "s"), floor]


def _row(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"{row['sampler']:<19}  failed at {row['asked']}: {row['failed']}"
    return _line(row["sampler"], str(row["nfe"]), _cells(row), f"{row['seconds']:.1f}")


def _line(name: str, nfe: str, cells: Iterable[str], seconds: str) -> str:
    return f"{name:<19}{nfe:>5}" + "".join(f"{cell:>20}" for cell in cells) + f"{seconds:>7}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [_cell(row[name]) if name in row else "" for name in TITLES]


def _cell(estimate: Mapping[str, float]) -> str:
    """The value and half of its interval, two digits of it; small ones by powers of ten."""
    value, half = estimate["value"], (estimate["high"] - estimate["low"]) / 2
    small = max(abs(value), half) < 1e-3
    return f"{value:.1e} ± {half:.1e}" if small else uncertain(value, half)
