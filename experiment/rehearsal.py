"""What the jobs of a sweep would be refused for, told before the first of them begins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiment.choices import before_data
from experiment.config import fill_measured
from experiment.errors import EXPECTED, RunError, one_line
from experiment.run import Run
from experiment.sweep import mode_of

PARTS = ("sde", "parameterization", "objective", "sampler", "likelihood", "speed", "distributed")
"""What needs neither data nor a checkpoint; a network has the shape of the data."""


def rehearse(
    configs: Sequence[Mapping[str, Any]],
    choices: Sequence[str],
    instantiate: Callable[[Mapping[str, Any]], Any],
) -> None:
    """Make the parts of every job that need no data, and let go of them.

    Args:
        configs: Of the jobs, composed, as plain dicts.
        choices: What tells each from the others, for the message.
        instantiate: Builds what a node describes.

    Raises:
        RunError: If one would be refused; each reason has been told on stderr then, with the first
            of the jobs that have it.
    """
    refused: dict[str, list[str]] = {}
    for number, (config, chosen) in enumerate(zip(configs, choices, strict=True)):
        try:
            check(Run(config, instantiate))
        except EXPECTED as error:
            refused.setdefault(one_line(error), []).append(f"job {number}: {chosen}")
    if not refused:
        return
    for reason, jobs in refused.items():
        more = f" (and {len(jobs) - 1} more)" if len(jobs) > 1 else ""
        print(f"{jobs[0]}{more}: {reason}", file=sys.stderr)
    count = sum(map(len, refused.values()))
    raise RunError(f"{count} of {len(configs)} jobs cannot begin, see above; none did.")


def check(run: Run) -> None:
    """Make all of a run that needs no data.

    Raises:
        RunError: What would be refused, like the errors of the parts themselves.
    """
    run = replace(run, config=fill_measured(run.config, data_std=1.0))
    _ = run.seed, run.threads, run.fresh
    augment = ["augment"] if run.config.get("augment") is not None else []
    for part in (*PARTS, *augment, "mode"):
        run.build(part)
    run.build("tracking").check()
    settings = run.build("training")
    if mode_of(run.config) == "train":
        before_data(run, settings)
