"""Steps that follow the error against steps laid out beforehand, at the same evaluations.

python benchmarks/adaptive.py                  mixtures in the plane, of equal and of uneven modes
python benchmarks/adaptive.py --checkpoint runs/digits-vp-unet/checkpoints/step-N.pt   digits too

Probability flow: RMS distance, by coordinate, from a converged solve from the same noise at
t_min = 1e-3. Reverse SDE: squared energy distance to as many samples of the data; for the digits,
to samples of the converged flow of the same model. Evaluations are those of the batch, which is
as slow as its slowest sample, and beside them those of a sample on average.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.likelihood_targets import modes, network  # noqa: E402
from sde_lib import SDE, VPSDE  # noqa: E402
from sde_lib.grids import UniformLogSNR  # noqa: E402
from sde_lib.oracles import GaussianMixture  # noqa: E402
from sde_lib.reverse import Score  # noqa: E402
from sde_lib.samplers import (  # noqa: E402
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    DPMSolver,
    DPMSolverAdaptive,
    DPMSolverPP,
    FlowAdams,
    Sampler,
)

TOLERANCES = (0.2, 0.05, 0.01, 1e-3)
OF_SDE = (0.5, 0.2, 0.05, 0.02)
FLOW = {
    "DPM-Solver-12": lambda r: DPMSolverAdaptive(12, r, r / 6.4, denoise=False),
    "DPM-Solver-23": lambda r: DPMSolverAdaptive(23, r, r / 6.4, denoise=False),
    "DPM-Solver-23, v": lambda r: DPMSolverAdaptive(23, r, r / 6.4, prediction="v", denoise=False),
    "dopri5": lambda r: AdaptiveODE(r, r / 6.4, denoise=False),
}
FIXED_FLOW = {
    "DPM-Solver 3": DPMSolver(denoise=False),
    "default, fitted": FlowAdams(denoise=False),
}
ADAPTIVE_SDE = {"AdaptiveSDE": lambda r: AdaptiveSDE(r, r / 2.5)}
FIXED_SDE = {"Ancestral": Ancestral(), "SDE-DPM-Solver++ 2M": DPMSolverPP(eta=1.0)}


class Tally:
    """A score function that counts its calls and the samples in them."""

    def __init__(self, score: Score) -> None:
        self.score, self.calls, self.rows = score, 0, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.score(x, t)


def uneven() -> GaussianMixture:
    """Widths from 0.02 to 1: what is a long step for one mode is too long for another."""
    means = torch.tensor([[-2.0, 0.0], [0.0, 1.5], [2.0, -0.5], [0.5, -2.0]])
    return GaussianMixture(means, torch.tensor([0.02, 0.1, 0.4, 1.0]))


def energy(x: Tensor, y: Tensor) -> float:
    """Squared energy distance of two samples [n, D]; unbiased, so 0 on average for one law."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    within = (torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (x, y))
    return float(2 * torch.cdist(x, y).mean() - sum(within))


def rms(x: Tensor, y: Tensor) -> float:
    """Root mean square distance by coordinate."""
    return float((x - y).square().mean().sqrt())


def row(who: str, sampler: Sampler, score: Score, sde: SDE, x: Tensor, judge) -> int:
    """One line of the table; returns the evaluations of the batch."""
    tally, began = Tally(score), time.perf_counter()
    end = sampler(tally, sde, x, generator=torch.Generator().manual_seed(1))
    seconds = time.perf_counter() - began
    error = judge(end)
    mean = tally.rows / len(x)
    print(f"| {who} | {tally.calls} | {mean:.0f} | {error:.1e} | {seconds:.1f} |", flush=True)
    return tally.calls


def table(adaptive, tolerances, fixed, score: Score, sde: SDE, x: Tensor, judge, what: str):
    """The adaptive ones at each tolerance, and the fixed ones at the same evaluations."""
    print(f"\n| {what} | evaluations | of a sample | error | s |\n| --- | --- | --- | --- | --- |")
    spent = set()
    for who, make in adaptive.items():
        for tolerance in tolerances:
            name = f"{who}, rtol {tolerance:g}"
            spent.add(row(name, make(tolerance), score, sde, x, judge))
    low, high = math.log(20), math.log(max(spent))
    for who, sampler in fixed.items():
        for share in (0.0, 1 / 3, 2 / 3, 1.0):
            steps = round(math.exp(low + share * (high - low)))
            last = int(sampler.denoise)
            row(who, replace(sampler, steps=steps - last), score, sde, x, judge)


@torch.no_grad()
def compare(name: str, score: Score, sde: SDE, x: Tensor, data: Tensor | None) -> None:
    """Both tables of one target; ``data`` [n, ...] are what samples of the SDE should be like."""
    print(f"\n## {name}: {tuple(x.shape)}")
    exact = FlowAdams(600, order=4, grid=UniformLogSNR(), denoise=False)
    truth = exact(score, sde, x)
    print(f"\nreference good to {rms(replace(exact, steps=400)(score, sde, x), truth):.1g}")
    fitted = FlowAdams(denoise=False).fitted(score, sde, x)
    flow = FIXED_FLOW | {"default, fitted": fitted}
    table(FLOW, TOLERANCES, flow, score, sde, x, lambda end: rms(end, truth), "probability flow")
    wanted = truth if data is None else data
    generator = torch.Generator().manual_seed(2)
    other = sde.prior_sample(tuple(x.shape), generator=generator, dtype=x.dtype)
    judge = lambda end: energy(end, wanted)  # noqa: E731
    table(ADAPTIVE_SDE, OF_SDE, FIXED_SDE, score, sde, other, judge, "reverse SDE")
    halves = energy(*wanted.chunk(2))
    print(f"\nenergy distance of two halves of the reference: {halves:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="of the digits model")
    parser.add_argument("--samples", type=int, default=4096, help="in the plane; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, data in {"25 modes": modes(), "uneven modes": uneven()}.items():
        if options.samples == 0:
            break
        generator, sde = torch.Generator().manual_seed(5), VPSDE(t_min=1e-3)
        shape = (options.samples, *data.shape)
        x = sde.prior_sample(shape, generator=generator, dtype=torch.float64)
        compare(name, data.score(sde), sde, x, data.sample(options.samples, generator=generator))
    if options.checkpoint is not None:
        target = network("digits", options.checkpoint, 2)
        sde, shape = target.flow.sde, (128, *target.x.shape[1:])
        x = sde.prior_sample(shape, generator=torch.Generator().manual_seed(5))
        compare("digits", target.flow.score, sde, x, None)


if __name__ == "__main__":
    main()
