"""The samples of a test set under one model: each batch of them becomes a row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiment.class_marginal import log_shares, marginal
from experiment.conditions import score_for, score_of_each
from experiment.data import Dataset
from experiment.seeds import sample_streams
from experiment.settings import CONDS, Likelihood, chosen, per_nat, units_of
from likelihood import (
    Dequantization,
    FixedGrid,
    LogLikelihood,
    Pilot,
    Standardization,
    importance_weighted,
    log_likelihood,
)
from likelihood.dequantize import Drawn
from likelihood.divergence import Divergence
from likelihood.importance import noise_bias
from likelihood.solvers import Solver
from score_models import ScoreModel
from sde_lib import PerSample, ProbabilityFlow, probability_flow
from sde_lib.samplers import SamplingError

COLUMNS = (
    "per_sample",
    "probe_error",
    "dequantization_error",
    "effective_draws",
    "solver_error",
    "truncation",
    "prior_mismatch",
)


@dataclass(frozen=True)
class Scoring:
    """How the samples of a test set are scored.

    Attributes:
        flow: From data to prior; its row i has the condition of sample i, or, where classes are
            summed over, is of class i.
        data: Its test part is scored.
        settings: What was asked for.
        seed: Of dequantization and probes.
        units: Between data and what the flow is of.
        solver: That of the settings, or of their budget.
        divergence: Likewise.
        planned: Forward passes of one sample that choosing them took.
        shares: log p(c) where classes are summed over, [C]; else None.
        device: Of the model.
    """

    flow: ProbabilityFlow
    data: Dataset
    settings: Likelihood
    seed: int
    units: Dequantization | Standardization
    solver: Solver
    divergence: Divergence
    planned: int
    shares: Tensor | None
    device: torch.device

    @classmethod
    def of(
        cls,
        model: ScoreModel,
        data: Dataset,
        settings: Likelihood,
        seed: int,
        dequantization: Dequantization | None,
    ) -> Scoring:
        """That of ``data`` under ``model``, with arguments as of :func:`evaluate`."""
        if settings.cond == "marginal":
            shares, score = log_shares(data), score_of_each(model, data)
        else:
            count = settings.count(data)
            shares, score = None, score_for(model, data, "test", count, settings.cond)
        units = units_of(data, settings, dequantization)
        flow = probability_flow(model.sde, score)
        flow = replace(flow, t_start=units.start_time(model.sde))
        device = next(model.parameters()).device
        solver, divergence, planned = chosen(flow, data, settings, device)
        return cls(flow, data, settings, seed, units, solver, divergence, planned, shares, device)

    @property
    def draws(self) -> int:
        """Dequantizations of a sample."""
        return 1 if self.data.levels is None else self.settings.draws

    def row(self, rows: range) -> dict[str, Any]:
        """What these samples come to, in the unit of the metric, on the CPU.

        Where a solver gave up, ``failure`` says why, and the samples concerned are NaN.
        """
        values = self.data.test[rows.start : rows.stop].repeat_interleave(self.draws, 0)
        indices = range(rows.start * self.draws, rows.stop * self.draws)
        streams = sample_streams(self.seed, "likelihood", indices, self.device)
        drawn = self.units.draw(values.to(self.device), streams, sde=self.flow.sde)
        posterior, failure = None, None
        try:
            result, posterior = self._solve(drawn.x, indices, streams)
        except SamplingError as error:  # of one class alone nothing follows
            result, failure = error.partial if self.shares is None else None, str(error)
        if result is None:
            return _lost(len(rows), failure)
        row = _row(result, drawn, per_nat(self.data), self.draws, self.settings.importance)
        if self.flow.t_start is not None:
            row["truncation"] = torch.full_like(row["truncation"], math.nan)
        return row | {"failure": failure, "posterior": posterior}

    def _solve(
        self, x: Tensor, indices: range, streams: PerSample
    ) -> tuple[LogLikelihood, Tensor | None]:
        """The likelihood of ``x``, and log p(c | x) where classes are summed over."""
        how = {"solver": self.solver, "divergence": self.divergence}
        if self.shares is None:
            own = self.flow.for_rows(torch.tensor(indices, device=self.device) // self.draws)
            return log_likelihood(own, x, generator=streams, **how), None

        def under(own: ProbabilityFlow) -> LogLikelihood:
            # the same probes for all classes
            same = sample_streams(self.seed, "probes of classes", indices, self.device)
            return log_likelihood(own, x, generator=same, **how)

        return marginal(self.flow, self.shares, under)

    def how(self) -> str:
        """What was used, in words, with the basis that the pilot chose."""
        divergence = self.divergence
        if isinstance(self.solver, FixedGrid):
            like = torch.empty(1, *self.data.shape, device=self.device)
            divergence = Pilot.of(self.flow, like, divergence).divergence
        units = self.units if self.data.levels else "continuous"
        weighed = ", weighed by importance" if self.settings.importance else ""
        cond = f"; {CONDS[self.settings.cond]}" if self.data.cond is not None else ""
        return f"{self.solver}, {divergence}; {units}, {self.draws} draw(s){weighed}{cond}"


def _row(
    result: LogLikelihood, drawn: Drawn, unit: float, draws: int, importance: bool
) -> dict[str, Any]:
    """One batch in the unit of the metric, the draws of a sample put together, on the CPU."""

    def by_sample(values: Tensor) -> Tensor:
        return values.cpu().double().reshape(-1, draws)

    nats = by_sample(drawn.bound(result.log_prob.double()))
    nats = nats.masked_fill(~torch.isfinite(nats), math.nan)
    probes = by_sample(result.standard_error)
    spread = nats.std(1) if draws > 1 else torch.full((len(nats),), math.nan).double()
    value, spread = nats.mean(1), spread / draws**0.5
    share = torch.full((len(nats), draws), 1 / draws, dtype=torch.float64)
    effective = torch.full((len(nats),), float(draws), dtype=torch.float64)
    if importance:
        good = (nats + probes).isfinite().all(1)
        value[~good] = math.nan
        if bool(good.any()):
            weighted = importance_weighted(nats[good].T)
            # noise in the exponent lifts the mean of exponentials: what the probes add is off
            value[good] = weighted.log_prob - noise_bias(probes[good].T, nats[good].T)
            spread[good], effective[good] = weighted.standard_error, weighted.effective_sample_size
            share = nats.softmax(1)
    return {
        "per_sample": -value * unit,
        "probe_error": (share * probes).square().sum(1).sqrt() * unit,
        "dequantization_error": spread * unit,
        "effective_draws": effective,
        "solver_error": by_sample(result.solver_error).mean(1) * unit,
        "truncation": -by_sample(result.truncation).mean(1) * unit,
        "prior_mismatch": -by_sample(result.prior_mismatch).mean(1) * unit,
        "nfe": result.nfe * draws,
        "passes": result.passes * draws,
        "pilot_nfe": result.pilot_nfe,
        "clock": result.clock.cpu(),
        "information": result.information().T.cpu().double() * unit,
    }


def _lost(count: int, failure: str) -> dict[str, Any]:
    """A batch of ``count`` samples of which a solver said nothing before it gave up."""
    unknown = torch.full((count,), math.nan, dtype=torch.float64)
    nothing = {"nfe": 0, "passes": 0, "pilot_nfe": 0, "clock": torch.empty(0)}
    empty = {"information": torch.empty(count, 0), "failure": failure, "posterior": None}
    return {name: unknown for name in COLUMNS} | nothing | empty
