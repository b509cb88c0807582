"""A step of training, ours and a plain one, alone and beside those of others.

python benchmarks/training.py                      step28 step32 curves optimiser gpu
python benchmarks/training.py step28 --rounds 12   1x28x28, a U-Net of 1.7 M weights
python benchmarks/training.py step32 --batch 32    3x32x32, of 2.2 M weights
python benchmarks/training.py curves               the losses of both over the same batches
python benchmarks/training.py optimiser            optimiser, averages and clipping alone
python benchmarks/training.py peers                diffusers' U-Net: pip install '.[bench]'
python benchmarks/training.py gpu                  DDPM's network on 3x32x32, share of the peak
python benchmarks/training.py mnist --run          VP, sub-VP and two weightings, hours

The other side is a float32 step on the same network: a loop over parameters each for Adam, the
average and the norm, torch.randn, the loss looked at each iteration. "Written plainly" its
network also has torch's own dropout and attention by einsum, the same weights and function. Both
sides are whole loops in processes of their own, with one CPU thread each, and take turns of one
iteration; a ratio is the median over the turns, with its quartiles. Seconds are those that the
CPU spent on a side; beside them those by the clock, which on a busy machine are the neighbours'.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.training_gpu import gpu  # noqa: E402
from benchmarks.training_mnist import mnist  # noqa: E402
from benchmarks.training_sides import (  # noqa: E402
    Case,
    Side,
    average_one_by_one,
    clip_one_by_one,
    model_of,
    settings_of,
)
from experiment.state import State  # noqa: E402
from score_models import DenoisingScoreMatching  # noqa: E402

UNET = {"multipliers": (1, 2, 2), "blocks": 2, "attention": (-1,), "dropout": 0.1}
CASES = {
    "step28": Case(shape=(1, 28, 28), size=UNET | {"width": 32}),
    "step32": Case(shape=(3, 32, 32), size=UNET | {"width": 32, "blocks": 3}),
}
ASKED = {  # how many times faster than the plain step on the same network
    "step28": {"float32": 1.15, "bfloat16": 1.6},
    "step32": {"float32": 1.15, "bfloat16": 1.8},
}
MOST_OF_THE_OPTIMISER = 0.4  # of the time of the loops


def in_turn(sides: dict[str, Side], rounds: int, iterations: int = 1) -> dict[str, list[dict]]:
    """What each side says of each round, so that a busy machine is busy for all."""
    spent: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            answer = side(iterations)
            if number:  # the first round warms up
                spent[name].append(answer)
    return spent


def started(cases: dict[str, Case], stack: ExitStack) -> dict[str, Side]:
    """All sides at work, once each has said how large its network is."""
    sides = {name: Side(case, stack) for name, case in cases.items()}
    for name, side in sides.items():
        print(f"- {name}: {side.answer()['weights']:,} weights", flush=True)
    return sides


def ratios(over: list[dict], under: list[dict], clock: str) -> tuple[float, float, float]:
    """Quartiles of the ratios, round by round; the middle one is the median."""
    each = [a[clock] / b[clock] for a, b in zip(over, under, strict=True)]
    return tuple(statistics.quantiles(each, n=4))


def told(quartiles: tuple[float, float, float]) -> str:
    """The median and the quartiles."""
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}..{high:.2f})"


def verdict(met: bool) -> str:
    """In capitals where it is not."""
    return "met" if met else "NOT MET"


def step(name: str, options: argparse.Namespace) -> None:
    """Our step in two precisions against the plain one on the same network and a plainer one."""
    case = replace(CASES[name], batch=options.batch, threads=options.threads)
    cases = {
        "ours, float32": case,
        "ours, bfloat16": replace(case, precision="bfloat16"),
        "plain": replace(case, side="plain"),
        "plain, network written plainly": replace(case, side="plain", plainly=True),
    }
    print(f"\n## {name}: a step of {case.batch} images of {case.shape}\n", flush=True)
    with ExitStack() as stack:
        spent = in_turn(started(cases, stack), options.rounds)
    show_seconds(spent, case.batch)
    print("\n| plain / ours | CPU | clock | least CPU |\n| --- | --- | --- | --- |")
    for precision, wanted in ASKED[name].items():
        for other in list(cases)[2:]:
            judge(spent, other, f"ours, {precision}", wanted)


def judge(spent: dict[str, list[dict]], other: str, own: str, wanted: float) -> None:
    """One row: how many times faster, and whether that is what was asked."""
    cpu, clock = (ratios(spent[other], spent[own], kind) for kind in ("cpu", "clock"))
    least = least_of(spent[other]) / least_of(spent[own])
    label = f"{verdict(cpu[1] >= wanted)} ({wanted}): {other} / {own}"
    print(f"| {label} | {told(cpu)} | {told(clock)} | {least:.2f} |", flush=True)


def least_of(rounds: list[dict]) -> float:
    """The least seconds of CPU: what is left when the neighbours happen to be still."""
    return min(answer["cpu"] for answer in rounds)


def show_seconds(spent: dict[str, list[dict]], batch: int) -> None:
    """Seconds and images/s of each side."""
    print("\n| side | CPU s a step, quartiles | images / CPU s |\n| --- | --- | --- |")
    for name, rounds in spent.items():
        low, middle, high = statistics.quantiles([answer["cpu"] for answer in rounds], n=4)
        print(f"| {name} | {middle:.3f} ({low:.3f}..{high:.3f}) | {batch / middle:.1f} |")


WINDOW = 20  # iterations that a point of a loss curve is the mean of


def curves(options: argparse.Namespace) -> None:
    """Losses over the same batches, times and noise: ours, plain, and plain of another seed."""
    small = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (-1,), "dropout": 0.1}
    case = Case(shape=(1, 8, 8), size=small, batch=32, shared=True, lr=1e-3)
    cases = {
        "plain": replace(case, side="plain"),
        "ours, float32": case,
        "ours, bfloat16": replace(case, precision="bfloat16"),
        "plain, another seed": replace(case, side="plain", seed=1),
    }
    print(f"\n## losses of {options.iterations} iterations, means of {WINDOW}\n", flush=True)
    with ExitStack() as stack:
        sides = started(cases, stack)
        losses = {name: side(options.iterations)["losses"] for name, side in sides.items()}
    points = {name: torch.tensor(values).unfold(0, WINDOW, WINDOW).mean(1)
              for name, values in losses.items()}  # fmt: skip
    print("\n| side | first | middle | last | mean distance from plain | largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    away = {name: ((line / points["plain"]) - 1).abs() for name, line in points.items()}
    for name, line in points.items():
        shown = (f"{float(line[i]):.4f}" for i in (0, len(line) // 2, -1))
        mean, largest = float(away[name].mean()), float(away[name].max())
        print(f"| {name} | {' | '.join(shown)} | {mean:.2%} | {largest:.2%} |")
    noise = away["plain, another seed"]
    for name in ("ours, float32", "ours, bfloat16"):
        met = bool(away[name].mean() <= noise.mean()) and bool(away[name].max() <= noise.max())
        print(f"- {verdict(met)}: {name} is no further from plain than another seed")


def optimiser(options: argparse.Namespace) -> None:
    """Clipping, Adam and one average: ours, and the loops over parameters, in one process."""
    print("\n## optimiser, average and clipping alone\n")
    mlp = Case(network="mlp", shape=(2,), size={"width": 128, "blocks": 4, "features": 64})
    for name, case in {"U-Net, 28x28": CASES["step28"], "MLP": mlp}.items():
        spent = updates(case, 10 * options.rounds)
        cpu = ratios(spent["ours"], spent["loops"], "cpu")
        times = ", ".join(
            f"{who} {1e3 * statistics.median(answer['cpu'] for answer in rounds):.2f} ms"
            for who, rounds in spent.items()
        )
        met = verdict(cpu[1] <= MOST_OF_THE_OPTIMISER)
        print(f"- {met} ({MOST_OF_THE_OPTIMISER}): {name}, {times}; ours / loops {told(cpu)}")


def updates(case: Case, rounds: int) -> dict[str, list[dict]]:
    """Seconds of CPU of each update, ours and by loops, in turn."""
    settings, mine, theirs = settings_of(case), model_of(case), model_of(case)
    state = State(mine, DenoisingScoreMatching(), settings.profiles, settings.adam)
    weights = list(theirs.parameters())
    average = [weight.detach().clone() for weight in weights]
    adam = {name: value for name, value in settings.adam.items() if name != "weight_decay"}
    plain = torch.optim.Adam(weights, **adam, foreach=False, fused=False)
    loss, spent = torch.tensor(1.0), {"ours": [], "loops": []}

    def ours() -> None:
        state.update(loss, settings.lr, settings.clip)

    def loops() -> None:
        clip_one_by_one(weights, settings.clip)
        plain.step()
        average_one_by_one(average, weights, settings.profiles[0], state.iteration)

    for number in range(rounds + 3):
        for who, call, parameters in (("ours", ours, state.weights), ("loops", loops, weights)):
            give_gradients(parameters)
            began = time.process_time()
            call()
            if number >= 3:
                spent[who].append({"cpu": time.process_time() - began})
        state.iteration += 1
    return spent


def give_gradients(weights: list[Tensor]) -> None:
    """Some that are not zero, the same each time: both sides scale theirs in place."""
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.01)


PEER = {  # about as many weights as the U-Net of step28, at the same resolutions
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}


def peers(options: argparse.Namespace) -> None:
    """The U-Net of diffusers with a plain step and with ours, and our U-Net of its size."""
    theirs = replace(
        CASES["step28"], network="diffusers", size=PEER, batch=options.batch,
        threads=options.threads,
    )  # fmt: skip
    own = replace(theirs, network="unet", size=UNET | {"width": 32})
    cases = {
        "ours, float32": own,
        "ours, bfloat16": replace(own, precision="bfloat16"),
        "diffusers, our step": theirs,
        "diffusers, our step, bfloat16": replace(theirs, precision="bfloat16"),
        "diffusers, plain step": replace(theirs, side="plain"),
    }
    print(f"\n## beside UNet2DModel: a step of {own.batch} images of {own.shape}\n", flush=True)
    try:
        import diffusers
    except ImportError as error:
        print(f"diffusers is not installed ({error}); pip install '.[bench]'")
        return
    print(f"diffusers {diffusers.__version__}")
    with ExitStack() as stack:
        spent = in_turn(started(cases, stack), options.rounds)
    show_seconds(spent, own.batch)
    print("\n| theirs / ours | CPU | clock | least CPU |\n| --- | --- | --- | --- |")
    for other, mine in (
        ("diffusers, our step", "ours, float32"),
        ("diffusers, our step, bfloat16", "ours, bfloat16"),
        ("diffusers, plain step", "ours, float32"),
        ("diffusers, plain step", "ours, bfloat16"),
    ):
        judge(spent, other, mine, 1.0)


NAMES = {
    "step28": lambda options: step("step28", options),
    "step32": lambda options: step("step32", options),
    "curves": curves,
    "optimiser": optimiser,
    "gpu": gpu,
    "peers": peers,
    "mnist": mnist,
}
BY_DEFAULT = ("step28", "step32", "curves", "optimiser", "gpu")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    add = parser.add_argument
    add("--rounds", type=int, default=6, help="turns of each side, at least 2")
    add("--batch", type=int, default=64, help="images of a step on the CPU")
    add("--threads", type=int, default=1, help="of each side, and of mnist's runs")
    add("--iterations", type=int, default=240, help="of a loss curve")
    peak = 'TFLOP/s of the GPU, an H200 by default: {"bfloat16": 989}'
    add("--peak", type=json.loads, default={}, metavar="JSON", help=peak)
    add("--root", type=Path, default=Path("runs"), help="of mnist's runs")
    add("--steps", type=int, default=2000, help="iterations of mnist's trainings")
    add("--samples", type=int, default=500, help="test images that mnist scores")
    add("--bounds", type=int, default=100, help="steps of mnist's bounds")
    more = "more choices for mnist's runs: speed.precision=bfloat16"
    add("--set", nargs="*", default=[], metavar="CHOICE", help=more)
    add("--run", action="store_true", help="run what mnist prints")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    if options.rounds < 2 or options.iterations < 2 * WINDOW:
        parser.error(f"quartiles take --rounds of 2, a curve --iterations of {2 * WINDOW}")
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    for name in options.names or BY_DEFAULT:
        began = time.monotonic()
        NAMES[name](options)
        print(f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
