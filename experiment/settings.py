"""How to evaluate a likelihood: what is asked for, and what that means for given data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiment import metrics
from experiment.batches import trained_units
from experiment.conditions import refuse_no_null
from experiment.data import Dataset
from experiment.data.samples import first_rows
from experiment.progress import say
from likelihood import (
    Basis,
    Cosine,
    Dequantization,
    Divergence,
    FixedGrid,
    Pixel,
    Principal,
    Solver,
    Standardization,
    plan,
    suited,
)
from sde_lib import ProbabilityFlow, validation
from sde_lib.samplers import SamplingError

UNITS = {name.removeprefix("eval/"): unit for name, unit in metrics.UNITS.items()}
CONDS = {
    "own": "each under its own condition",
    "none": "without condition",
    "marginal": "marginal over all classes",
}
DEQUANTIZATIONS = ("uniform", "truncated_normal", "variational")


@dataclass(frozen=True)
class Likelihood:
    """How to evaluate a likelihood.

    Args:
        solver: :class:`likelihood.FixedGrid` or :class:`likelihood.Adaptive`; 64 fixed nodes if
            not given.
        divergence: Exact or Hutchinson; chosen by the number of dimensions if not given.
        basis: Where probes are drawn: auto (pixels or cosines, by a pilot), pixel, cosine, or
            principal (axes of the training data).
        budget: Wanted error of one sample, probes and solver together, in the unit of the metric
            (bits/dim of K-level data, nats of others); nodes and probes are then chosen, and those
            of ``solver`` and ``divergence`` are not used.
        batch_size: Samples solved together; halved where memory runs out.
        draws: Dequantizations of each sample that are averaged; continuous data need one.
        dequantization: uniform, truncated_normal (for a model trained on bin centres, see
            ``training.dequantize``) or variational (a small flow, fitted once to the model).
        importance: Whether the draws are combined by their importance weights, which tightens
            the bound, instead of averaged.
        bounds: T; the ELBO and the bound of the model in T steps are then computed beside the
            likelihood; null: they are not.
        max_samples: Evaluate only so many of the test set; all if null.
        cond: Of a conditional model: own scores each sample under its own condition, log p(x | c);
            none without it; marginal sums over all classes, each a likelihood of its own,
            and tells their posterior.
    """

    solver: Solver | None = None
    divergence: Divergence | None = None
    basis: str = "auto"
    budget: float | None = None
    batch_size: int = 128
    draws: int = 1
    dequantization: str = "uniform"
    importance: bool = False
    bounds: int | None = None
    max_samples: int | None = None
    cond: str = "own"

    def __post_init__(self) -> None:
        for name in ("batch_size", "draws"):
            object.__setattr__(
                self, name, validation.count("likelihood", name, getattr(self, name))
            )
        validation.choice("likelihood", "basis", self.basis, BASES)
        validation.choice("likelihood", "cond", self.cond, CONDS)
        if self.cond == "marginal" and self.bounds is not None:
            raise ValueError(
                "likelihood.bounds are of one condition, and likelihood.cond=marginal sums over "
                "all: of noisy bounds that is none. Take likelihood.cond=own or leave out bounds."
            )
        validation.choice("likelihood", "dequantization", self.dequantization, DEQUANTIZATIONS)
        if validation.flag("likelihood", "importance", self.importance) and self.draws < 2:
            raise ValueError(
                f"likelihood needs draws >= 2 to weigh them by importance; got draws={self.draws}."
            )
        if self.bounds is not None:
            steps = validation.count("likelihood", "bounds", self.bounds, at_least=2)
            object.__setattr__(self, "bounds", steps)
        if self.budget is not None:
            validation.real("likelihood", "budget", self.budget, above=0)
        if self.max_samples is not None:
            count = validation.count("likelihood", "max_samples", self.max_samples, at_least=2)
            object.__setattr__(self, "max_samples", count)

    def check(
        self,
        data: Dataset,
        *,
        on_centres: bool | None = None,
        label_dropout: float | None = None,
    ) -> None:
        """Refuse what would be ignored, or be wrong, for this ``data`` and model.

        Args:
            data: What is to be scored.
            on_centres: Whether the model was trained on the centres of the bins; None if that is
                not known.
            label_dropout: Of its training; None if that is not known.

        Raises:
            ValueError: Naming the setting.
        """
        self._check_cond(data, label_dropout)
        asked = {
            "draws": (self.draws, 1),
            "importance": (self.importance, False),
            "dequantization": (self.dequantization, "uniform"),
        }
        for name, (value, usual) in asked.items():
            if data.levels is None and value != usual:
                raise ValueError(
                    f"likelihood.{name}={str(value).lower()} is about data of K levels; "
                    f"{data.name} is continuous and needs no dequantization. Leave it out."
                )
        if self.dequantization == "truncated_normal" and on_centres is False:
            raise ValueError(
                "likelihood.dequantization=truncated_normal is for a model that was trained on "
                "the centres of the bins; this one was trained on points spread over them, which "
                "costs 0.56 bits/dim. Train with training.dequantize=false, or take uniform."
            )
        divergence = self.divergence or suited(data.shape)
        like = torch.empty(1, *data.shape)
        unknown = divergence.random and divergence.passes(like) == 1 and self._keeps_probes
        if self.importance and unknown and self.budget is None:
            raise ValueError(
                "likelihood.importance=true needs to know the noise of the probes, which one kept "
                "along the path cannot tell. Take likelihood.divergence.num_probes=2."
            )

    def _check_cond(self, data: Dataset, label_dropout: float | None) -> None:
        if self.cond != "own" and data.cond is None:
            raise ValueError(
                f"likelihood.cond={self.cond} is for a conditional model, and {data.name} comes "
                "without conditions. Leave it out, or use one of data.conditional=true."
            )
        if self.cond == "marginal":
            data.cond.each("likelihood.cond=marginal")
        if self.cond == "none" and label_dropout is not None:
            refuse_no_null("likelihood.cond=none", label_dropout)

    @property
    def _keeps_probes(self) -> bool:
        solver = self.solver or FixedGrid()
        return not (isinstance(solver, FixedGrid) and solver.fresh)

    def count(self, data: Dataset) -> int:
        """Samples of the test part of ``data`` that are scored."""
        return min(self.max_samples or len(data.test), len(data.test))

    def quick(self, most: int) -> Likelihood:
        """The same on at most ``most`` samples and no finer than a curve needs."""
        return replace(
            self,
            solver=(self.solver or FixedGrid()).quick(),
            budget=None,
            draws=1,
            importance=False,
            bounds=None,
            dequantization=self.dequantization.replace("variational", "uniform"),
            max_samples=min(most, self.max_samples or most),
        )

    def __str__(self) -> str:
        divergence = self.divergence or "exact up to 16 dimensions, else Hutchinson"
        if self.budget is not None:
            return f"planned for a standard error of {self.budget:g} a sample, basis {self.basis}"
        return f"{self.solver or FixedGrid()}, {divergence}, basis {self.basis}"


BASES: dict[str, Callable[[tuple[int, ...], Callable[[], Tensor]], Basis | None]] = {
    "auto": lambda shape, train: None,
    "pixel": lambda shape, train: Pixel(),
    "cosine": lambda shape, train: Cosine(len(shape)),
    "principal": lambda shape, train: Principal.of(train()),
}


def chosen(
    flow: ProbabilityFlow, data: Dataset, settings: Likelihood, device: torch.device
) -> tuple[Solver, Divergence, int]:
    """Solver and divergence, those of the budget if there is one, and the forward passes of one
    sample that planning them took."""
    like = torch.empty(1, *data.shape, device=device)
    solver = settings.solver or FixedGrid()
    divergence = settings.divergence or suited(data.shape)

    def train() -> Tensor:
        some = first_rows(data.train, 20_000)
        return data.units.encode(some, torch.Generator().manual_seed(0))

    basis = BASES[settings.basis](data.shape, train)
    if basis is not None:
        divergence = divergence.in_basis(basis)
    if settings.budget is None:
        return solver, divergence, 0
    passes = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal passes
        passes += len(x)
        return flow.score(x, t)

    planned = replace(flow, score=counted)
    nats = settings.budget / per_nat(data)
    wanted = f"{settings.budget:g} {UNITS[data.units.metric]} ({nats:.3g} nats) a sample"
    try:
        found = plan(planned, like, nats, divergence=divergence)
    except (ValueError, SamplingError) as error:
        raise ValueError(f"likelihood.budget, {wanted}: {error}") from error
    flow.memory.update(planned.memory)
    say(f"for a standard error of {wanted}: {found[0]}, {found[1]}")
    return *found, passes


def units_of(
    data: Dataset, settings: Likelihood, dequantization: Dequantization | None
) -> Dequantization | Standardization:
    """What turns test samples into points of the model: the dequantization asked for, if any."""
    if data.levels is None or dequantization is not None:
        return dequantization or data.units
    if settings.dequantization == "variational":
        raise ValueError("a variational dequantization is fitted first and then passed on.")
    return trained_units({"dequantize": settings.dequantization == "uniform"}, data)


def per_nat(data: Dataset) -> float:
    """What a nat of one sample is in the metric."""
    return 1.0 if data.levels is None else 1 / (math.prod(data.shape) * math.log(2))
