"""mode=compare: how good several samplers of one model are, by what they cost."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.bench import Asked, Bench
from experiment.checkpoint import write_atomically
from experiment.compare_figure import TITLES, plot_comparison
from experiment.contenders import Trial, contenders
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.measured import as_trained
from experiment.progress import progress, say
from experiment.report import renew_report
from experiment.run import Run
from experiment.shards import alone
from experiment.trackers.first_process import in_first_process
from experiment.uncertainty import interval
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

    Writes ``compare/compare-<iteration>-<digest>.json``, anew after each sampler, and a figure of
    that name in ``figures``. A sampler that fails is reported as failed; what can be known to fail
    is, before anything is drawn.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
        samplers: Names of ``conf/sampler``, with settings after them: ``heun grid=UniformLogSNR``.
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
    tracker = in_first_process(lambda: run.build("tracking"))
    run, model, path, iteration = run.trained()
    run.warn()
    data = as_trained(data, run.config)
    bench = Bench.of(run, model, data, path, asked)
    planned = bench.planned(chosen)
    refuse_all([_why(t.name, t.asked, t.refused) for t in planned])
    with tracker.watching(run.path, run.config, run.config["run"]["name"]):
        identity = f"{asked} {run.seed} {path.absolute()}{run.average.suffix}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:6]
        record = run.path / "compare" / f"compare-{iteration:08d}-{digest}.json"
        about = {"iteration": iteration, "checkpoint": str(path), "seed": run.seed}
        about |= {"begun": time.time(), **run.average.as_row()}
        found = measured(bench.solved(), planned, about, record)
        picture = run.path / "figures" / f"{record.stem}.png"
        tracker.image("compare", plot_comparison(found, picture), iteration)
    say(f"each interval: {record}\nfigure: {picture}\n{renew_report(run.path)}")


def _refuse_another(run: Run) -> None:
    given = [o for o in run.overrides if o.lstrip("+").startswith(("sampler=", "sampler."))]
    if given:
        raise RunError(
            "mode=compare takes its samplers from mode.samplers, each with the numbers of its "
            "file in conf/sampler or those behind its name, as in mode.samplers=['ddim eta=1']; "
            f"leave out {' '.join(given)}."
        )


def measured(
    bench: Bench, planned: Sequence[Trial], about: Mapping[str, Any], record: Path
) -> dict[str, Any]:
    """All that is found, shown line by line and kept in ``record`` as it comes.

    Raises:
        RunError: If every sampler fails.
    """
    found = {**about, "complete": False, **bench.about(), "results": []}
    width = max(19, *(len(trial.name) for trial in planned))
    for line in _head(found, width):
        say(line)
    record.parent.mkdir(parents=True, exist_ok=True)
    _keep(found, record)
    for trial in progress(planned, "compare"):
        found["results"].append(bench.row(trial))
        say(_row(found["results"][-1], width))
        _keep(found, record)
    found["complete"] = True
    _keep(found, record)
    rows = found["results"]
    refuse_all([_why(row["sampler"], row["asked"], row.get("failed", "")) for row in rows])
    return found


def refuse_all(reasons: Sequence[str]) -> None:
    """Say that there is nothing to compare, if each has a reason, "" being none.

    Raises:
        RunError: With the first of them.
    """
    if all(reasons):
        raise RunError(f"every sampler failed, the first of them so: {reasons[0]}")


def _why(name: str, asked: str, reason: str) -> str:
    return reason and f"{name} at {asked}: {reason}"


def _keep(found: Mapping[str, Any], record: Path) -> None:
    write_atomically(record, json.dumps(found, indent=1).encode())


def _head(found: Mapping[str, Any], width: int) -> list[str]:
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
    floor = _line("training set".ljust(width), "", _cells(found["floor"]), "")
    return [*lines, "", _line("Sampler".ljust(width), "NFE", TITLES.values(), "s"), floor]


def _row(row: Mapping[str, Any], width: int) -> str:
    name = row["sampler"].ljust(width)
    if "failed" in row:
        return f"{name}  failed at {row['asked']}: {row['failed']}"
    return _line(name, str(row["nfe"]), _cells(row), f"{row['seconds']:.1f}")


def _line(name: str, nfe: str, cells: Iterable[str], seconds: str) -> str:
    return f"{name}{nfe:>5}" + "".join(f"{cell:>20}" for cell in cells) + f"{seconds:>7}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [interval(row[name]) if name in row else "" for name in TITLES]
