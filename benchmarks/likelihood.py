"""Likelihoods at equal error: fresh probes on a fixed grid against one probe on an adaptive path.

python benchmarks/likelihood.py                     all closed forms, and digits
python benchmarks/likelihood.py image784 digits     some of them
python benchmarks/likelihood.py --quick             two small ones, in under two minutes
python benchmarks/likelihood.py mnist --checkpoint runs/mnist-vp-unet/checkpoints/step-N.pt

Both sides take the same samples and, where one probe is kept, the same probe. Cost is in F, bare
forward passes of one sample: evaluations times what one was measured to cost, in CPU time, here.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder, whose likelihood.py is no package

import likelihood as ll  # noqa: E402
from benchmarks.likelihood_targets import MIXTURES, NETWORKS, Target, mixture, network  # noqa: E402
from sde_lib import Counted, PerSample, ProbabilityFlow  # noqa: E402

DRAWS = 4  # probes for each sample, in one batch
LEAN = 44  # nodes: 0.45 of the 98 evaluations that the peers take at least at 1e-5
FEW = 64  # dimensions up to which the exact trace is tried too
FINE = 300  # nodes of the float64 solve that integration errors are taken against
BARE = ", no half grid"
TILED = {  # nodes and divergence of those with two vectors a probe, on images
    "44 nodes, 2 probes of 2 tiles": (44, ll.Hutchinson(2, tiles=2), "4 probes"),
    "44 nodes, 4 probes of 2 tiles": (44, ll.Hutchinson(4, tiles=2), "8 probes"),
    "64 nodes, 4 probes of 2 tiles": (64, ll.Hutchinson(4, tiles=2), "8 probes"),
}


class AnyPrecision(ll.Hutchinson):
    """The same probes whatever the dtype of the samples."""

    def probes(self, x: Tensor, generator: PerSample | None = None) -> Callable[[], Tensor]:
        draw = super().probes(x.double(), generator)
        return lambda: draw().to(x)


KEPT = AnyPrecision(1, basis=ll.Pixel())


def streams(x: Tensor) -> PerSample:
    return PerSample(range(len(x)))


def one_pass(flow: ProbabilityFlow, x: Tensor, t: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and an estimate of its divergence from one graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        velocity = flow(x, t)
        (row,) = torch.autograd.grad(velocity, x, probe)
    return velocity.detach(), (row * probe).flatten(1).sum(1)


def two_passes(flow: ProbabilityFlow, *where: Tensor) -> tuple[Tensor, Tensor]:
    """The same by two functions that do not know of each other."""
    return flow(*where[:2]), one_pass(flow, *where)[1]


def in_time(look: Callable, **method: object) -> Callable:
    """x and log p in t, one probe kept, the whole batch one vector, the network in float32."""

    def solve(flow: ProbabilityFlow, x: Tensor, tol: float) -> Tensor:
        from torchdiffeq import odeint

        probe = KEPT.probes(x, streams(x))()[0]
        start, span = (x, torch.zeros(len(x))), torch.tensor([flow.sde.t_min, flow.sde.t_max])
        states, volumes = odeint(
            lambda t, state: look(flow, state[0], t, probe),
            start,
            span,
            rtol=tol,
            atol=tol,
            **method,
        )
        return flow.prior_log_prob(states[-1]) + volumes[-1]

    return solve


def flow_matching(flow: ProbabilityFlow, x: Tensor, tol: float) -> Tensor:
    """Its time runs from noise, 0, to data, 1."""
    from flow_matching.solver import ODESolver

    end, length = flow.sde.t_max, flow.sde.t_min - flow.sde.t_max
    solver = ODESolver(lambda x, t: length * flow(x, end + t * length))
    return solver.compute_likelihood(x, flow.prior_log_prob, None, "dopri5", tol, tol)[1]


def k_diffusion(flow: ProbabilityFlow, x: Tensor, tol: float) -> Tensor:
    """Of y = x / alpha, from a denoiser of sigma / alpha; its prior is N(0, sigma²)."""
    from k_diffusion.sampling import log_likelihood

    sde = flow.sde
    ends = sde.level(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))
    alpha, (low, high) = float(ends.alpha[0]), ends.noise_ratio.tolist()

    def denoiser(y: Tensor, ratio: Tensor) -> Tensor:
        level = sde.level(sde.time_at(-2 * ratio.double().log())).like(y)
        x = level.expand_like(y).alpha * y
        return level.denoised(x, flow.score(x, level.t))

    found, _ = log_likelihood(denoiser, x / alpha, low, high, atol=tol, rtol=tol)
    return found - x[0].numel() * math.log(alpha)


SCIPY = in_time(two_passes, method="scipy_solver", options={"solver": "RK45"})
DOPRI5 = in_time(one_pass, method="dopri5")
PEERS = {  # solver, tolerance, forward passes and unit of cost of an evaluation
    "SciPy RK45 1e-3": (SCIPY, 1e-3, 2, "two passes"),
    "SciPy RK45 1e-5": (SCIPY, 1e-5, 2, "two passes"),
    "dopri5 1e-3": (DOPRI5, 1e-3, 1, "1 probe"),
    "dopri5 1e-5": (DOPRI5, 1e-5, 1, "1 probe"),
    "flow_matching 1e-5": (flow_matching, 1e-5, 1, "1 probe"),
    "k_diffusion 1e-5": (k_diffusion, 1e-5, 1, "1 probe"),
}


def choices(x: Tensor) -> dict[str, tuple[int, ll.Divergence, str]]:
    """Ours: nodes, divergence and unit of cost of an evaluation."""
    default = ll.suited(tuple(x.shape[1:]))
    found = {
        "default": (64, default, "2 probes" if default.random else "exact"),
        f"{LEAN} nodes, 1 probe": (LEAN, ll.Hutchinson(1), "1 probe"),
        f"{LEAN} nodes, 2 probes": (LEAN, ll.Hutchinson(2), "2 probes"),
        f"{LEAN} nodes, 4 probes": (LEAN, ll.Hutchinson(4), "4 probes"),
        f"{LEAN} nodes, 1 orthogonal": (LEAN, ll.Hutchinson(1, "orthogonal"), "1 probe"),
    }
    found |= TILED if x.ndim > 2 else {}
    bases = {"pixels": ll.Pixel()} if x.ndim > 2 else {}
    bases |= {"DCT of each channel": ll.Cosine(2)} if x.ndim > 3 and x.shape[1] > 1 else {}
    for name, basis in bases.items():
        found[f"{LEAN} nodes, 1 probe, {name}"] = (LEAN, ll.Hutchinson(1, basis=basis), "1 probe")
    if x[0].numel() <= FEW and default.random:
        found[f"{LEAN} nodes, exact"] = (LEAN, ll.Exact(), "exact")
    return found


@dataclass(frozen=True)
class Row:
    """What a solver found, log_prob [DRAWS, B], its squared error, and what it took.

    ``square`` [2001] is the mean square, then the same over samples and probes drawn again.
    """

    log_prob: Tensor
    square: Tensor
    evaluations: int  # counted forward passes, but half of SciPy's, which go in pairs
    cost: float
    reported: float = math.nan  # RMS of the errors that it reports itself

    def lower(self, peer: "Row") -> Tensor:
        """How many times lower its error is than that of ``peer``."""
        return (peer.square / self.square).sqrt()

    def saving(self, peer: "Row") -> Tensor:
        """How many times less compute it takes at equal error: error² x cost, the ratio."""
        return peer.square / self.square * (peer.cost / self.cost)


def judged(target: Target, found: Tensor, *cost: float) -> Row:
    found = found.double().reshape(DRAWS, -1)
    square = (found - target.truth).square() - target.truth_error.square()
    generator, size = torch.Generator().manual_seed(0), len(target.x)
    samples = torch.randint(size, (2000, 1, size), generator=generator)
    draws = torch.randint(DRAWS, (2000, DRAWS, size), generator=generator)
    again = square[draws, samples].mean((1, 2))
    return Row(found, torch.cat([square.mean()[None], again]).clamp(min=1e-12), *cost)


def theirs(target: Target, x: Tensor, units: dict[str, float]) -> Iterator[tuple[str, Row]]:
    for name, (solve, tol, forwards, unit) in PEERS.items():
        score = Counted(target.flow.score)
        torch.manual_seed(0)  # for those that draw their own probe
        try:
            with torch.no_grad():
                found = solve(replace(target.flow, score=score), x, tol)
        except ImportError as error:
            print(f"{name}: not installed ({error})")
            continue
        count = score.nfe // forwards
        yield name, judged(target, found, count, count * units[unit])


def ours(target: Target, x: Tensor, units: dict[str, float]) -> Iterator[tuple[str, Row]]:
    """Every choice with the half grid that measures its solver error, and what it is without."""
    for name, (nodes, divergence, unit) in choices(x).items():
        how = {"solver": ll.FixedGrid(nodes), "divergence": divergence, "generator": streams(x)}
        found = ll.log_likelihood(target.flow, x, **how)
        looks = found.passes // divergence.passes(x)
        cost, error = looks * units[unit] + found.nfe - looks, rms(found.total_error)
        row = judged(target, found.log_prob, found.nfe, cost, error)
        yield name, row
        yield name + BARE, replace(row, evaluations=nodes, cost=nodes * units[unit])


def unit_costs(target: Target, x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Quartiles, the median first, of CPU time over that of a bare forward, in alternation."""
    flow, probe = target.flow, KEPT.probes(x)()[0]
    level = flow.level_at(torch.tensor(sum(flow.clock_range()) / 2))
    chosen = ll.Pilot.of(flow, x, ll.Hutchinson()).divergence

    def evaluation(divergence: ll.Divergence) -> Callable[[], object]:
        draw = divergence.probes(x, torch.Generator().manual_seed(0))
        return lambda: divergence(lambda z: flow.noise_part(z, level), x, draw())

    calls = {
        "forward": lambda: flow.noise_part(x, level),
        "two passes": lambda: two_passes(flow, x, level.t, probe),
        "1 probe": evaluation(chosen.with_probes(1)),
        "2 probes": evaluation(chosen),
        "4 probes": evaluation(chosen.with_probes(4)),
        "8 probes": evaluation(chosen.with_probes(8)),
    } | ({"exact": evaluation(ll.Exact())} if x[0].numel() <= FEW else {})
    repeats = max(1, math.ceil(0.02 / seconds(calls["forward"], 3)))
    times = torch.tensor([[seconds(c, repeats) for c in calls.values()] for _ in range(rounds)])
    quartiles = (times / times[:, :1]).quantile(torch.tensor([0.5, 0.25, 0.75]), dim=0)
    return dict(zip(calls, quartiles.T.tolist(), strict=True))


