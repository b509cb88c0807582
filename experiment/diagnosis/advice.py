"""Settings that the data ask for, each with its reason, as overrides that can be pasted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from experiment.diagnosis.facts import Facts, Lattice
from experiment.diagnosis.levels import Wanted
from experiment.diagnosis.probes import Bases
from experiment.diagnosis.spread import Distance, PriorFit

EFFICIENT = 0.9  # share of draws put to use from which a density of levels fits
NEAR = 2.0  # ratio up to which a sigma_max is as good as another
SPREAD_OFF = 0.1  # of the standard deviation of the data, that data_std may be off


@dataclass(frozen=True)
class Advice:
    """One setting.

    Attributes:
        key: What to set, as on the command line.
        value: What to.
        reason: Why.
        given: What it is.
        fits: Whether that will do.
    """

    key: str
    value: Any
    reason: str
    given: Any
    fits: bool

    @property
    def override(self) -> str:
        """As it is pasted."""
        return f"{self.key}={'null' if self.value is None else self.value}"

    def as_row(self) -> dict[str, Any]:
        """What goes into a JSON file."""
        return asdict(self) | {"override": self.override}


def sigma_max(sde: Mapping[str, Any], reach: Distance, prior: PriorFit) -> Iterator[Advice]:
    """For a process with such a setting: the largest distance, or more if the prior wants it."""
    if "sigma_max" not in sde:
        return
    matched = prior.matched()
    value, given = _rounded(max(reach.low, matched)), float(sde["sigma_max"])
    yield Advice(
        "sde.sigma_max",
        value,
        f"the largest distance of two samples is {reach}, and from {matched:.3g} on the prior is "
        "less than 1e-4 nats a dimension off the noised data",
        given,
        value / NEAR <= given <= value * NEAR,
    )


def levels(objective: Mapping[str, Any], wanted: Wanted, efficiency: float) -> Iterator[Advice]:
    """For an objective whose log(sigma/alpha) is normal: its mean and standard deviation."""
    times = objective.get("times") or {}
    if not {"mean", "std"} <= times.keys():
        return
    fits = efficiency >= EFFICIENT
    reason = (
        f"puts training where the data are neither hidden nor plain; of the draws of "
        f"mean {times['mean']:g} and std {times['std']:g}, {efficiency:.0%} are put to use"
    )
    for name, value in (("mean", wanted.mean), ("std", wanted.std)):
        yield Advice(f"objective.times.{name}", round(value, 2), reason, times[name], fits)


def data_std(parameterization: Mapping[str, Any], measured: float) -> Iterator[Advice]:
    """Null, which takes what is measured, where another number was given."""
    given = parameterization.get("data_std")
    if "data_std" not in parameterization:
        return
    fits = given is None or abs(given / measured - 1) <= SPREAD_OFF
    reason = (
        f"null takes what is measured, {measured:g}: the network's input is then of unit variance"
    )
    yield Advice("parameterization.data_std", None, reason, given, fits)


def basis(likelihood: Mapping[str, Any], found: Bases | None, predicted: bool) -> Iterator[Advice]:
    """The basis of the probes, where the likelihood draws any.

    Args:
        likelihood: Its settings.
        found: The noise of probes by basis.
        predicted: Whether for Gaussian data, which is not enough to choose principal axes by.
    """
    if "basis" not in likelihood or found is None:
        return
    ratios = ", ".join(f"{name} {ratio:.2g}" for name, ratio in found.ratios.items())
    how = "predicted for Gaussian data" if predicted else "measured on the model"
    value, given = "auto" if predicted else found.best, likelihood["basis"]
    reason = f"variance of a probe against that in pixels, {how}: {ratios}" + (
        "; auto tries pixels and cosines on the model" if value == "auto" else ""
    )
    yield Advice("likelihood.basis", value, reason, given, given in (value, found.best))


def data_levels(data: Mapping[str, Any], facts: Facts, values: Lattice) -> Iterator[Advice]:
    """K, where the data's own file says it, all samples were looked at, and fewer would do."""
    used = round(values.high) + 1
    if facts.levels is None or "levels" not in data or facts.looked_at != facts.sizes:
        return
    reason = f"the largest value is {used - 1}; model units change with it: ask again then"
    yield Advice("data.levels", max(2, used), reason, facts.levels, used > facts.levels / 2)


def about_values(facts: Facts, values: Lattice) -> list[str]:
    """What is to be said of the values: levels, gaps, floats that lie on steps."""
    if values.distinct is None:
        return ["values: more than 65536 distinct ones, no levels"]
    span = f"{values.distinct} distinct ones from {values.low:g} to {values.high:g}"
    if facts.levels is None:
        return [f"values: {span}{_quantised(values)}"]
    said = f"values: {span}, of {facts.levels} levels"
    if values.step is not None and values.step > 1:
        said += (
            f"; only every {values.step:g}th from {values.low:g} on is used: dividing by that "
            f"leaves {values.levels} levels and the same bits/dim"
        )
    return [said]


def _quantised(values: Lattice) -> str:
    if values.step is None:
        return ""
    return (
        f", all on steps of {values.step:.6g}: a density of these grows without bound. Save "
        f"round((x - {values.low:g}) / {values.step:.6g}) as integers and give "
        f"levels={values.levels}, so that they are dequantized"
    )


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
