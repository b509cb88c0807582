"""What a second process brings: the same batch, one thread each, by gloo on this machine.

python benchmarks/processes.py                                  digits, 200 iterations, three times
python benchmarks/processes.py --repeats 5 training.batch_size=256 distributed=fsdp

Prints samples/s of 1 and of 2 processes with the spread over the repeats, the share of the ideal
(twice as many), and the largest difference of the two loss curves; and of two runs that have
nothing to do with each other but the machine: what two processes could come to on these cores,
which share memory and perhaps more. All take turns, so that other work falls on all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 10  # iterations between two lines of the record
SHORT = [
    f"training.log_every={WINDOW}",
    "training.evaluate_every=1000000",
    "likelihood.max_samples=2",
    "sampler.steps=2",
    "tracking=none",
    "threads=1",
    "device=cpu",
]


ONE, TWO, APART = "one process", "two processes", "two runs apart"
WAYS = {ONE: (1, 1), TWO: (2, 1), APART: (1, 2)}  # processes of a run, runs at once


def trainings(
    count: int, alone: int, steps: int, choices: list[str], folder: Path
) -> tuple[float, list[float]]:
    """Samples/s of ``alone`` runs at once, of ``count`` processes each, the median over windows
    but the first; and the loss of each window of the first."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(launch if count > 1 else []), str(ROOT / "run.py"), "mode=train"]
    place = [f"training.steps={steps}", f"run.root={folder}"]
    started = [
        subprocess.Popen(
            [*command, *SHORT, *choices, *place, f"run.name=run-{n}"],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for n in range(alone)
    ]
    if any([run.wait() for run in started]):  # for all of them
        sys.exit("a training failed, and says above why")
    runs = [logged(folder / f"run-{n}") for n in range(alone)]
    rates = [statistics.median(row["perf/images_per_s"] for row in rows[1:]) for rows in runs]
    return sum(rates), [row["train/loss"] for row in runs[0]]


def logged(folder: Path) -> list[dict]:
    """The lines of the record that have a loss."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("choices", nargs="*", metavar="KEY=VALUE", help="of the run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if options.steps < 2 * WINDOW or options.repeats < 1:
        parser.error(f"--steps must be {2 * WINDOW} or more and --repeats 1 or more")
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    apart = 0.0
    for _ in range(options.repeats):
        curves = {}
        for name, (count, alone) in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                rate, curves[name] = trainings(
                    count, alone, options.steps, options.choices, Path(folder)
                )
            rates[name].append(rate)
            print(f"{name}: {rate:.0f} samples/s", file=sys.stderr, flush=True)
        pairs = zip(curves[ONE], curves[TWO], strict=True)
        apart = max(apart, *(abs(a - b) for a, b in pairs))
    table(rates)
    print(f"\nlargest difference of the loss curves: {apart:.2g}")


def table(rates: dict[str, list[float]]) -> None:
    """Median, least and most of the repeats; the share of the ideal, repeat by repeat."""
    print("| | samples/s (least to most) | of twice one | of two runs apart |")
    print("| --- " * 4 + "|")
    for name, values in rates.items():
        twice, both = (ratios(values, rates[other]) for other in (ONE, APART))
        of_twice = spread([ratio / 2 for ratio in twice], ".2f")
        print(f"| {name} | {spread(values, '.0f')} | {of_twice} | {spread(both, '.2f')} |")


def ratios(over: list[float], under: list[float]) -> list[float]:
    """One to one."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: list[float], digits: str) -> str:
    """The median, least and most."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:{digits}} ({least:{digits}} to {most:{digits}})"


if __name__ == "__main__":
    main()