@torch.no_grad()
def seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU time of one call: a neighbour on the machine does not count."""
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) / repeats


def integration(target: Target, rows: dict[str, Row], fine: int) -> tuple[dict, dict]:
    """RMS integration errors with one probe kept: of ours by nodes in float32 and float64, and of
    the peers that take our probe."""

    def solved(nodes: int, flow: ProbabilityFlow, x: Tensor) -> Tensor:
        how = {"solver": ll.FixedGrid(nodes, fresh=False, halve=False), "divergence": KEPT}
        return ll.log_likelihood(flow, x, generator=streams(x), **how).log_prob.double()

    both = (target.flow, target.x), (target.precise, target.x.double())
    truth = solved(fine, *both[1])
    counts = {32, 48, 64, 96, *(row.evaluations for name, row in rows.items() if "dop" in name)}
    by_nodes = {n: [rms(solved(n, *which) - truth) for which in both] for n in sorted(counts)}
    return by_nodes, {n: rms(row.log_prob[0] - truth) for n, row in rows.items() if "_" not in n}


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def interval(values: Tensor) -> str:
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975]).double())
    return f"{values[0]:.3g} ({low:.3g}..{high:.3g})"


def line(*cells: object) -> None:
    print("|", *(f"{c:.3g} |" if isinstance(c, float) else f"{c} |" for c in cells))


def head(*columns: str) -> None:
    print()
    line(*columns)
    line(*("---" for _ in columns))


def goal(text: str, met: bool) -> None:
    print(f"- {'met' if met else 'NOT MET'}: {text}")


def measure(target: Target, quick: bool) -> None:
    """All that is printed about one target."""
    x = target.x.repeat(DRAWS, *[1] * (target.x.ndim - 1))
    print(f"\n## {target.name}: D = {x[0].numel()}, {len(target.x)} samples x {DRAWS} probes")
    print(f"standard error of the truth at t_min: {rms(target.truth_error):.2g} nats")
    costs = unit_costs(target, x[:16], 5 if quick else 15)
    shown = ("{} {:.2f} ({:.2f}..{:.2f})".format(name, *cost) for name, cost in costs.items())
    print(f"an evaluation in F, with quartiles: {'; '.join(shown)}", flush=True)
    units = {name: median for name, (median, _, _) in costs.items()}
    peers, own = dict(theirs(target, x, units)), dict(ours(target, x, units))
    pilot = ll.Pilot.of(target.flow, x, choices(x)["default"][1])
    print(f"pilot: {pilot.nfe} forwards of one sample, once a model; {pilot.divergence}")
    by_nodes, known = integration(target, peers, FINE // 2 if quick else FINE)
    head("solver", "evaluations", "cost, F", "RMS error, nats (95 %)", "reported", "integration")
    for name, row in (peers | own).items():
        error, alone = interval(row.square.sqrt()), known.get(name, math.nan)
        line(name, row.evaluations, round(row.cost), error, row.reported, alone)
    head("integration alone, one probe kept", *(f"{nodes} nodes" for nodes in by_nodes))
    for dtype, *errors in zip(("float32", "float64"), *by_nodes.values(), strict=True):
        line(dtype, *errors)
    for title, ratio in (("RMS lower", Row.lower), ("compute less", Row.saving)):
        head(f"{title}, times", *peers)
        for name, row in own.items():
            line(name, *(interval(ratio(row, peer)) for peer in peers.values()))
    print()
    trained = target.name in NETWORKS
    lean = f"{LEAN} nodes, {4 if trained else 2} probes" + BARE
    for name in (lean, *(name + BARE for name in TILED), "default") if trained else (lean,):
        for other, peer in peers.items():
            judge(target.name, f"{name} against {other}", own[name], peer)
    for unit, most in (
        ("1 probe", 2.35),
        ("2 probes", 3.6),
        ("4 probes", 6.0),
        ("8 probes", 10.8),
    ):
        if trained:
            goal(f"{unit}: {units[unit]:.2f} F, wanted {most}", units[unit] <= most)
    for name in (name for name in peers if name.startswith("dopri5")):
        error, nodes = by_nodes[peers[name].evaluations][0], peers[name].evaluations
        text = f"integration error {error:.2g} at {nodes} nodes, {name} has {known[name]:.2g}"
        goal(text, error <= known[name])
    goal(f"integration error {by_nodes[96][0]:.2g} at 96, wanted 0.1", by_nodes[96][0] <= 0.1)
    met = all(single <= 1.1 * double + 1e-3 for single, double in by_nodes.values())
    goal("float32 integrates to 1.1x the error of float64 and 0.001 nats, at equal nodes", met)


def judge(target: str, pair: str, row: Row, peer: Row) -> None:
    saved, lower, wanted = row.saving(peer), row.lower(peer), 100 if "SciPy" in pair else 50
    share, most, of, times = row.evaluations / peer.evaluations, 0.45, "evaluations", 4
    if target in NETWORKS:
        text = f"{pair}: compute {interval(saved)} x less, wanted {wanted}"
        goal(text, float(saved[0]) >= wanted)
        share, most, of, times = row.cost / peer.cost, 0.4, "cost", 7
    elif target.startswith("mixture") or pair.endswith("1e-3"):
        return
    elif target.startswith("image"):
        times = 30
    text = f"{pair}: RMS {interval(lower)} x lower at {share:.2f} of its {of}"
    goal(f"{text}, wanted {times} at {most}", float(lower[0]) >= times and share <= most)


def main() -> None:
    names = [*MIXTURES, *NETWORKS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="TARGET", help=", ".join(names))
    parser.add_argument("--samples", type=int, help="how many; by the target if not given")
    parser.add_argument("--checkpoint", type=Path, help="of the one network that is named")
    parser.add_argument("--quick", action="store_true", help="few samples of the small mixtures")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(names)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*min_step")  # of torchdiffeq's SciPy
    samples = options.samples or (32 if options.quick else None)
    usual = ["mixture2", "mixture32"] if options.quick else [n for n in names if n != "mnist"]
    for name in options.names or usual:
        began = time.monotonic()
        kept = sorted((ROOT / f"runs/{name}-vp-unet/checkpoints").glob("step-*.pt"))
        if name in MIXTURES:
            measure(mixture(name, samples), options.quick)
        elif options.checkpoint or kept:
            measure(network(name, options.checkpoint or kept[-1], samples), options.quick)
        else:
            print(f"{name}: no checkpoint; make one by `python run.py data={name} mode=train`")
        print(f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
