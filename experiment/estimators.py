"""Three estimates of one likelihood, side by side: the ODE, the ELBO, and the bound in T steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiment.conditions import score_for
from experiment.data import Dataset
from experiment.evaluation import Evaluation, in_batches
from experiment.progress import say
from experiment.seeds import sample_streams, stream
from experiment.settings import UNITS, Likelihood, per_nat, units_of
from likelihood import (
    BinDecoder,
    DensityDecoder,
    Dequantization,
    TruncatedNormalDequantization,
    calibrate_variance,
    continuous_bound,
    discrete_bounds,
    ordered,
    rate_distortion,
)
from likelihood.bounds import DiscreteBound
from likelihood.comparison import RateDistortion
from score_models import ScoreModel
from sde_lib import ProbabilityFlow, probability_flow
from sde_lib.reverse_variance import ReverseVariance

CALIBRATION = 512  # training samples from which the analytic variance is measured


@dataclass(frozen=True)
class Estimates:
    """The same weights, the same test samples, three ways to their likelihood.

    Attributes:
        metric: bits_per_dim or nll; all values are costs, lower is better.
        values: Mean and standard error over samples, by name.
        per_sample: What they are the mean of, [N] each.
        order: Whether ODE, ELBO and bound come in the order that is expected of them.
        curve: Rate and distortion of progressive coding with the analytic variance.
        steps: T.
    """

    metric: str
    values: Mapping[str, tuple[float, float]]
    per_sample: Mapping[str, Tensor]
    order: str
    curve: RateDistortion
    steps: int

    def as_row(self) -> dict[str, Any]:
        """For a JSON file."""
        curve = {
            name: getattr(self.curve, name).tolist()
            for name in ("rate", "rate_error", "distortion", "distortion_error", "times")
        }
        return {
            "metric": self.metric,
            "steps": self.steps,
            "values": dict(self.values),
            "order": self.order,
            "rate_distortion": curve,
        }


@torch.no_grad()
def estimate(
    model: ScoreModel,
    data: Dataset,
    settings: Likelihood,
    ode: Evaluation,
    *,
    seed: int,
    dequantization: Dequantization | None = None,
    learned: ReverseVariance | None = None,
) -> Estimates:
    """ELBO and T-step bounds of the samples that ``ode`` is of.

    K-level data are dequantized for the ELBO as for the ODE, and it ends with a density; the
    T-step bounds end with the mass of the bin. A model that was trained on the centres of the bins
    has no density between them: there both score the centres, from noise of half a bin on, and end
    with the mass of the bin.

    Args:
        model: In evaluation mode.
        data: Its test part; the training part calibrates the analytic variance.
        settings: ``bounds`` is T.
        ode: The likelihood by the probability flow.
        seed: Of all randomness.
        dequantization: That of ``ode``, where it had to be made.
        learned: The learned variance of the model, if it has one.
    """
    device, steps = next(model.parameters()).device, settings.bounds
    flow = probability_flow(
        model.sde, score_for(model, data, "test", ode.num_samples, settings.cond)
    )
    units = units_of(data, settings, dequantization)
    centres = isinstance(units, TruncatedNormalDequantization)
    encode = units.encode if centres else data.units.encode  # as in training
    train = encode(data.train[:CALIBRATION], stream(seed, "calibrate", 0)).to(device)
    seen = score_for(model, data, "train", len(train), settings.cond)
    times = bound_times(flow, data, steps)
    analytic = calibrate_variance(
        probability_flow(model.sde, seen),
        train,
        times=times,
        generator=stream(seed, "calibrate", 1),
        batch_size=settings.batch_size,
    )
    decoder = DensityDecoder() if data.levels is None else BinDecoder(data.units)
    if centres:
        flow = replace(flow, t_start=float(times[0]))
    last = decoder if centres else DensityDecoder()
    variances = {"posterior": "posterior", "forward": "forward", "analytic": analytic}
    variances |= {} if learned is None else {"learned": learned}

    def solve(rows: range) -> dict[str, Tensor]:
        def streams(purpose: str) -> Any:  # noqa: ANN401
            return sample_streams(seed, purpose, rows, device)

        values = data.test[rows.start : rows.stop].to(device)
        drawn = None if centres else units.draw(values, streams("bounds"), sde=model.sde)
        x = encode(values) if drawn is None else drawn.x
        own = flow.for_rows(rows)
        elbo = continuous_bound(own, x, decoder=last, generator=streams("elbo")).log_prob
        found = {"ELBO": elbo if drawn is None else drawn.bound(elbo)}
        bounds = discrete_bounds(
            own, x, variances, times=times, decoder=decoder, generator=streams("vlb")
        )
        for name, result in bounds.items():
            nats = result.log_prob if data.levels else drawn.bound(result.log_prob)
            found[f"VLB, {name} variance"] = nats
        best = bounds["analytic"]
        found |= {
            "terms": best.terms.T,
            "distortion": best.distortion.T,
            "times": best.times[None],
        }
        return {name: value.cpu().double() for name, value in found.items()}

    rows = in_batches(solve, ode.num_samples, settings.batch_size, "bounds")
    found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return _estimates(found, data, ode, steps)


def bound_times(flow: ProbabilityFlow, data: Dataset, steps: int) -> Tensor:
    """T + 1 times, even in log(sigma/alpha), from noise of half a bin on for K-level data.

    A finer level would spend bits on where in its bin a point lies, which no decoder asks for.
    """
    low, high = flow.clock_range()
    if data.levels is not None:
        low = max(low, math.log(data.units.bin_width / 2))
    return flow.level_at(torch.linspace(low, high, steps + 1, dtype=torch.float64)).t


def _estimates(found: dict[str, Tensor], data: Dataset, ode: Evaluation, steps: int) -> Estimates:
    """Means, their order and the rate-distortion curve from the nats of each sample."""
    dims = math.prod(data.shape)
    in_metric = per_nat(data)
    terms, distortion = found.pop("terms"), found.pop("distortion")
    times = found.pop("times")[0]
    nats = {"probability-flow ODE": -ode.per_sample / in_metric, **found}
    costs = {name: -value * in_metric for name, value in nats.items()}
    values = {
        name: (float(cost.mean()), float(cost.std() / len(cost) ** 0.5))
        for name, cost in costs.items()
    }
    blank = torch.zeros(len(terms), dtype=torch.float64)
    bound = DiscreteBound(blank, blank, terms.T, distortion.T, times, 0)
    unit = 1.0 if data.levels is None else 1 / data.units.bin_width
    order = ordered(nats["probability-flow ODE"], nats["ELBO"], nats["VLB, posterior variance"])
    curve = rate_distortion(bound, dims, unit)
    return Estimates(ode.metric, values, costs, str(order), curve, steps)


def show_estimates(estimates: Estimates) -> None:
    """Print them side by side."""
    say(f"three estimates of one likelihood ({UNITS[estimates.metric]}, T = {estimates.steps}):")
    for name, (value, error) in estimates.values.items():
        say(f"    {name:<24} {value:.4f} ± {error:.4f}")
    say("their differences in log p, the VLB with the posterior variance:")
    for line in estimates.order.splitlines():
        say(f"    {line}")
