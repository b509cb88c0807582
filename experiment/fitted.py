"""What a sampler has found out about a model, kept beside what it is about."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from experiment.checkpoint import write_atomically
from experiment.progress import say
from score_models import ScoreModel
from sde_lib.grids import FittedGrid
from sde_lib.samplers import Sampler


def fitted(
    sampler: Sampler,
    model: ScoreModel,
    like: torch.Tensor,
    *,
    checkpoint: Path,
    folder: Path,
) -> Sampler:
    """``sampler`` fitted to ``model``: as it was found before for the same weights, or anew.

    Args:
        sampler: As it was asked for.
        model: The weights of ``checkpoint``.
        like: A tensor [B, ...] like those to be sampled.
        checkpoint: Its digest names what is kept.
        folder: Where that is kept.
    """
    weights = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    kept = folder / f"grid-{weights[:16]}.json"
    if getattr(sampler, "grid", sampler) is None:
        grid = _read(kept, weights)
        if grid is not None:
            return replace(sampler, grid=grid)
    found = sampler.fitted(model.score, model.sde, like)
    if found is not sampler:
        grid = found.grid
        folder.mkdir(parents=True, exist_ok=True)
        content = {"weights": weights, "clock": grid.clock, "density": grid.density}
        write_atomically(kept, json.dumps(content).encode())
        say(f"steps fitted to the model, once: {kept}")
    return found


def _read(path: Path, weights: str) -> FittedGrid | None:
    """The grid in ``path``, if it is whole and of these weights."""
    try:
        content = json.loads(path.read_text())
        if content["weights"] != weights:
            return None
        return FittedGrid(tuple(content["clock"]), tuple(content["density"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
