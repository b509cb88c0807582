"""MNIST: two processes and two weightings, the same network, iterations and batch.

Published, on CIFAR-10: sub-VP is below VP, and weighting by the likelihood with times drawn by
importance is below plain regression of the noise; a bound is above the ODE's value.
"""

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = {"VP": "vp", "sub-VP": "subvp"}
WEIGHTINGS = {"noise, uniform t": "noise", "g², t by importance": "maximum_likelihood"}
VARIANTS = {
    f"{process}, {weighting}": (f"sde={sde}", f"objective={objective}")
    for (process, sde), (weighting, objective) in itertools.product(
        PROCESSES.items(), WEIGHTINGS.items()
    )
}
COMMON = ("data=mnist", "network=unet", "network.multipliers=[1,2,2]", "network.dropout=0.1",
          "training.batch_size=32", "tracking=none")  # fmt: skip
SURE = 2.0  # standard errors


def mnist(options: argparse.Namespace) -> None:
    """The commands; with --run also what they do; then the table of what is there."""
    print("\n## MNIST: VP and sub-VP, two weightings\n")
    for name in VARIANTS:
        for command in commands(name, options):
            print(shlex.join(["python", "run.py", *command]), flush=True)
            if options.run and not scored(name, options):
                program = [sys.executable, str(ROOT / "run.py"), *command]
                subprocess.run(program, check=True, stdout=sys.stderr)
    found = {name: row for name in VARIANTS if (row := scored(name, options)) is not None}
    if not found:
        print(f"\nno such run in {options.root} yet; --run makes them")
        return
    show(found, {name: values_of(name, options) for name in found})


def folder_of(name: str, options: argparse.Namespace) -> Path:
    """Where the run of a variant lives."""
    label = "-".join(choice.partition("=")[2] for choice in VARIANTS[name])
    return options.root / f"ordering-{label}-{options.steps}"


def commands(name: str, options: argparse.Namespace) -> list[list[str]]:
    """Arguments of the training and of its evaluation."""
    folder = folder_of(name, options)
    where = [f"run.root={folder.parent}", f"run.name={folder.name}", f"threads={options.threads}"]
    same = [*COMMON, *VARIANTS[name], *where, *options.set]
    # evaluated afterwards, and not on the way
    training = [f"training.steps={options.steps}", f"training.evaluate_every={options.steps}"]
    likelihood = [f"likelihood.max_samples={options.samples}"]
    return [
        ["mode=train", *same, *training, "likelihood.max_samples=16"],
        ["mode=likelihood", *same, *likelihood, f"likelihood.bounds={options.bounds}"],
    ]


def scored(name: str, options: argparse.Namespace) -> dict | None:
    """The newest row of ``likelihood.json`` that has all that was asked for."""
    path = folder_of(name, options) / "likelihood.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    asked = {"iteration": options.steps, "num_samples": options.samples}
    for row in reversed(rows):
        whole = all(row[key] == value for key, value in asked.items())
        if whole and row.get("bounds", {}).get("steps") == options.bounds:
            return row
    return None


def values_of(name: str, options: argparse.Namespace) -> np.ndarray:
    """Bits/dim of each test image."""
    pattern = f"likelihood-{options.steps:08d}*.npz"
    files = sorted(folder_of(name, options).glob(pattern), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        values = np.load(path).get("bits_per_dim")
        if values is not None and len(values) == options.samples:
            return values
    raise FileNotFoundError(f"no {pattern} of {options.samples} images for {name}")


def show(rows: dict[str, dict], values: dict[str, np.ndarray]) -> None:
    """Every variant with its bounds, then the differences that were asked for."""
    bounds = list(next(iter(rows.values()))["bounds"]["values"])[1:]  # the first is the ODE
    print(
        "\n| bits/dim | ODE | " + " | ".join(bounds) + " |\n" + "| --- " * (2 + len(bounds)) + "|"
    )
    for name, row in rows.items():
        found = row["bounds"]["values"]
        ode = f"{row['value']:.4f} ± {row['standard_error']:.4f}"
        cells = (f"{found[bound][0]:.4f} ± {found[bound][1]:.4f}" for bound in bounds)
        print(f"| {name} | {ode} | {' | '.join(cells)} |")
    print(
        "\nDifferences over the same images, dequantized and probed alike; the error is of the "
        "images, and not of another training, of which there is one each:\n"
    )
    for below, above in pairs(rows):
        mean, error = paired(values[below], values[above])
        print(f"- {decided(mean, error)}: {below} - ({above}) = {mean:+.4f} ± {error:.4f}")
    for name, row in rows.items():
        found = row["bounds"]["values"]
        met = all(found[bound][0] > row["value"] for bound in bounds)
        print(f"- {'met' if met else 'NOT MET'}: {name}, bounds above the ODE")


def pairs(rows: dict[str, dict]) -> list[tuple[str, str]]:
    """(expected below, above): sub-VP and VP, weighted by the likelihood and not."""
    (vp, subvp), (plain, weighted) = list(PROCESSES), list(WEIGHTINGS)
    asked = [(f"{subvp}, {w}", f"{vp}, {w}") for w in (plain, weighted)]
    asked += [(f"{p}, {weighted}", f"{p}, {plain}") for p in (vp, subvp)]
    return [pair for pair in asked if set(pair) <= set(rows)]


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b and its standard error."""
    difference = a - b
    return difference.mean(), statistics.stdev(difference.tolist()) / len(difference) ** 0.5


def decided(mean: float, error: float) -> str:
    """Whether a difference is below zero by more than its error allows."""
    if abs(mean) < SURE * error:
        return "not decided"
    return "met" if mean < 0 else "NOT MET"
