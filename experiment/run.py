"""One run: its directory, its lock, its configuration, and how its parts are built."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiment.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    load_weights,
    remove_partial_files,
    stored_config,
)
from experiment.chosen import Label, choose
from experiment.config import (
    asked_for,
    check_complete,
    check_targets,
    differences,
    fill_measured,
)
from experiment.data import Dataset
from experiment.errors import LostError, RunError
from experiment.hints import tell_many_threads
from experiment.identity import Identity
from experiment.measured import conditioned, measure
from experiment.progress import say
from experiment.shards import from_first, local_rank, lost, rank
from experiment.snapshots import FOLDER
from score_models import ScoreModel
from sde_lib import validation
from sde_lib.samplers import SamplingError

# what may change when a run goes on: not what is being trained, only how it is watched and for how
# long
CHANGEABLE = (
    "mode",
    "sampler",
    "likelihood",
    "tracking",
    "run",
    "checkpoint",
    "average",
    "device",
    "threads",
    "speed",
    "distributed",
    "training.steps",
    "training.max_skipped",
    "training.log_every",
    "training.checkpoint_every",
    "training.evaluate_every",
    "training.snapshot_every",
    "training.max_seconds",
    "experiment",
    "data.root",
    "data.lazy",
    "measured",  # of the data; another set is refused in words of its own
    "resume",
)


@dataclass(frozen=True)
class Run:
    """A composed configuration, and what can be built from it.

    Args:
        config: Plain nested dicts.
        instantiate: Builds the object that one node of the configuration describes.
        overrides: What of it was asked for on the command line, as ``key=value``.
        conf: The folder that it was composed from.
        average: Which average of the weights it is about, once :meth:`trained` has found it.
        job: Its number in a sweep, None outside.
        caveat: What its model cannot do, once that is known; nothing as a rule.
    """

    config: Mapping[str, Any]
    instantiate: Callable[[Mapping[str, Any]], Any]
    overrides: Sequence[str] = ()
    conf: Path = Path("conf")
    average: Label = Label()
    job: int | None = None
    caveat: str = ""

    def __post_init__(self) -> None:
        check_complete(self.config)
        check_targets(self.config, "configuration")
        for key in ("root", "name"):
            if not isinstance(self.config["run"][key], str) or not self.config["run"][key].strip():
                raise RunError(
                    f"run.{key} must be a non-empty path; got {self.config['run'][key]!r} (what "
                    f"reads as a number or null needs quotes of its own: run.{key}='\"1\"')."
                )

    def go(self) -> None:
        """Run the chosen mode.

        Raises:
            RunError: If it cannot be done, also where a solver gives up, or another process.
        """
        if self.threads is not None:
            tell_many_threads(self.threads)
            torch.set_num_threads(self.threads)
        try:
            self.build("mode")(self._agreed())
        except SamplingError as error:
            raise RunError(str(error)) from error
        except RuntimeError as error:
            if not lost(error):
                raise
            raise LostError(error) from error
        except KeyboardInterrupt:
            say("interrupted")
            raise SystemExit(128 + signal.SIGINT) from None

    def _agreed(self) -> Run:
        """This run in the directory of the first process: a time in run.name would make several.

        Raises:
            RunError: If the processes have different configurations.
        """
        theirs = from_first(self.config)
        other = differences(theirs, self.config, ("run", "device", "threads"))
        if other:
            raise RunError(
                f"process {rank()}, on {socket.gethostname()}, was started with other choices "
                f"than the first ({'; '.join(other)}); start all with the same command."
            )
        return replace(self, config={**self.config, "run": theirs["run"]})

    @property
    def path(self) -> Path:
        """Directory of the run."""
        return Path(self.config["run"]["root"]) / self.config["run"]["name"]

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """Where those of its power averages are."""
        return self.path / FOLDER

    @property
    def fitted(self) -> Path:
        """Where what is found out about its weights is kept, by the digest of the checkpoint; each
        average has a place of its own."""
        return self.path / "fitted" / self.average.name

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        seed = self.config["seed"]
        if isinstance(seed, float) and seed.is_integer():
            seed = int(seed)  # 1e3, as a count may be written
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise RunError(f"seed must be a whole number >= 0 and < 2^63; got seed={seed!r}.")
        return seed

    @property
    def threads(self) -> int | None:
        """Threads of the CPU; None: torch decides."""
        threads = self.config["threads"]
        return None if threads is None else validation.count("configuration", "threads", threads)

    @property
    def fresh(self) -> bool:
        """Whether an earlier run of this name is set aside first."""
        return validation.flag("run", "fresh", self.config["run"]["fresh"])

    def device(self) -> torch.device:
        """The device asked for; ``auto`` is the first GPU if there is one, under torchrun and in a
        sweep one of its own.

        Raises:
            RunError: If there is no such device; the message lists those there are.
        """
        wanted = self.config["device"]
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        gpus = there[1:]
        if wanted == "auto" or (wanted == "cuda" and gpus):
            return torch.device(
                gpus[(local_rank() + (self.job or 0)) % len(gpus)] if gpus else "cpu"
            )
        if wanted in there:
            return torch.device(wanted)
        raise RunError(
            f"device={wanted} is not here; there is: {', '.join(there)} (or device=auto)."
        )

    def build(self, part: str) -> Any:  # noqa: ANN401
        """What the configuration names under ``part``."""
        return self.instantiate(self.config[part])

    def build_model(self) -> ScoreModel:
        """Network, process and parameterization, put together."""
        return ScoreModel(self.build("network"), self.build("sde"), self.build("parameterization"))

    def _caveat(self, objective: Mapping[str, Any] | None) -> str:
        """That of the objective stored with a model."""
        if objective is None:
            return ""
        # weights are of use without what trained them, which may not be there any more
        with contextlib.suppress(Exception):
            check_targets(objective, "checkpoint", ("sde_lib", "score_models", "likelihood"))
            return self.instantiate(objective).caveat
        return ""

    def warn(self) -> None:
        """Say what the model cannot do, once for all processes."""
        if rank() == 0 and self.caveat:
            say(f"warning: {self.caveat}.")

    def measured(self, data: Dataset) -> Run:
        """This run with what the data decide filled in: shape, spread and condition of a sample,
        the units of continuous data, and what tells the set from another one.

        Raises:
            RunError: If the data come with conditions and the network takes none.
        """
        found = measure(data)
        config = fill_measured(self.config, shape=list(data.shape), data_std=found.std)
        config["network"] = conditioned(config["network"], data)
        return replace(self, config=config | {"measured": found.as_node()})

    def trained(self) -> tuple[Run, ScoreModel, Path, int]:
        """The run, the model of averaged weights, the file and the iteration of the newest whole
        checkpoint, or of ``checkpoint=PATH``; ``average=...`` chooses another than the first.

        Network, process and parameterization come from the configuration *stored with it*, and
        asking for others is an error; ``training`` says how that model was trained; the rest is
        this run's own. What is made from another run's checkpoint goes to that run, or where
        run.root and run.name say.

        Raises:
            RunError: If there is none, saying what to do; or if it cannot be used.
        """
        if self.fresh:
            raise RunError("run.fresh=true is for mode=train; leave it out to use the run.")
        path, state = self._loaded()
        stored = stored_config(path, state)
        try:
            parts = {part: stored[part] for part in ("sde", "network", "parameterization")}
            trained_on, training = {"data": stored["data"]}, {**stored.get("training", {})}
            measured = {
                "shape": parts["network"].get("shape"),
                "data_std": parts["parameterization"].get("data_std"),
                "cond": parts["network"].get("cond"),
            }
            measured_data = stored.get("measured")
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                path, f"its configuration lacks {error}", "pass a file written by mode=train"
            ) from error
        # a file may come from anywhere: of all that could be called, only what makes models
        check_targets(parts, f"checkpoint {path}", ("sde_lib", "score_models"))
        changed = differences(trained_on, {"data": self.config["data"]}, CHANGEABLE)
        if changed:
            raise CheckpointError(
                path,
                f"it was trained on other data ({'; '.join(changed)})",
                "choose the data that it was trained on",
            )
        own = fill_measured({part: self.config[part] for part in parts}, **measured)
        other = asked_for(differences(parts, own), self.overrides)
        if other:
            raise CheckpointError(
                path,
                f"it holds a model of other choices ({'; '.join(other)})",
                "leave these out, or train with them",
            )
        kept = {**parts, "training": training, "run": self._home(path)}
        kept["measured"] = measured_data
        chosen = choose(self.config.get("average"), path, state, training)
        caveat = self._caveat(stored.get("objective"))
        run = replace(self, config={**self.config, **kept}, average=chosen.label, caveat=caveat)
        model = run.build_model()
        load_weights(model, chosen.weights, path)
        return (
            run,
            model.to(self.device()).eval().requires_grad_(False),
            path,
            chosen.iteration,
        )

    def _home(self, checkpoint: Path) -> dict[str, Any]:
        """The ``run`` node of the directory for what is made from ``checkpoint``."""
        own = self.config["run"]
        asked = any(o.lstrip("+").startswith(("run.root=", "run.name=")) for o in self.overrides)
        if asked or not self.config["checkpoint"]:
            return own
        folder = checkpoint.absolute().parent
        if folder.name != self.checkpoints.name:  # a file on its own
            return own | {"name": checkpoint.stem}
        return own | {"root": str(folder.parent.parent), "name": folder.parent.name}

    def _loaded(self) -> tuple[Path, dict[str, Any]]:
        """The checkpoint that was asked for, or the newest one that is whole."""
        if self.config["checkpoint"]:
            path = Path(self.config["checkpoint"])
            return path, load_checkpoint(path)
        newest = load_newest(self.checkpoints)
        if newest is None:
            raise RunError(
                f"no checkpoint at {self.checkpoints}; run `python run.py mode=train` "
                "with the same choices first, "
                "or pass checkpoint=PATH."
            )
        return newest

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the run directory for training: made, locked, freed of partial files.

        The lock is the kernel's: it goes with the process, so that none is ever stale.

        Raises:
            RunError: If another trainer holds it, or the directory cannot be used.
        """
        import fcntl

        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / "lock", "a+")  # noqa: SIM115
        except OSError as error:
            raise RunError(
                f"run directory {self.path} cannot be used ({error.strerror}); choose "
                "another with run.root=PATH "
                "or run.name=NAME."
            ) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(handle.fileno()), os.stat(self.path / "lock")):
                    raise BlockingIOError("the directory was moved away in between")
            except OSError as error:
                handle.seek(0)
                raise RunError(
                    f"run directory {self.path} is locked by "
                    f"{handle.read().strip() or 'another trainer'}; "
                    "wait for it, or choose another directory with run.name=NAME."
                ) from error
            handle.truncate(0)
            handle.write(
                f"PID {os.getpid()} on {socket.gethostname()} since "
                f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
            )
            handle.flush()
            for folder in (self.checkpoints, self.snapshots):
                remove_partial_files(folder)
            yield

    def set_aside(self) -> None:
        """For ``run.fresh=true``: move an earlier run of this name out of the way; nothing is
        deleted.

        Raises:
            RunError: If a trainer is at work in it.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            stamp = time.strftime("%Y%m%d-%H%M%S")
            aside = self.path.with_name(f"{self.path.name}.before-{stamp}-{os.getpid()}")
            with self.owned():
                os.replace(self.path, aside)
            say(f"earlier run moved to {aside}")

    @property
    def identity(self) -> Identity:
        """Its configuration and who ran it, as kept in its directory."""
        alone = None if self.job is None else ["run.py", *self.overrides]
        return Identity(self.path, self.config, CHANGEABLE, alone)

    def check_config(self) -> None:
        """Hold this configuration to that of the run that is there, and write nothing.

        Raises:
            RunError: If the directory belongs to a run with other choices; they are listed.
        """
        self.identity.check(begun=bool(list_checkpoints(self.checkpoints)))

    def write_config(self) -> None:
        """Keep the configuration, or hold this one to that of the run that is there.

        Raises:
            RunError: If the directory belongs to a run with other choices; they are listed.
        """
        self.identity.write(begun=bool(list_checkpoints(self.checkpoints)))

    def set_state(self, state: str) -> None:
        """Note in ``run.json`` how far the run is: training, stopped, finished or failed."""
        self.identity.set_state(state)
