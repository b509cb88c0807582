"""What mode=diagnose prints, and the page shows, of what it has found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiment.diagnosis.advice import EFFICIENT
from experiment.settings import UNITS
from experiment.uncertainty import uncertain

Found = Mapping[str, Any]


def lines(found: Found) -> list[str]:
    """Everything, line by line."""
    return [*findings(found), "", *overrides(found)]


def findings(found: Found) -> list[str]:
    """All but the proposals."""
    return [
        *found["said"],
        *_training(found),
        "",
        *_units(found),
        *_processes(found),
        *_probes(found),
        *_levels(found["levels"], trained=found["model"] is not None),
        *(model(found) if found["model"] else []),
    ]


def _training(found: Found) -> list[str]:
    if not found["epochs"]:
        return []
    return [f"the training planned sees each sample {found['epochs']:.3g} times"]


def _units(found: Found) -> list[str]:
    units, reach = found["units"], found["reach"]
    exact = reach["low"] == reach["high"]
    span = f"{reach['low']:.4g}" if exact else f"{reach['low']:.4g} to {reach['high']:.4g}"
    return [
        f"in model units: standard deviation {units['std']:.4g} (by coordinate "
        f"{units['smallest_std']:.3g} to {units['largest_std']:.3g}; {units['samples']} samples); "
        f"parameterization.data_std=null becomes {units['data_std']:g}",
        f"largest distance {span} ({'exact' if exact else 'bounds'}, {reach['samples']} samples), "
        f"nearest neighbour {found['nearest']:.3g}: at sigma/alpha below "
        f"{found['nearest'] / 4:.2g} each training sample stands alone",
    ]


def _processes(found: Found) -> list[str]:
    head = (
        f"the prior fits to 1e-4 nats a dimension from sigma/alpha = {found['matched']:.3g} on\n"
        f"  {'process':<12}{'sigma/alpha':>20}  off the prior at the end, nats a dimension"
    )
    rows = [
        f"  {row['name']:<12}{row['first']:>10.2g} -{row['last']:>8.4g}  "
        f"{row['low']:.1e} to {row['high']:.1e}"
        for row in found["processes"]
    ]
    return [head, *rows]


def _probes(found: Found) -> list[str]:
    if found["bases"] is None:
        return [
            "probes: no prediction for one dimension, more than 4096, or fewer than four samples"
        ]
    unit = UNITS[found["metric"]]
    shown = {"predicted for Gaussian data": found["bases"]}
    if found["model"]:
        shown["measured on the model"] = found["model"]["bases"]
    return [
        f"probes, error of one sample by basis, {unit}, one probe an e-fold, {how}: "
        + ", ".join(f"{name} {error:.3g}" for name, error in row["error"].items())
        for how, row in shown.items()
    ]


def _levels(levels: Found, trained: bool) -> list[str]:
    if levels["lasting"] < EFFICIENT:
        return [_too_few(levels, trained)]
    said = (
        f"noise levels, from {levels['of']}: log(sigma/alpha) of mean "
        f"{levels['wanted_mean']:.2f} and std {levels['wanted_std']:.2f}"
    )
    if levels["efficiency"] is not None:
        said += f"; of the objective's own draws {levels['efficiency']:.0%} are put to use"
    return [said]


def _too_few(levels: Found, trained: bool) -> str:
    said = "noise levels: the samples looked at are too few to tell which ones to train on"
    if trained:
        return f"{said}; what is proposed is of the model"
    if not levels["wanted_by_fewer"]:
        return said
    asked = [(levels["wanted_mean"], levels["wanted_std"]), *levels["wanted_by_fewer"]]
    told = "; ".join(f"{mean:.2f}, {std:.2f}" for mean, std in asked)
    return (
        f"{said}; log(sigma/alpha) of mean and std, by all, half and a quarter of them: {told}. "
        "A larger mode.num_samples may tell, or a model (mode=diagnose after training)"
    )


def model(found: Found) -> list[str]:
    """What is to be said of the model."""
    row, unit, factor = found["model"], UNITS[found["metric"]], _factor(found)
    gap = uncertain(factor * row["gap"], factor * row["gap_error"])
    said = [
        "",
        f"{row['checkpoint']}, averaged weights, {row['test_samples']} test and "
        f"{row['train_samples']} training samples at {len(row['clock'])} levels",
        f"test above training error, over all levels: {gap} {unit}",
        *_steepest(row),
    ]
    if row["excess"]:
        above = uncertain(*(factor * value for value in row["excess"]))
        said.insert(3, f"test error above the least possible, over all levels: {above} {unit}")
    return said + _gradients(row) + _drawn(row)


def _factor(found: Found) -> float:
    """The metric for one nat a dimension."""
    return 1 / math.log(2) if found["metric"] == "bits_per_dim" else found["facts"]["dims"]


def _steepest(row: Found) -> list[str]:
    """Where test error is most above that of training, if by two standard errors anywhere."""
    parts = zip(
        row["clock"],
        row["test"],
        row["train"],
        row["test_error"],
        row["train_error"],
        strict=True,
    )
    gaps = [(a - b, math.hypot(x, y), u) for u, a, b, x, y in parts]
    sure = [each for each in gaps if each[0] > 2 * each[1]]
    if not sure:
        return ["at no level is it above by two standard errors"]
    gap, error, u = max(sure)
    return [f"it is most above at sigma/alpha = {math.exp(u):.2g}: by {uncertain(gap, error)}"]


def _gradients(row: Found) -> list[str]:
    if "gradient_norm" not in row:
        return []
    norm = row["gradient_norm"]
    said = (
        f"gradient of one sample's error, root mean square norm of {row['gradient_samples']}: "
        f"from {min(norm):.2g} to {max(norm):.2g}"
    )
    if "gradient_share" in row:
        low, high = _middle(row["clock"], row["gradient_share"])
        said += (
            "; half of its mean square under the objective's draws and weights comes from "
            f"sigma/alpha between {math.exp(low):.2g} and {math.exp(high):.2g}"
        )
    return [said]


def _drawn(row: Found) -> list[str]:
    said = (
        "noise levels, from the least error known, the model's among them: log(sigma/alpha) of "
        f"mean {row['wanted_mean']:.2f} and std {row['wanted_std']:.2f}"
    )
    if "efficiency" in row:
        said += f"; of the draws that it was trained with {row['efficiency']:.0%} were put to use"
    return [said]


def _middle(clock: Sequence[float], share: Sequence[float]) -> tuple[float, float]:
    """The levels at which a quarter and three quarters of ``share`` are reached."""
    total, ends = 0.0, []
    for u, part in zip(clock, share, strict=True):
        total += part
        while len(ends) < 2 and total >= (0.25, 0.75)[len(ends)] - 1e-12:
            ends.append(u)
    return ends[0], ends[1]


def overrides(found: Found) -> list[str]:
    """What to paste, each with its reason; then what fits already."""
    wanted = [row for row in found["advice"] if not row["fits"]]
    fitting = [row for row in found["advice"] if row["fits"]]
    said = []
    if wanted:
        said = ["proposed:", *(f"  {row['override']}   # {row['reason']}" for row in wanted)]
        said += ["to paste: " + " ".join(row["override"] for row in wanted)]
    if fitting:
        kept = ", ".join(f"{row['key']}={_shown(row['given'])}" for row in fitting)
        said += [f"fits as it is: {kept}"]
    return said


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
