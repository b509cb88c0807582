"""mode=averages: the likelihood against the width of the average of the weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiment.averages import Power
from experiment.checkpoint import CheckpointError, load_checkpoint, write_atomically
from experiment.chosen import refuse_all
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.evaluation import Evaluation, evaluate
from experiment.measured import as_trained
from experiment.progress import progress, say
from experiment.report import renew_report
from experiment.run import Run
from experiment.settings import UNITS, Likelihood
from experiment.shards import alone
from experiment.trackers.first_process import in_first_process
from experiment.uncertainty import uncertain
from experiment.widths_figure import plot_widths
from score_models import ScoreModel
from sde_lib import validation


def averages(run: Run, *, widths: Sequence[float], max_samples: int = 256) -> None:
    """Score the averages of several widths of the newest checkpoint, or of ``checkpoint=PATH``.

    Each has the same test samples, dequantization and probes as the average that training
    evaluates, so that their differences are known better than the values. Writes
    ``averages/averages-<iteration>-<digest>.json`` and ``figures/averages-<iteration>.png``. A
    width that cannot be put together from the snapshots is reported as failed.

    Args:
        run: The composed configuration; model and process are those stored with the checkpoint.
        widths: Of the averages, each > 0 and <= 0.28.
        max_samples: How much of the test set, 2 or more.

    Raises:
        RunError: If no width can be had.
    """
    alone("averages")
    validation.installed("matplotlib")
    asked = _Asked(widths, max_samples)
    if run.config.get("average") is not None:
        raise RunError(
            f"mode=averages goes through mode.widths; leave out average={run.config['average']}."
        )
    data: Dataset = run.build("data")
    settings: Likelihood = run.build("likelihood").quick(asked.max_samples)
    tracker = in_first_process(lambda: run.build("tracking"))
    home, model, path, iteration = run.trained()
    home.warn()
    refuse_all(asked.widths, path, load_checkpoint(path), home.config["training"])
    data = as_trained(data, home.config)
    settings.check(data, on_centres=not home.config["training"].get("dequantize", True))
    scan = _Scan(run, path, data, settings, model)
    with tracker.watching(home.path, home.config, home.config["run"]["name"]):
        found = {"iteration": iteration, "checkpoint": str(path), "seed": run.seed, **scan(asked)}
        digest = hashlib.sha256(f"{asked} {run.seed} {settings} {path.absolute()}".encode())
        name = f"averages-{iteration:08d}"
        record = home.path / "averages" / f"{name}-{digest.hexdigest()[:6]}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(found, indent=1).encode())
        picture = plot_widths(found, home.path / "figures" / f"{name}.png")
        tracker.image("averages", picture, iteration)
    say(f"all numbers: {record}\nfigure: {picture}\n{renew_report(home.path)}")


@dataclass(frozen=True)
class _Asked:
    """The widths, rising and each once, and how many samples, checked."""

    widths: Sequence[float]
    max_samples: int

    def __post_init__(self) -> None:
        if not isinstance(self.widths, list | tuple) or not self.widths:
            raise ValueError(
                "mode=averages needs a list of widths with one entry or more, such as "
                f"mode.widths=[0.05,0.1]; got {self.widths!r}."
            )
        for width in self.widths:
            validation.real("mode=averages", "each of widths", width, above=0, at_most=0.28)
        count = validation.count("mode=averages", "max_samples", self.max_samples, at_least=2)
        object.__setattr__(self, "widths", sorted({*self.widths}))
        object.__setattr__(self, "max_samples", count)


@dataclass(frozen=True)
class _Scan:
    """What all averages are held to: one test set under the average of the training.

    Args:
        run: As it was asked for.
        path: The checkpoint, in case a newer one is written meanwhile.
        data: Its test part.
        settings: Of the likelihood.
        model: With the average that training evaluates.
    """

    run: Run
    path: Path
    data: Dataset
    settings: Likelihood
    model: ScoreModel

    def __call__(self, asked: _Asked) -> dict[str, Any]:
        """All that is found, shown line by line."""
        first = self._score(self.model)
        say(f"{first.num_samples} test samples; ± of a difference is over the same samples")
        say(f"{'average':<16}{UNITS[first.metric]:>22}{'difference':>22}   profile off by")
        say(f"{'of training':<16}{uncertain(first.value, first.standard_error):>22}")
        rows = []
        for width in progress(asked.widths, "averages"):
            rows.append(self._row(width, first))
            say(_line(rows[-1]))
        best = min((row for row in rows if "failed" not in row), key=lambda row: row["value"])
        say(f"lowest: average=power:{best['width']:g}, chosen on these samples")
        whole = {"value": first.value, "standard_error": first.standard_error}
        about = {"metric": first.metric, "num_samples": first.num_samples, "how": first.how}
        return {**about, "training": whole, "results": rows}

    def _score(self, model: ScoreModel) -> Evaluation:
        return evaluate(model, self.data, self.settings, seed=self.run.seed)

    def _row(self, width: float, first: Evaluation) -> dict[str, Any]:
        """One width: its value, and the difference by sample from the average of training."""
        chosen = {"average": f"power:{width!r}", "checkpoint": str(self.path)}
        try:
            one, model, _, _ = replace(self.run, config={**self.run.config, **chosen}).trained()
        except CheckpointError:
            raise
        except RunError as error:
            return {"width": width, "failed": str(error)}
        found = self._score(model)
        difference = found.per_sample - first.per_sample
        return {
            "width": width,
            "average": Power(width).name,
            "average_error": one.average.error,
            "value": found.value,
            "standard_error": found.standard_error,
            "difference": float(difference.mean()),
            "difference_error": float(difference.std()) / math.sqrt(len(difference)),
        }


def _line(row: Mapping[str, Any]) -> str:
    name = f"power:{row['width']:g}"
    if "failed" in row:
        return f"{name:<16}failed: {row['failed']}"
    value = uncertain(row["value"], row["standard_error"])
    difference = uncertain(row["difference"], row["difference_error"])
    off = "kept" if row["average_error"] is None else f"{row['average_error']:.2g}"
    return f"{name:<16}{value:>22}{difference:>22}   {off}"
