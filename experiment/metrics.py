"""The names under which a run tells how it goes: units and sections, for all who show them.

One prefix is one section of a view that sorts by itself; ``section`` is for those that can be laid
out. The record holds what is measured; the limits of a band are made for the views alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LOSS, LIKELIHOOD, SAMPLES, SPEED = "Loss", "Likelihood", "Samples", "Speed and memory"
SECTIONS = (LOSS, LIKELIHOOD, SAMPLES, SPEED)
STDERR = "_stderr"


@dataclass(frozen=True)
class Metric:
    """One number of an iteration.

    Args:
        name: Key in the record and in every tracker.
        section: Where it is shown.
        title: What it is, for the head of a chart.
        unit: Of its values; empty for a plain number.
        estimate: Whether its standard error comes with it, under ``name + "_stderr"``.
    """

    name: str
    section: str
    title: str
    unit: str = ""
    estimate: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All keys of the record that belong to it."""
        return (self.name, self.name + STDERR) if self.estimate else (self.name,)

    @property
    def series(self) -> tuple[str, ...]:
        """The lines of its chart: the value and, of an estimate, one standard error each way."""
        return (self.name, *_limits(self.name)) if self.estimate else (self.name,)


@dataclass(frozen=True)
class Picture:
    """A picture of an iteration."""

    name: str
    section: str
    title: str


@dataclass(frozen=True)
class Curve:
    """A whole curve, drawn anew each time; ``x`` and ``y`` are the labels of its axes."""

    name: str
    section: str
    title: str
    x: str
    y: str


NUMBERS = (
    Metric("train/loss", LOSS, "Training loss, as optimised"),
    Metric("train/grad_norm", LOSS, "Norm of the gradient, before clipping"),
    Metric("train/clipped", LOSS, "Iterations whose gradient was clipped", "share"),
    Metric("train/lr", LOSS, "Learning rate"),
    Metric("train/skipped", LOSS, "Batches passed over, their loss not finite", "batches"),
    Metric("train/loss_scale", LOSS, "Factor on the loss, for float16"),
    Metric("eval/bits_per_dim", LIKELIHOOD, "Test set, discrete data", "bits/dim", estimate=True),
    Metric("eval/nll", LIKELIHOOD, "Test set, continuous data", "nats", estimate=True),
    Metric("eval/nfe", LIKELIHOOD, "Network evaluations of that likelihood", "evaluations"),
    Metric("perf/images_per_s", SPEED, "Training speed", "samples/s"),
    Metric("perf/memory_gb", SPEED, "Peak memory of the device", "GB"),
    Metric("perf/waiting", SPEED, "Time spent waiting for data", "share"),
)
PICTURES = (
    Picture("samples/grid", SAMPLES, "Samples of the averaged model"),
    Picture("compare", SAMPLES, "Samplers by what they cost"),
    Picture("averages", LIKELIHOOD, "Likelihood by width of the average"),
)
CURVES = (Curve("diagnose/loss", LOSS, "Loss against noise level", "sigma/alpha", "loss"),)
UNITS = {metric.name: metric.unit for metric in NUMBERS if metric.estimate}


def curve_named(name: str) -> Curve:
    """The curve of that name; of one that is not listed, its name is its title too."""
    return next((c for c in CURVES if c.name == name), Curve(name, LOSS, name, "x", "y"))


def with_limits(values: Mapping[str, float]) -> dict[str, float]:
    """``values`` and, for each that comes with its standard error, one of those down and up.

    Three lines are the band that every view can draw: wandb shades only the spread of a group of
    runs, and a margin chart of TensorBoard wants its two limits as series.
    """
    limits = {}
    for key, error in values.items():
        name = key.removesuffix(STDERR)
        if name != key and name in values:
            low, high = _limits(name)
            limits |= {low: values[name] - error, high: values[name] + error}
    return {**values, **limits}


def _limits(name: str) -> tuple[str, str]:
    return f"{name}_low", f"{name}_high"
