"""The variances of a reverse step compared: what they cost in the bound, and how they sample.

python benchmarks/variances.py                    mixtures of 2 and 32 dimensions, exact scores
python benchmarks/variances.py mixture2           one of them
python benchmarks/variances.py digits --checkpoint runs/digits-vp-unet/checkpoints/step-N.pt

All have eta = 1 and levels even in log SNR. VLB: minus the variational bound on test data, nats a
dimension; sliced W2: distance of samples from data, over 128 random directions, mean of four
repeats. Errors are standard errors, of VLB that of the difference from ``analytic``. The heads of
a model are found in the fitted/ of its run, where mode=train_variance has left them.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.likelihood_targets import modes  # noqa: E402
from experiment.batches import trained_units  # noqa: E402
from experiment.checkpoint import load_checkpoint, load_weights, stored_config  # noqa: E402
from experiment.config import check_targets  # noqa: E402
from experiment.fitted import digest_of  # noqa: E402
from experiment.variance_heads import kept_head  # noqa: E402
from likelihood import calibrate_variance, discrete_bounds  # noqa: E402
from score_models import ScoreModel  # noqa: E402
from score_models.variance_kinds import KINDS  # noqa: E402
from sde_lib import VPSDE, ProbabilityFlow, probability_flow  # noqa: E402
from sde_lib.distances import sliced_wasserstein  # noqa: E402
from sde_lib.grids import Grid, Karras, UniformLogSNR, UniformTime  # noqa: E402
from sde_lib.noise import randn  # noqa: E402
from sde_lib.oracles import GaussianMixture  # noqa: E402
from sde_lib.reverse_variance import AnalyticVariance, ReverseVariance  # noqa: E402
from sde_lib.samplers import Ancestral  # noqa: E402
from sde_lib.state_variance import ResidualVariance  # noqa: E402
from sde_lib.trajectory import OptimalTrajectory  # noqa: E402

STEPS = (5, 10, 20, 50, 100, 200)
REPEATS = 4
FIXED = ("posterior", "forward")


@dataclass(frozen=True)
class Case:
    """A model, and draws of its data: ``draw(n, seed)`` -> [n, ...] in model units."""

    flow: ProbabilityFlow
    draw: Callable[[int, int], Tensor]
    test: Tensor
    variances: dict[str, ReverseVariance | str]
    samples: int


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors() -> GaussianMixture:
    """16 components in 32 dimensions, standard deviations from 0.03 to 0.6 in other orders."""
    generator = seeded(1)
    means = 0.8 * randn((16, 32), generator, dtype=torch.float64)
    stds = torch.linspace(math.log(0.03), math.log(0.6), 32).exp()
    orders = torch.stack([torch.randperm(32, generator=generator) for _ in range(16)])
    return GaussianMixture(means, stds[orders])


def of_mixture(data: GaussianMixture) -> Case:
    sde = VPSDE()
    flow = probability_flow(sde, data.score(sde))

    def draw(n: int, seed: int) -> Tensor:
        return data.sample(n, generator=seeded(seed)).double()

    analytic = calibrate_variance(flow, draw(4000, 0), steps=200, generator=seeded(1))
    npr = ResidualVariance(data.noise_variance(sde))
    return Case(flow, draw, draw(1000, 2), {"analytic": analytic, "npr, exact": npr}, 4000)


def of_checkpoint(checkpoint: Path) -> Case:
    from run import instantiate

    state = load_checkpoint(checkpoint)
    config = stored_config(checkpoint, state)
    parts = {part: config[part] for part in ("network", "sde", "parameterization", "data")}
    check_targets(parts, f"checkpoint {checkpoint}")
    *of_model, data = (instantiate(part) for part in parts.values())
    model = ScoreModel(*of_model)
    load_weights(model, state["ema"], checkpoint)
    model.eval().requires_grad_(False)
    flow = probability_flow(model.sde, model.score)
    units = trained_units(config.get("training", {}), data)
    train = units.encode(data.train[:1000], seeded(0))
    variances = {"analytic": calibrate_variance(flow, train, steps=100, generator=seeded(1))}
    folder = checkpoint.parents[1] / "fitted"
    for kind in KINDS:
        head = kept_head(kind, digest_of(checkpoint), folder, model)
        variances |= {} if head is None else {kind: head}
    test, everything = (
        units.encode(part, seeded(2)) for part in (data.test, torch.cat([data.train, data.test]))
    )

    def draw(n: int, seed: int) -> Tensor:
        return everything[torch.randperm(len(everything), generator=seeded(seed))[:n]]

    return Case(flow, draw, test[:256], variances, min(128, len(everything) // 2))


def sliced_w2(x: Tensor, y: Tensor) -> float:
    return sliced_wasserstein(x, y, projections=128, generator=seeded(0)).value


def sampled(case: Case, variance: ReverseVariance | str, steps: int, seed: int) -> float:
    sampler = Ancestral(steps, grid=UniformLogSNR(), variance=variance)
    generator = seeded(1000 + seed)
    shape, sde = (case.samples, *case.test.shape[1:]), case.flow.sde
    x = sde.prior_sample(shape, generator=generator, dtype=case.test.dtype)
    drawn = sampler(case.flow.score, sde, x, generator=generator)
    return sliced_w2(drawn, case.draw(case.samples, 10 + seed))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@torch.no_grad()
def compare(case: Case) -> None:
    """Both tables, and what they say to the claim."""
    variances = {name: name for name in FIXED} | case.variances
    dims, failed = case.test[0].numel(), []
    floor = sliced_w2(case.draw(case.samples, 90), case.draw(case.samples, 91))
    print(f"sliced W2 of data from data, {case.samples} each: {floor:.4f}")
    print("| K | " + " | ".join(f"{n}: VLB, W2" for n in variances) + " |")
    print("| --- " * (1 + len(variances)) + "|")
    for steps in STEPS:
        bounds = discrete_bounds(
            case.flow, case.test, variances, steps=steps, generator=seeded(steps)
        )
        best, cells = bounds["analytic"].log_prob, [str(steps)]
        w2 = {
            n: torch.tensor([sampled(case, v, steps, k) for k in range(REPEATS)])
            for n, v in variances.items()
        }
        for name, bound in bounds.items():
            gap, error = mean_and_error((best - bound.log_prob) / dims)
            distance, spread = mean_and_error(w2[name])
            cells.append(
                f"{float(-bound.log_prob.mean()) / dims:.3f} ± {error:.3f}, "
                f"{distance:.3f} ± {spread:.3f}"
            )
            if name in FIXED:
                worse, unsure = mean_and_error(w2[name] - w2["analytic"])
                failed += [] if gap > 2 * error else [f"VLB, {name}, K = {steps}"]
                failed += [] if worse > 2 * unsure else [f"W2, {name}, K = {steps}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    said = f"NOT MET ({'; '.join(failed)})" if failed else "met"
    print(f"analytic beats both fixed ones at every K in VLB and in W2, by two errors: {said}")


@torch.no_grad()
def trajectories(case: Case) -> None:
    """What the levels chosen by dynamic programming gain in the bound over even ones."""
    analytic: AnalyticVariance = case.variances["analytic"]
    grids: dict[str, Grid] = {
        "optimal": OptimalTrajectory(200, variance=analytic),
        "even in log SNR": UniformLogSNR(),
        "Karras": Karras(),
        "even in t": UniformTime(),
    }
    dims, failed = case.test[0].numel(), []
    print("| K | " + " | ".join(f"{name}: VLB" for name in grids) + " |")
    print("| --- " * (1 + len(grids)) + "|")
    for steps in STEPS[:-1]:
        costs = {
            name: -discrete_bounds(
                case.flow,
                case.test,
                {"": analytic},
                times=grid(case.flow.sde, steps).flip(0),
                generator=seeded(steps),
            )[""].log_prob
            / dims
            for name, grid in grids.items()
        }
        cells = [str(steps)]
        for name, cost in costs.items():
            gap, error = mean_and_error(cost - costs["optimal"])
            cells.append(f"{float(cost.mean()):.3f} ± {error:.3f}")
            failed += [] if gap >= -2 * error else [f"{name}, K = {steps}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    said = f"NOT MET ({'; '.join(failed)})" if failed else "met"
    print(f"the optimal levels are not worse than even ones at any K, to two errors: {said}")


def main() -> None:
    cases = {"mixture2": modes, "mixture32": vectors}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"{', '.join(cases)}, digits")
    parser.add_argument("--checkpoint", type=Path, help="of digits")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in (*cases, "digits")]
    if unknown or ("digits" in options.names and options.checkpoint is None):
        parser.error(f"unknown: {unknown}" if unknown else "digits needs --checkpoint")
    for name in options.names or cases:
        print(f"\n{name}")
        case = of_mixture(cases[name]()) if name in cases else of_checkpoint(options.checkpoint)
        compare(case)
        trajectories(case)


if __name__ == "__main__":
    main()
