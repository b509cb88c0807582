"""One process of several: trains a small model; for tests/test_processes.py."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # an optimiser asks for it; like the next, once for all processes forked here
import torch.distributed.fsdp  # noqa: F401
from test_step import image_data
from test_training import OBJECTIVE, SHORT, leaves, levels_data, train
from torch import nn

from experiment import processes
from experiment.averages import Exponential, Power
from experiment.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from experiment.data import Dataset
from experiment.snapshots import save_snapshot
from experiment.speed import Speed
from experiment.state import State
from score_models import (
    EDM,
    Classes,
    Hybrid,
    LearnedVariance,
    LossAwareLevels,
    Objective,
    ScoreModel,
    SlicedScoreMatching,
)
from score_models.networks import MLP, UNet
from sde_lib import VPSDE

AVERAGES = {"ema": [0.999, 0.5], "power_ema": [0.05, 0.1], "snapshot_every": 2}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    network: Callable[[], nn.Module] = partial(MLP, (2,), width=16, blocks=2)
    objective: Callable[[], Objective] = lambda: OBJECTIVE
    data: Callable[[], Dataset] = levels_data
    precision: str = "float32"
    weights_std: float = 0.3  # none is zero, so that each has a gradient


def labelled() -> Dataset:
    data = levels_data()
    labels = torch.arange(len(data.train)) % 5
    return replace(data, cond=Classes(5), train_cond=labels, test_cond=labels[: len(data.test)])


def sparing() -> nn.Module:
    """Computes activations twice; has weights that are frozen, and some that are not used."""
    network = UNet(
        (3, 8, 8), width=8, multipliers=(1,), blocks=1, attention=(), heads=2, dropout=0.0,
        checkpointing=True,
    )  # fmt: skip
    network.unused = nn.Linear(8, 64)
    network.enter.weight.requires_grad_(False)
    return network


CASES = {
    "plain": Case(),
    "conditional": Case(partial(MLP, (2,), width=16, blocks=2, cond=Classes(5)), data=labelled),
    "bfloat16": Case(precision="bfloat16"),
    "sliced": Case(objective=SlicedScoreMatching),
    # a head of its own, levels drawn by the losses of whole batches
    "heads": Case(
        sparing,
        lambda: Hybrid(LossAwareLevels(4, keep=2), LearnedVariance(width=8, blocks=1)),
        image_data,
        weights_std=0.1,
    ),
}


def join(about: dict[str, str]) -> None:
    """Become the process that the environment variables ``about``, as torchrun sets them, say."""
    os.environ.update(about)
    torch.set_num_threads(1)


def what_it_holds(about: dict[str, str], folder: Path) -> None:
    """Write what a process of FSDP holds of a model when it begins, and what it tells of it.

    Numbers are in units of the model's weights.
    """
    join(about)
    together, before = processes.FSDP(smallest=300, timeout=60), bytes_alive()
    together.join()
    model = ScoreModel(MLP((2,), width=64, blocks=2), VPSDE(), EDM(data_std=0.5))
    unit = sum(weight.nbytes for weight in model.parameters())
    profiles = [Exponential(0.9), Power(0.1), Power(0.2)]
    state = State(model, OBJECTIVE, profiles, {"lr": 1e-3}, processes=together)
    held = bytes_alive() - before
    told = sum(v.nbytes for _, v in leaves(state.state_dict()["averages"]))
    (folder / f"{together.rank}.json").write_text(json.dumps([held / unit, told / unit]))


def bytes_alive() -> int:
    """Of all plain tensors of this process, shared memory counted once; fakes have none."""
    gc.collect()
    found = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    parts = (getattr(tensor, "_local_tensor", tensor) for tensor in found)
    plain = (part for part in parts if type(part) in (torch.Tensor, torch.nn.Parameter))
    storages = [part.untyped_storage() for part in plain if not part.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def one_of_them(
    about: dict[str, str],
    kind: str,
    batch_size: int,
    parts: int,
    folder: Path,
    stop: int,
    what: str = "plain",
) -> None:
    """Train as the process that the environment variables ``about`` say.

    Args:
        about: As torchrun sets them.
        kind: ddp or fsdp.
        batch_size: Of all processes together.
        parts: That a share of it is worked through in.
        folder: For the result; training goes on from what is there.
        stop: Iterations after which to stop; 0 for none.
        what: One of ``CASES``.
    """
    join(about)
    torch.manual_seed(0)
    settings = SHORT.__class__(**{**vars(SHORT), "batch_size": batch_size, **AVERAGES})
    case = CASES[what]
    data, objective = case.data(), case.objective()
    model = ScoreModel(case.network(), VPSDE(), EDM(data_std=0.5))
    objective.prepare(model, data.units.encode(data.train[:2]))
    for weights in [*model.parameters(), *getattr(objective, "parameters", list)()]:
        nn.init.normal_(weights, std=case.weights_std)
    together = (
        processes.FSDP(smallest=300, timeout=60) if kind == "fsdp" else processes.DDP(timeout=60)
    )
    together.join()
    state = State(
        model,
        objective,
        settings.profiles,
        settings.adam,
        speed=Speed(accumulate=parts, precision=case.precision),
        processes=together,
    )
    found = list_checkpoints(folder)
    if found:
        state.load(load_checkpoint(found[-1]))

    def keep(state: State) -> None:
        averages = state.snapshot()
        if together.rank == 0:
            save_snapshot(folder / "snapshots", state.iteration, averages)

    stopping = {"should_stop": lambda: state.iteration == stop and 1, "on_snapshot": keep}
    done, events = train(state, folder, settings, data=data, **stopping)
    stored, average = state.state_dict(), state.ema.state_dict()
    if together.rank == 0:
        losses = [values["train/loss"] for what, _, values in events if what == "log"]
        norms = [values["train/grad_norm"] for what, _, values in events if what == "log"]
        contents = {**stored, "losses": losses, "norms": norms, "whole": average, "done": done}
        save_checkpoint(folder, state.iteration, contents)
