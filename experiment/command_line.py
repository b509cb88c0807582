"""The command line around a run: checked early, a sweep split into jobs, errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.config import check_added, check_choices, choices, explain, walk
from experiment.errors import EXPECTED, RunError
from experiment.last_words import last_words

if TYPE_CHECKING:
    from experiment.sweep import Override


def begun(
    given: Sequence[str],
    folder: Path,
    compose: Callable[..., dict[str, Any]],
    instantiate: Callable[[Mapping[str, Any]], Any],
    read: Callable[[], Sequence[Override]] | None,
    errors: tuple[type[Exception], ...],
) -> AbstractContextManager[object]:
    """Compose what was asked for, so that a wrong choice or a typo is told in one line.

    Args:
        given: The overrides of the command line.
        folder: Of the configuration.
        compose: Overrides to a configuration; with ``resolve=True`` all of it is put in.
        instantiate: Builds what a node of it describes.
        read: What ``given`` means, where it is a sweep; None where it is one run.
        errors: What composing and reading may raise.

    Returns:
        What holds while the run, or the jobs of the sweep, are at work.

    Raises:
        ValueError: If there is no such choice or key, with what was probably meant.
        RunError: If a job of a sweep would be refused.
    """
    groups = check_choices(given, folder) if read is None else choices(folder)
    valid = [o for o in given if o.partition("=")[2] in groups.get(o.partition("=")[0], ())]
    known = [*groups, *(key for key, _ in walk(compose(valid)))]
    try:
        if read is None:
            compose([*given])
            sweep = nullcontext()
        else:
            sweep = _sweep(compose, instantiate, folder, read())
            # jobs in processes that others start have to find this package
            paths = str(folder.parent), os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    except errors as error:
        raise ValueError(explain(str(error), given, known, folder)) from error
    check_added(given, known)
    return sweep


def _sweep(
    compose: Callable[..., dict[str, Any]],
    instantiate: Callable[[Mapping[str, Any]], Any],
    folder: Path,
    overrides: Sequence[Override],
) -> AbstractContextManager[object]:
    from experiment.rehearsal import rehearse
    from experiment.shards import world_size
    from experiment.sweep import Sweep, jobs, values

    if world_size() > 1:
        raise RunError(
            "the processes of torchrun train one model; start a sweep with python alone, or "
            "torchrun for each of its runs."
        )
    check_choices([one for override in overrides for one in values(override)], folder)
    lines = jobs(overrides)
    composed = [compose(line, resolve=True) for line in lines]
    sweep = Sweep(Path(composed[0]["run"]["root"]), overrides)
    rehearse(composed, [sweep.choices(line) for line in lines], instantiate)
    sys.argv += sweep.arguments
    return sweep


def act(
    config: dict[str, Any],
    template: str,
    instantiate: Callable[[Mapping[str, Any]], Any],
    hydra: Mapping[str, Any],
    conf: Path,
) -> None:
    """Do the one run of a command, or one job of its sweep.

    Args:
        config: Composed, as plain dicts.
        template: ``run.name`` with nothing put in.
        instantiate: Builds what a node of it describes.
        hydra: What hydra knows about itself.
        conf: The folder of the configuration.
    """
    from experiment.run import Run

    overrides = [*hydra["overrides"]["task"]]
    if hydra["mode"].name != "MULTIRUN":
        report_errors(lambda: Run(config, instantiate, overrides, conf).go())
        return
    from experiment.sweep import Job

    about = hydra["job"]
    constant = about["config"]["override_dirname"]["exclude_keys"]
    job = Job(Path(hydra["runtime"]["output_dir"]), about["num"], overrides, constant)
    name = job.name(config["run"]["name"], template, config)
    if name != config["run"]["name"]:
        config["run"]["name"] = name
        overrides = [o for o in overrides if not o.startswith("run.name=")] + [f"run.name={name}"]
    if config["threads"] is None:  # joblib divides them by itself
        config["threads"] = hydra["launcher"].get("cpus_per_task")
    directory = Path(config["run"]["root"]) / name

    def go() -> None:
        Run(config, instantiate, overrides, conf, job=about["num"]).go()

    job.carry_out(go, config, directory)


def report_errors(action: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What ``action`` returns; what the user can mend ends the process with one line, the rest
    with a traceback."""
    try:
        return action()
    except EXPECTED as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(last_words(error))
