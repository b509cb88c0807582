"""mode=diagnose: what the data ask for, and where in the noise a trained model errs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from experiment.checkpoint import list_checkpoints, write_atomically
from experiment.config import choices, named
from experiment.data import Dataset
from experiment.diagnosis import advice
from experiment.diagnosis.advice import Advice
from experiment.diagnosis.figure import plot_diagnosis
from experiment.diagnosis.levels import Wanted
from experiment.diagnosis.model import OwnLevels, even_levels, own_levels
from experiment.diagnosis.page import FILE, PICTURE
from experiment.diagnosis.probes import bases
from experiment.diagnosis.seen import Curves, Seen
from experiment.diagnosis.spread import PriorFit
from experiment.diagnosis.trained import ByLevel, Trained, by_level, numbers
from experiment.diagnosis.words import lines
from experiment.measured import as_trained
from experiment.progress import say
from experiment.report import write_report
from experiment.run import Run
from experiment.settings import per_nat
from experiment.shards import alone
from sde_lib import SDE, validation

PROBE_LEVELS = 65  # of the integral over the levels of a process


@dataclass(frozen=True)
class Effort:
    """How much to look at; see :func:`diagnose`."""

    num_samples: int
    scan: int
    levels: int
    loss_samples: int
    gradient_samples: int

    def __post_init__(self) -> None:
        least = {"num_samples": 4, "scan": 2, "levels": 8, "loss_samples": 4}
        for name, value in asdict(self).items():
            at_least = least.get(name, 0)
            whole = validation.count("mode=diagnose", name, value, at_least=at_least)
            object.__setattr__(self, name, whole)


def diagnose(
    run: Run,
    *,
    num_samples: int = 4096,
    scan: int = 200_000,
    levels: int = 30,
    loss_samples: int = 256,
    gradient_samples: int = 64,
) -> None:
    """Look at the data, propose settings, and if there is a checkpoint look at its model too.

    All of it goes to ``diagnose.json``, ``figures/diagnose.png`` and the report; what each number
    means is in docs/diagnose.md.

    Args:
        run: The composed configuration.
        num_samples: Of the training set, for the covariance and what follows from it.
        scan: Of each part, for what is counted one by one; a random choice of larger sets.
        levels: Of noise, for a trained model.
        loss_samples: Training and test samples at each of these.
        gradient_samples: Training samples at each; 0 leaves the gradients out.

    Raises:
        RunError: If there is a checkpoint, and of other choices.
    """
    alone("diagnose")
    validation.installed("matplotlib")
    effort = Effort(num_samples, scan, levels, loss_samples, gradient_samples)
    data: Dataset = run.build("data")
    there = run.config["checkpoint"] or list_checkpoints(run.checkpoints)
    trained = Trained(*run.trained()) if there else None
    if trained:
        run = trained.run
        data = as_trained(data, run.config)
    run = run.measured(data)
    found = diagnosis(run, data, effort, trained)
    run.path.mkdir(parents=True, exist_ok=True)
    write_atomically(run.path / FILE, json.dumps(found, indent=1).encode())
    picture = plot_diagnosis(found, run.path / PICTURE)
    for line in lines(found):
        say(line)
    say(f"all of it: {run.path / FILE}\nfigure: {picture}\nreport: {write_report(run.path)}")


def diagnosis(run: Run, data: Dataset, effort: Effort, trained: Trained | None) -> dict[str, Any]:
    """All that is found, as it stands in ``diagnose.json``.

    Args:
        run: With what the data decide filled in.
        data: What to look at.
        effort: How closely.
        trained: A model of these data, or None.
    """
    seen = Seen.of(data, run.config["training"], effort.scan, effort.num_samples, run.seed)
    sde: SDE = run.build("sde")
    say(f"looking at {data.name}")
    probes = bases(seen.some, data.shape, even_levels(sde, PROBE_LEVELS))
    own = own_levels(run.build("objective"), sde, seen.curves.best.clock)
    measured = _measured(trained, seen, effort)
    wanted, drawn = _levels_wanted(seen.curves, own, measured)
    told = probes if measured is None else measured.bases
    sure = measured is not None or seen.curves.lasting >= advice.EFFICIENT
    proposed = [
        *proposals(run, seen),
        *(levels_proposed(run, wanted, drawn) if sure else []),
        *advice.basis(run.config["likelihood"], told, measured is None),
    ]
    units = list(advice.data_levels(run.config["data"], seen.facts, seen.values))
    if not all(each.fits for each in units):
        proposed = []  # all others are in units that this one changes
    return {
        "metric": data.units.metric,
        **about_data(run, seen),
        "bases": None if probes is None else probes.as_row(per_nat(data)),
        "levels": about_levels(seen.curves, own),
        "model": None if measured is None else _about_model(trained, measured, per_nat(data)),
        "advice": [each.as_row() for each in [*units, *proposed]],
    }


def _measured(trained: Trained | None, seen: Seen, effort: Effort) -> ByLevel | None:
    if trained is None:
        return None
    say(f"looking at {trained.checkpoint}")
    return by_level(
        trained,
        seen,
        levels=effort.levels,
        loss_samples=effort.loss_samples,
        gradient_samples=effort.gradient_samples,
    )


def _levels_wanted(
    curves: Curves, own: OwnLevels | None, measured: ByLevel | None
) -> tuple[Wanted, OwnLevels | None]:
    """The density of levels by what knows the data best, and that of the objective beside it."""
    if measured is None:
        return curves.best.wanted(), own
    return measured.wanted(), measured.own


def proposals(run: Run, seen: Seen) -> list[Advice]:
    """Settings that the data ask for, those that fit already among them; not the noise levels."""
    config, data = run.config, seen.data
    return [
        *advice.sigma_max(config["sde"], seen.reach, seen.prior),
        *advice.data_std(config["parameterization"], _data_std(run, data)),
    ]


def levels_proposed(run: Run, wanted: Wanted, drawn: OwnLevels | None) -> list[Advice]:
    """The noise levels to train on."""
    efficiency = 0.0 if drawn is None else wanted.efficiency(drawn.density)
    return list(advice.levels(run.config["objective"], wanted, efficiency))


def _data_std(run: Run, data: Dataset) -> float:
    """What ``parameterization.data_std=null`` becomes."""
    parameterization = {**run.config["parameterization"], "data_std": None}
    empty = Run({**run.config, "parameterization": parameterization}, run.instantiate)
    return float(empty.measured(data).config["parameterization"]["data_std"])


def about_data(run: Run, seen: Seen) -> dict[str, Any]:
    """Counts, values, units, distances and the fit of each prior."""
    std = seen.some.std(0, correction=0)
    steps, batch = (run.config["training"].get(name) for name in ("steps", "batch_size"))
    return {
        "facts": seen.facts.as_row(),
        "values": asdict(seen.values) | {"levels": seen.values.levels},
        "said": [*seen.facts.lines(), *advice.about_values(seen.facts, seen.values)],
        "epochs": steps * batch / len(seen.train.samples) if steps and batch else None,
        "units": {
            "std": float(seen.some.std(correction=0)),
            "smallest_std": float(std.min()),
            "largest_std": float(std.max()),
            "data_std": _data_std(run, seen.data),
            "samples": len(seen.some),
        },
        "reach": asdict(seen.reach),
        "nearest": seen.nearest,
        "matched": seen.prior.matched(),
        "processes": list(map(dict, priors(run, seen.prior))),
    }


def priors(run: Run, fit: PriorFit) -> list[Mapping[str, Any]]:
    """How well the prior of each process fits: the chosen one, and those of ``conf/sde``."""
    known = {name: named(run.conf, "sde", name) for name in choices(run.conf)["sde"]}
    nodes = {"as chosen": run.config["sde"], **known}
    return [_prior(name, run.instantiate(node), fit) for name, node in nodes.items()]


def _prior(name: str, sde: SDE, fit: PriorFit) -> dict[str, Any]:
    low, high = (-0.5 * end for end in reversed(sde.log_snr_range()))
    first, last = (float(torch.tensor(u, dtype=torch.float64).exp()) for u in (low, high))
    return {
        "name": name,
        "first": first,
        "last": last,
        "low": fit.low(last),
        "high": fit.high(last),
    }


def about_levels(curves: Curves, own: OwnLevels | None) -> dict[str, Any]:
    """Error curves of simple denoisers, the density that they ask for, and the objective's."""
    wanted = curves.best.wanted()
    fewer = [each.wanted() for each in curves.fewer if each.falls]
    return {
        "clock": curves.best.clock.tolist(),
        "gaussian": curves.gaussian.error.tolist(),
        "best": curves.best.error.tolist(),
        "of": curves.best.of,
        "floor": None if curves.floor is None else numbers(curves.floor),
        "wanted": wanted.density.tolist(),
        "wanted_mean": wanted.mean,
        "wanted_std": wanted.std,
        "wanted_by_fewer": [[each.mean, each.std] for each in fewer],
        "lasting": curves.lasting,
        "own": None if own is None else own.density.tolist(),
        "efficiency": None if own is None else wanted.efficiency(own.density),
    }


def _about_model(trained: Trained, measured: ByLevel, factor: float) -> dict[str, Any]:
    about = {"checkpoint": str(trained.checkpoint), "iteration": trained.iteration}
    probes = measured.bases
    shown = None if probes is None else probes.as_row(factor)
    return about | {"bases": shown} | measured.as_row()
