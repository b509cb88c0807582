"""What a second process brings: the same batch, one thread each, by gloo on this machine.

python benchmarks/processes.py                                  digits, 200 iterations, three times
python benchmarks/processes.py --repeats 5 training.batch_size=256 distributed=fsdp

Prints samples/s of 1 and of 2 processes with the spread over the repeats, the share of the ideal
(twice as many), and the largest difference of the two loss curves. One and two take turns, so that
other work on the machine falls on both; the ideal needs two cores that nobody else uses.
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


def trained(count: int, steps: int, choices: list[str], folder: Path) -> tuple[float, list[float]]:
    """Samples/s, the median over windows but the first, and the loss of each window."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(launch if count > 1 else []), str(ROOT / "run.py"), "mode=train"]
    place = [f"training.steps={steps}", f"run.root={folder}", f"run.name=of-{count}"]
    subprocess.run(
        [*command, *SHORT, *choices, *place],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = (folder / f"of-{count}" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    rates = [row["perf/images_per_s"] for row in rows[1:]]
    return statistics.median(rates), [row["train/loss"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("choices", nargs="*", metavar="KEY=VALUE", help="of the run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if options.steps < 2 * WINDOW or options.repeats < 1:
        parser.error(f"--steps must be {2 * WINDOW} or more and --repeats 1 or more")
    rates: dict[int, list[float]] = {1: [], 2: []}
    apart = 0.0
    for _ in range(options.repeats):
        curves = []
        for count in rates:
            with tempfile.TemporaryDirectory() as folder:
                rate, losses = trained(count, options.steps, options.choices, Path(folder))
            rates[count].append(rate)
            curves.append(losses)
            print(f"{count} process(es): {rate:.0f} samples/s", file=sys.stderr, flush=True)
        apart = max(apart, *(abs(a - b) for a, b in zip(*curves, strict=True)))
    table(rates)
    print(f"\nlargest difference of the loss curves: {apart:.2g}")


def table(rates: dict[int, list[float]]) -> None:
    """Median, least and most of the repeats; the share of the ideal, repeat by repeat."""
    print("| processes | samples/s | least to most | share of the ideal |\n" + "| --- " * 4 + "|")
    for count, values in rates.items():
        shares = [b / (count * a) for a, b in zip(rates[1], values, strict=True)]
        spread = f"{min(values):.0f} to {max(values):.0f}"
        share = f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
        print(f"| {count} | {statistics.median(values):.0f} | {spread} | {share} |")


if __name__ == "__main__":
    main()
