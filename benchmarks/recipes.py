"""What each recipe reaches: trains it from the command line and prints the README's table.

python benchmarks/recipes.py              those for a CPU, one after the other (hours)
python benchmarks/recipes.py vp subvp     some of them; those for a GPU (days) by their names alone
python benchmarks/recipes.py --root DIR   where the runs go; finished ones are not trained again
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLANE = ("eight_gaussians", "checkerboard", "two_moons", "rings", "swiss_roll", "two_spirals")
RECIPES = {sde: [f"sde={sde}"] for sde in ("vp", "subvp", "ve", "edm", "cosine")}
RECIPES |= {name: [f"data={name}"] for name in PLANE}
RECIPES |= {
    name: [f"experiment={name}"]
    for name in ("digits_best", "ncsn", "points", "mnist", "fashion_mnist")
}
RECIPES["tabular"] = ["experiment=tabular", "data=patches"]  # a table without a download
CIFAR10 = ("vp", "subvp", "ve", "ddpm", "iddpm", "edm", "scoreflow")
LONG = {name: [f"experiment={name}"] for name in ("mnist_gpu", *(f"cifar10_{n}" for n in CIFAR10))}


def run_directory(root: Path, choices: list[str]) -> Path:
    """Where the run of these choices lives, asked of the program itself."""
    command = [sys.executable, str(ROOT / "run.py"), *choices, "--cfg", "job", "--resolve"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    section = f"\n{shown}".partition("\nrun:\n")[2]
    return root / section.partition("name: ")[2].splitlines()[0]


def measure(root: Path, choices: list[str]) -> str:
    """One row of the table."""
    folder, began = run_directory(root, choices), time.monotonic()
    command = [sys.executable, str(ROOT / "run.py"), "mode=train", *choices, "tracking=none"]
    subprocess.run([*command, f"run.root={root}"], check=True, stdout=sys.stderr)
    seconds = time.monotonic() - began
    row = json.loads((folder / "likelihood.json").read_text())[0]
    value = f"{row['value']:.4f} ± {row['standard_error']:.4f}"
    unit = {"bits_per_dim": "bits/dim", "nll": "nats"}[row["metric"]]
    above = "" if row["entropy"] is None else f"{row['value'] - row['entropy']:+.4f}"
    cells = (
        f"`{' '.join(choices)}`",
        f"{value} {unit}",
        above,
        row["iteration"],
        f"{seconds:.0f} s",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    known = RECIPES | LONG
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="RECIPE", help=", ".join(known))
    parser.add_argument("--root", type=Path, default=Path("runs"))
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    print("| choices | test set | above the entropy | iterations | time |\n" + "| --- " * 5 + "|")
    for name in options.names or RECIPES:
        print(measure(options.root, known[name]), flush=True)


if __name__ == "__main__":
    main()
