"""Samplers at equal evaluations, ours and those of diffusers, k-diffusion and azula.

pip install '.[bench]'                              the others, but for two of them: see below
python benchmarks/samplers.py                       mixtures of 2, 32 and 784 dimensions, overhead
python benchmarks/samplers.py mixture2 overhead     some of them
python benchmarks/samplers.py noise2 noise32        stochastic ones: distance of their samples
python benchmarks/samplers.py unet                  images/s, on a GPU where there is one
python benchmarks/samplers.py digits --checkpoint runs/digits-vp-unet/checkpoints/step-N.pt

Deterministic ones start from the same noise; their error is the RMS distance, by coordinate, from
a converged solve of the same flow at t_min = 1e-3. The others are given exact noise levels on
three grids (even in t, in log SNR, and Karras's) and judged by the best of the three. Stochastic
ones are judged by the sliced W2 distance of their samples from true ones at t_min; the floor is
that of as many true samples, which no sampler can pass.

azula and k-diffusion ask for torchvision, which brings gigabytes of CUDA: `pip install --no-deps
azula einops` is enough for the first; the second imports it. What is not there is left out, and
said.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.likelihood_targets import MIXTURES, NETWORKS, network  # noqa: E402
from benchmarks.sampler_peers import DETERMINISTIC, STOCHASTIC  # noqa: E402
from score_models import EDM, ScoreModel  # noqa: E402
from score_models.networks import UNet  # noqa: E402
from sde_lib import SDE, VPSDE, BrownianPaths, Counted, PerSample  # noqa: E402
from sde_lib.distances import Estimate, sliced_wasserstein  # noqa: E402
from sde_lib.grids import Grid, Karras, UniformLogSNR, UniformTime  # noqa: E402
from sde_lib.oracles import Oracle  # noqa: E402
from sde_lib.reverse import Score  # noqa: E402
from sde_lib.samplers import (  # noqa: E402
    DDIM,
    DEIS,
    Ancestral,
    Captured,
    DPMSolver,
    DPMSolverPP,
    EulerMaruyama,
    FixedStepSampler,
    FlowAdams,
    Heun,
    UniPC,
)

BUDGETS = (5, 8, 10, 15, 20, 50, 100)
GRIDS: dict[str, Grid] = {"t": UniformTime(), "log SNR": UniformLogSNR(), "Karras": Karras()}
TARGETS = {"mixture2": 512, "mixture32": 512, "image784": 144}  # and how many samples
USUAL = {"diffusers UniPC 2": "t", "diffusers DPM-Solver++ 2M": "t", "k-diffusion Heun": "Karras"}
OURS: dict[str, FixedStepSampler] = {
    "default": FlowAdams(),
    "DEIS 3": DEIS(),
    "DPM-Solver 3": DPMSolver(),
    "DPM-Solver++ 2M": DPMSolverPP(),
    "UniPC 3": UniPC(order=3),
    "Heun": Heun(),
}
ASKED = {  # times the error of the best of the others on its best grid, by evaluations
    "mixture2": {5: 1.1, 8: 1.1, 10: 1.1, 15: 0.7, 20: 0.7, 50: 0.35, 100: 0.35},
    "mixture32": {5: 1.1, 8: 1.1, 10: 1.1, 15: 0.45, 20: 0.45, 50: 0.35, 100: 0.35},
    "image784": {5: 1.1, 8: 1.1, 10: 1.1, 50: 0.35, 100: 0.35},
}


def errors_of(solve, x: Tensor, truth: Tensor, score: Score, budgets) -> dict[int, float]:
    """RMS error by evaluations; those that a solver cannot spend exactly are left out."""
    found = {}
    for nfe in budgets:
        counted = Counted(score)
        end = solve(counted, x, nfe)
        if end is not None and counted.nfe <= nfe:
            found[nfe] = float((end - truth).square().mean().sqrt())
    return found


def with_steps(sampler: FixedStepSampler, nfe: int) -> FixedStepSampler:
    """The sampler that spends at most ``nfe`` evaluations, none of them on a last denoise."""
    steps = nfe // 2 if isinstance(sampler, Heun) else nfe
    return replace(sampler, steps=steps, denoise=False)


@torch.no_grad()
def deterministic(name: str, score: Score, sde: SDE, x: Tensor) -> None:
    """The table of one target and what it says to what was asked."""
    exact = FlowAdams(1500, order=4, grid=UniformLogSNR(), denoise=False)
    truth = exact(score, sde, x)
    again = replace(exact, steps=1000)(score, sde, x)
    doubt = float((again - truth).square().mean().sqrt())
    print(f"\n## {name}: {tuple(x.shape)}, reference good to {doubt:.1g}\n")
    print("| solver | grid |", *(f"{n} |" for n in BUDGETS))
    print("| --- | --- |", *("--- |" for _ in BUDGETS))
    table: dict[tuple[str, str], dict[int, float]] = {}

    def row(who: str, grid: str, solve) -> None:
        try:
            table[who, grid] = errors_of(solve, x, truth, score, BUDGETS)
        except ImportError as error:
            print(f"| {who} | not installed: {error} |")
            return
        seen = table[who, grid]
        cells = (f"{seen[n]:.1e} |" if n in seen else " |" for n in BUDGETS)
        print(f"| {who} | {grid} |", *cells, flush=True)

    for who, (peer, each) in DETERMINISTIC.items():
        for label, grid in GRIDS.items():
            row(who, label, lambda s, x, n, p=peer, g=grid, e=each: p(s, sde, x, g(sde, n // e)))
    fitted = FlowAdams().fitted(score, sde, x).grid
    for who, sampler in OURS.items():
        for label, grid in {"log SNR": GRIDS["log SNR"], "fitted": fitted}.items():
            made = replace(sampler, grid=grid)
            row(who, label, lambda s, x, n, m=made: with_steps(m, n)(s, sde, x))
    tried = {n: with_steps(FlowAdams(), n).fitted(score, sde, x) for n in BUDGETS}
    row("default", "automatic", lambda s, x, n: tried[n](s, sde, x))
    print("\nthe default tries rules below 8:", *(f"{n}: {_rule(tried[n])};" for n in (5,)))
    judge(name, table)


def _rule(sampler: FixedStepSampler) -> str:
    return f"{type(sampler).__name__} on {type(sampler.grid).__name__}"


def judge(name: str, table: dict[tuple[str, str], dict[int, float]]) -> None:
    """Our default against the best of the others, and against what they do by default."""
    ours = table["default", "automatic"]
    theirs = {key: row for key, row in table.items() if key[0] in DETERMINISTIC}
    print()
    for nfe, error in ours.items():
        rows = {key: row[nfe] for key, row in theirs.items() if nfe in row}
        if not rows:
            continue
        best = min(rows, key=rows.get)
        ratio, wanted = error / rows[best], ASKED.get(name, {}).get(nfe)
        verdict = "" if wanted is None else ("met: " if ratio <= wanted else "NOT MET: ")
        text = f"{error:.2g} at {nfe}, {ratio:.2g} of the best of the others ({' on '.join(best)})"
        print(f"- {verdict}{text}" + ("" if wanted is None else f", wanted {wanted}"))
    for who, grid in USUAL.items():
        for nfe, wanted in ((20, 0.1 if "Heun" in who else 0.2), (50, 0.02)):
            row = theirs.get((who, grid), {})
            if nfe in row and nfe in ours and not ("Heun" in who and nfe == 50):
                ratio = ours[nfe] / row[nfe]
                print(
                    f"- {'met' if ratio <= wanted else 'NOT MET'}: default to default, "
                    f"{ratio:.2g} of {who} at {nfe}, wanted {wanted}"
                )


@torch.no_grad()
def agreement(steps: int = 20) -> None:
    """Largest distance of our ends from diffusers' on the same grid, 25 modes in the plane."""
    data, sde = MIXTURES["mixture2"][0](), VPSDE(t_min=1e-3)
    x = sde.prior_sample((256, 2), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = {
        "DDIM": DDIM(),
        "DPM-Solver++ 2M": DPMSolverPP(),
        "UniPC 2": UniPC(order=2),
        "UniPC 3": UniPC(order=3),
        "DEIS 3": DEIS(order=3),
    }
    print(f"\n## ends after {steps} steps beside those of diffusers\n")
    for who, sampler in pairs.items():
        peer, _ = DETERMINISTIC[f"diffusers {who}"]
        for label, grid in GRIDS.items():
            ours = with_steps(replace(sampler, grid=grid), steps)(data.score(sde), sde, x)
            try:
                theirs = peer(data.score(sde), sde, x, grid(sde, steps))
            except ImportError as error:
                print(f"- not installed: {error}")
                return
            apart = float((ours - theirs).abs().max())
            print(f"- {'met' if apart <= 1e-4 else 'NOT MET'}: {who} on {label}: {apart:.1g}")


@torch.no_grad()
def overhead(rounds: int = 25, evaluations: int = 50) -> None:
    """Microseconds of an evaluation beside a trivial network, medians of alternated rounds."""
    sde, x = VPSDE(t_min=1e-3), torch.randn(4, 1, 28, 28)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.1

    times = UniformLogSNR()(sde, evaluations)
    calls = {}
    for who, (peer, each) in DETERMINISTIC.items():
        few = UniformLogSNR()(sde, evaluations // each)
        calls[who] = lambda p=peer, g=few: p(score, sde, x, g)
    grid = FlowAdams().fitted(score, sde, x).grid
    ours = dict(OURS) | {"default": FlowAdams(grid=grid), "DDIM": DDIM()}
    for who, sampler in ours.items():
        made = with_steps(sampler, evaluations)
        calls[who] = lambda m=made: m(score, sde, x)
    noisy = with_steps(DPMSolverPP(eta=1.0), evaluations)
    sources = {"fresh": PerSample, "on paths": BrownianPaths}
    for label, source in sources.items():
        name = f"DPM-Solver++ 2M, eta 1, noise {label}"
        ours[name] = noisy
        calls[name] = lambda s=source: noisy(score, sde, x, generator=s(range(4)))
    calls["bare network"] = lambda: [score(x, times[0]) for _ in range(evaluations)]
    spent: dict[str, list[float]] = {}
    for _ in range(rounds):
        for who, call in list(calls.items()):
            began = time.perf_counter()
            try:
                call()
            except ImportError:
                del calls[who]
                continue
            spent.setdefault(who, []).append((time.perf_counter() - began) / evaluations * 1e6)
    bare = statistics.median(spent.pop("bare network"))
    print(f"\n## overhead: microseconds an evaluation beside a network of {bare:.1f}\n")
    extra = {who: statistics.median(values) - bare for who, values in spent.items()}
    for who, value in sorted(extra.items(), key=lambda pair: pair[1]):
        low, high = (edge - bare for edge in statistics.quantiles(spent[who], n=4)[::2])
        print(f"- {who}{' (ours)' if who in ours else ''}: {value:.0f} ({low:.0f}..{high:.0f})")
    best = min((value for who, value in extra.items() if who not in ours), default=None)
    if best is not None:
        ratio, wanted = extra["default"] / best, 15 / 51  # microseconds, where it was asked
        verdict = "met" if ratio <= wanted else "NOT MET"
        print(
            f"- {verdict}: our default takes {ratio:.2f} of the best of the others, {wanted:.2f}"
        )


SAMPLES = 10_000  # of each stochastic sampler, and twice as many true ones
NOISY = {
    "DPM-Solver++ 2M, eta 1": DPMSolverPP(eta=1.0),
    "DPM-Solver++ 3M, eta 1": DPMSolverPP(order=3, eta=1.0),
    "DEIS 2, eta 1": DEIS(order=2, eta=1.0),
    "DEIS 3, eta 0.5": DEIS(order=3, eta=0.5),
    "Ancestral": Ancestral(grid=UniformLogSNR()),
    "Euler-Maruyama": EulerMaruyama(grid=UniformLogSNR()),
    "default (no noise)": FlowAdams(),
}


@torch.no_grad()
def stochastic(name: str, data: Oracle, sde: SDE, generator: torch.Generator) -> None:
    """Sliced W2 of samples at equal evaluations, and what it says to what was asked."""
    level = sde.level(torch.tensor(sde.t_min, dtype=torch.float64))

    def drawn(n: int) -> Tensor:
        x0 = data.sample(n, generator=generator)
        return level.alpha * x0 + level.sigma * torch.randn(
            x0.shape, generator=generator, dtype=x0.dtype
        )

    score, truth, floor_of = data.score(sde), drawn(2 * SAMPLES), drawn(SAMPLES)
    x = sde.prior_sample((SAMPLES, *data.shape), generator=generator, dtype=torch.float64)

    def distance(samples: Tensor) -> Estimate:
        directions = torch.Generator().manual_seed(1)
        return sliced_wasserstein(samples, truth, generator=directions)

    floor, table = distance(floor_of), {}
    print(f"\n## {name}: sliced W2 of {SAMPLES} samples; floor {told(floor)}\n")
    print("| solver |", *(f"{n} |" for n in BUDGETS_NOISY))
    print("| --- |", *("--- |" for _ in BUDGETS_NOISY))
    fitted = FlowAdams().fitted(score, sde, x[:32])
    for who, sampler in (NOISY | {"default (no noise)": fitted}).items():
        seen = {
            n: distance(with_steps(sampler, n)(score, sde, x, generator=generator))
            for n in BUDGETS_NOISY
        }
        table[who] = seen
        print(f"| {who} |", *(f"{told(seen[n])} |" for n in BUDGETS_NOISY), flush=True)
    for who, (peer, each) in STOCHASTIC.items():
        seen, torch_seed = {}, torch.random.fork_rng()
        with torch_seed:
            torch.manual_seed(7)
            try:
                for n in BUDGETS_NOISY:
                    ends = [peer(score, sde, x, g(sde, n // each)) for g in GRIDS.values()]
                    finite = [end for end in ends if bool(torch.isfinite(end).all())]
                    seen[n] = min(map(distance, finite), key=lambda e: e.value)
            except ImportError as error:
                print(f"| {who} | not installed: {error} |")
                continue
        table[who] = seen
        print(f"| {who}, best grid |", *(f"{told(seen[n])} |" for n in BUDGETS_NOISY), flush=True)
    judge_noisy(table, floor)


BUDGETS_NOISY = (10, 20, 50, 100)


def told(estimate: Estimate) -> str:
    """The value and half its 95 % interval."""
    return f"{estimate.value:.4f} ± {(estimate.high - estimate.low) / 2:.4f}"


def judge_noisy(table: dict[str, dict[int, Estimate]], floor: Estimate) -> None:
    """Our SDE solver against the best SDE-DPM-Solver++ of the others, and against the floor."""
    print()
    ours = table["DPM-Solver++ 2M, eta 1"]
    theirs = [row[20].value for who, row in table.items() if who in STOCHASTIC and "2" in who]
    if theirs:
        ratio = ours[20].value / min(theirs)
        print(
            f"- {'met' if ratio <= 1.5 else 'NOT MET'}: {ratio:.2f} of the best at 20, wanted 1.5"
        )
    for who in ("DPM-Solver++ 2M, eta 1", "DEIS 2, eta 1", "default (no noise)"):
        met = table[who][50].low <= floor.high
        print(
            f"- {'met' if met else 'NOT MET'}: {who} at 50 {told(table[who][50])}, floor "
            f"{told(floor)}: intervals {'meet' if met else 'do not meet'}"
        )


@torch.no_grad()
def throughput(rounds: int = 15, evaluations: int = 10) -> None:
    """Images/s with a U-Net, ours and diffusers' loop, and the time beside the bare network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = UNet((1, 28, 28), width=32, blocks=1).eval().requires_grad_(False).to(device)
    model = ScoreModel(network, VPSDE(t_min=1e-3), EDM(0.5))
    batch = 256 if device.type == "cuda" else 8
    x, level = torch.randn(batch, 1, 28, 28, device=device), torch.zeros(batch, device=device)
    fitted, times = FlowAdams().fitted(model.score, model.sde, x), UniformTime()
    ours = {"default": fitted, "DDIM": DDIM(), "++ 2M": DPMSolverPP(eta=1.0)}
    ours = {who: with_steps(sampler, evaluations) for who, sampler in ours.items()}
    if device.type == "cuda":
        ours["default, captured"] = Captured(ours["default"])
    calls = {"bare network": lambda: [network(x, level) for _ in range(evaluations)]}
    for who, sampler in ours.items():
        calls[who] = lambda s=sampler: s(model.score, model.sde, x)
    peer = DETERMINISTIC["diffusers UniPC 2"][0]
    calls["diffusers UniPC 2"] = lambda: peer(
        model.score, model.sde, x, times(model.sde, evaluations)
    )
    spent = in_turn(calls, rounds, device)
    print(f"\n## a U-Net at 28x28, {batch} at a time, {evaluations} evaluations, {device}\n")
    for who, seconds in spent.items():
        ratios = [a / b for a, b in zip(seconds, spent["bare network"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speed = batch / statistics.median(seconds)
        text = f"{who}: {speed:.1f} images/s, {middle:.3f} ({low:.3f}..{high:.3f}) of the network"
        wanted = "" if who not in ours else "met: " if middle <= 1.01 else "NOT MET (1.01): "
        print(f"- {wanted}{text}")


def in_turn(calls, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, in rounds, so that a busy machine is busy for all."""
    spent: dict[str, list[float]] = {}
    for n in range(rounds + 1):
        for who, call in list(calls.items()):
            began = time.perf_counter()
            try:
                call()
            except ImportError as error:
                print(f"{who} is not installed: {error}")
                del calls[who]
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()
            if n:  # the first round warms up
                spent.setdefault(who, []).append(time.perf_counter() - began)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*TARGETS, "same", "noise2", "noise32", "overhead", "unet", "digits"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--checkpoint", type=Path, help="of the digits model")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(names)}")
    torch.set_num_threads(1)
    for name in options.names or names[:-1]:
        began, generator = time.monotonic(), torch.Generator().manual_seed(5)
        if name == "overhead":
            overhead()
        elif name == "same":
            agreement()
        elif name == "unet":
            throughput()
        elif name.startswith("noise"):
            data = MIXTURES[name.replace("noise", "mixture")][0]()
            stochastic(name, data, VPSDE(t_min=1e-3), generator)
        elif name in NETWORKS:
            if options.checkpoint is None:
                parser.error("digits needs --checkpoint")
            target = network(name, options.checkpoint, 2)
            sde, shape = target.flow.sde, (64, *target.x.shape[1:])
            x = sde.prior_sample(shape, generator=generator)
            deterministic(name, target.flow.score, sde, x)
        else:
            data, sde = MIXTURES[name][0](), VPSDE(t_min=1e-3)
            x = sde.prior_sample(
                (TARGETS[name], *data.shape), generator=generator, dtype=torch.float64
            )
            deterministic(name, data.score(sde), sde, x)
        print(f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
