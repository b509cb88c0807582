"""What comes before the slow imports: the help, and how idle threads wait."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

from experiment.errors import one_line

SWEEP = ("-m", "--multirun")
HEADER = "score-sde: train score models, sample from them, exact likelihoods with error bars."
FOOTER = """\
Examples
  python run.py sde=vp mode=train                  real 8x8 digits on a CPU, minutes
  python run.py mode=likelihood                    the newest checkpoint of that run
  python run.py mode=sample sampler.steps=20
  python run.py data=two_moons mode=train          2-D data with known entropy

Results     runs/<data>-<sde>-<network>/: report.html, metrics.jsonl, checkpoints, samples
Values      --cfg job shows all of them; each can be set: training.lr=1e-3 likelihood.draws=4
Completion  eval "$(python run.py -sc install=bash)"
"""


def before_the_slow_imports(folder: Path) -> None:
    """Answer ``--help`` at once, take ``-m`` anywhere; on a busy machine let idle threads sleep.

    A parser of arguments that has seen choices takes no more of them behind an option.
    Spinning threads wait for a busy neighbour at several times the cost; on an idle machine it is
    the sleeping ones that cost more.
    """
    if {"--help", "-h"} & {*sys.argv[1:]}:
        with contextlib.suppress(BrokenPipeError):  # a reader such as head may leave early
            print(help_text(folder), flush=True)
            sys.exit()
        os._exit(0)  # the interpreter would try to flush once more
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in SWEEP)
    for package in ("hydra", "torch"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"error: {one_line(ModuleNotFoundError(name=package))}")
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported


def help_text(folder: Path) -> str:
    """The help of the command line, read off the configuration folder: groups, choices, examples.

    A choice that ``config.yaml`` makes by itself is marked with a star.
    """
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    lines = [HEADER, "Choose with group=choice; * is what you get without.", ""]
    for group in sorted(path for path in folder.iterdir() if path.is_dir()):
        lines.append(group.name)
        for file in sorted(group.glob("*.yaml")):
            star = "*" if f"- {group.name}: {file.stem}\n" in config else " "
            lines.append(f" {star}{file.stem:<20}{_first_words(file)}")
        lines.append("")
    return "\n".join([*lines, FOOTER])


def _first_words(file: Path) -> str:
    comments = (line for line in file.read_text(encoding="utf-8").splitlines() if line[:2] == "# ")
    return next((line[2:] for line in comments if not line.startswith("# @package")), "")
