"""One process of several: trains a small model; for tests/test_processes.py."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from test_training import SHORT, levels_data, train

from experiment import processes
from experiment.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from experiment.speed import Speed
from experiment.state import State
from score_models import (
    EDM,
    Classes,
    DenoisingScoreMatching,
    ScoreModel,
    UniformTimes,
    noise_regression,
)
from score_models.networks import MLP
from sde_lib import VPSDE


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
        what: plain or conditional.
    """
    os.environ.update(about)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = SHORT.__class__(**{**vars(SHORT), "batch_size": batch_size, "power_ema": [0.1]})
    data, cond = levels_data(), None
    if what == "conditional":
        cond, labels = Classes(5), torch.arange(len(data.train)) % 5
        data = replace(data, cond=cond, train_cond=labels, test_cond=labels[: len(data.test)])
    network = MLP((2,), width=16, blocks=2, cond=cond)
    model = ScoreModel(network, VPSDE(), EDM(data_std=0.5))
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    together = (
        processes.FSDP(smallest=300, timeout=60) if kind == "fsdp" else processes.DDP(timeout=60)
    )
    together.join()
    state = State(
        model,
        DenoisingScoreMatching(noise_regression, UniformTimes()),
        settings.profiles,
        settings.adam,
        speed=Speed(accumulate=parts),
        processes=together,
    )
    found = list_checkpoints(folder)
    if found:
        state.load(load_checkpoint(found[-1]))
    done, events = train(
        state, folder, settings, data=data, should_stop=lambda: state.iteration == stop and 1
    )
    stored, average = state.state_dict(), state.ema.state_dict()
    snapshot = state.snapshot()
    if together.rank == 0:
        losses = [values["train/loss"] for what, _, values in events if what == "log"]
        norms = [values["train/grad_norm"] for what, _, values in events if what == "log"]
        contents = {**stored, "losses": losses, "norms": norms, "whole": average, "done": done}
        contents["snapshot"] = snapshot
        save_checkpoint(folder, state.iteration, contents)
