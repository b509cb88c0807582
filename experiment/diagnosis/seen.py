"""A data set as mode=diagnose has seen it, and the error curves that need no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from experiment.batches import trained_units
from experiment.data import Dataset
from experiment.diagnosis.facts import Coordinates, Facts, Lattice, facts, lattice
from experiment.diagnosis.floor import known_floor, without_gaps
from experiment.diagnosis.levels import (
    KERNEL_NUMBERS,
    QUERIES,
    QUERY_NUMBERS,
    REFERENCE,
    Curve,
    gaussian_curve,
    levels_for,
    simple_curve,
    with_more_samples,
)
from experiment.diagnosis.samples import Part, Units
from experiment.diagnosis.spectrum import Spectrum
from experiment.diagnosis.spread import (
    Distance,
    PriorFit,
    largest_distance,
    nearest_distance,
)
from experiment.seeds import stream

FEWEST = 16  # samples; of fewer, halves of Gaussian data agree by chance on what is far off
BY_DIMENSION = 2  # samples; fewer see no axis, nor does a half, and agree on what none sees


@dataclass(frozen=True)
class Seen:
    """A data set and the units of its model; what follows is worked out when it is asked for.

    Args:
        data: The data set.
        train: Its training part.
        test: Its test part.
        units: Those that a model is trained in, spread over bins if it is.
        centres: The same units at the middle of bins.
        num_samples: Training samples for the covariance and what follows from it.
        seed: Of what is drawn.
    """

    data: Dataset
    train: Part
    test: Part
    units: Units
    centres: Units
    num_samples: int
    seed: int

    @classmethod
    def of(
        cls, data: Dataset, training: Mapping[str, Any], scan: int, num_samples: int, seed: int
    ) -> Seen:
        """``data`` as a model of these ``training`` settings would have it."""
        train, test = (
            Part(name, samples, data.shape, scan, seed)
            for name, samples in (("train", data.train), ("test", data.test))
        )
        units = trained_units(training, data)
        centres = trained_units({"dequantize": False}, data)
        return cls(data, train, test, units, centres, num_samples, seed)

    @cached_property
    def coordinates(self) -> Coordinates:
        """Of the training samples looked at."""
        return Coordinates.of(self.train, self.centres)

    @cached_property
    def radii(self) -> Tensor:
        """Distances of these from their mean, [N]."""
        return self.coordinates.radii(self.train, self.centres)

    @cached_property
    def facts(self) -> Facts:
        """What was counted."""
        return facts(self.data, self.train, self.test, self.coordinates, self.radii)

    @cached_property
    def values(self) -> Lattice:
        """The values of its numbers."""
        return lattice(self.train, self.test)

    @cached_property
    def reach(self) -> Distance:
        """Largest distance of two training samples."""
        return largest_distance(self.train, self.centres, self.coordinates, self.radii)

    @cached_property
    def nearest(self) -> float:
        """Median distance of a training sample from the nearest other one."""
        return nearest_distance(self.train, self.centres, 2 * QUERIES)

    @cached_property
    def some(self) -> Tensor:
        """Training samples in model units, [N, D] float64."""
        return self.train.some(self.num_samples, self.units)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Variances along principal axes."""
        return Spectrum.of(self.some)

    @property
    def prior(self) -> PriorFit:
        """How far the noised data are from a prior."""
        return PriorFit(self.spectrum.mean, self.spectrum.variances, self.spectrum.shares)

    @cached_property
    def curves(self) -> Curves:
        """Errors against the noise level."""
        return Curves.of(self)


@dataclass(frozen=True)
class Curves:
    """Errors against the noise level, on levels that hold all scales of the data.

    Attributes:
        gaussian: Of the best linear denoiser.
        best: The least that is known: the floor itself where the density of the data is known,
            else that of simple denoisers.
        floor: The least possible, where it is known.
        fewer: The same as ``best`` of a half and of a quarter of the samples; none where it is
            not needed, or where there are too few samples.
    """

    gaussian: Curve
    best: Curve
    floor: Tensor | None
    fewer: tuple[Curve, ...]

    @classmethod
    def of(cls, seen: Seen) -> Curves:
        """Those of a data set."""
        spectrum = seen.spectrum
        clock = levels_for(spectrum.variances, _finest(seen))
        gaussian = _linear(spectrum, clock)
        floor = known_floor(seen.data, clock)
        if floor is not None:
            return cls(gaussian, Curve(clock, without_gaps(floor, clock), "the data"), floor, ())
        best = _simple(seen, gaussian, seen.some)
        count, dims = seen.some.shape
        enough = count >= max(FEWEST, BY_DIMENSION * dims)
        parts = [seen.some[::2], seen.some[::4]] if enough else []
        fewer = (_simple(seen, _linear(Spectrum.of(few), clock), few) for few in parts)
        return cls(gaussian, best, None, tuple(fewer))

    @property
    def lasting(self) -> float:
        """What share of its draws the density will put to use if many more samples are seen.

        It is 1 where the density of the data is known, 0 where nothing can be said.
        """
        if self.floor is not None:
            return 1.0
        if not self.fewer or not all(curve.falls for curve in self.fewer):
            return 0.0
        wanted = self.best.wanted()
        half, quarter = (wanted.efficiency(each.wanted().density) for each in self.fewer)
        return with_more_samples(half, quarter)


def _linear(spectrum: Spectrum, clock: Tensor) -> Curve:
    return gaussian_curve(spectrum.variances, clock, spectrum.shares)


def _simple(seen: Seen, gaussian: Curve, samples: Tensor) -> Curve:
    """Error of simple denoisers that have seen these training ``samples``, on test samples."""
    dims = samples.shape[1]
    count = min(REFERENCE, max(2, KERNEL_NUMBERS // dims), len(samples))
    # evenly over all of them: data may be in the order of their classes
    reference = samples[torch.linspace(0, len(samples) - 1, count).long()]
    queries = seen.test.some(max(QUERIES, QUERY_NUMBERS // dims), seen.units, "queries")
    generator = stream(seen.seed, "diagnose kernel", 0)
    return simple_curve(gaussian, reference, queries, generator)


def _finest(seen: Seen) -> float:
    """A length below which the samples hold no structure that could be learnt."""
    return seen.nearest / seen.train.dims**0.5
