"""What samplers have found out about a model, kept by the digest of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from experiment.checkpoint import write_atomically
from experiment.conditions import Conditions
from experiment.errors import RunError
from experiment.progress import say
from experiment.variance_heads import kept_head, learned_variance
from score_models import ScoreModel
from sde_lib.grids import FittedGrid
from sde_lib.reverse_variance import VARIANCES, AnalyticVariance, ReverseVariance
from sde_lib.samplers import Sampler
from sde_lib.samplers.flow_adams import RULES, Fit

Found = TypeVar("Found")


def fitted(
    sampler: Sampler,
    model: ScoreModel,
    like: Tensor,
    *,
    checkpoint: Path,
    folder: Path,
    conditions: Conditions | None = None,
    drawn_by: ScoreModel | None = None,
    objective: Mapping[str, Tensor] | None = None,
) -> Sampler:
    """``sampler`` with what it wants to know of ``model``: as it was found before for the same
    weights, or else found now and kept.

    Args:
        sampler: As it was asked for.
        model: The weights of ``checkpoint``.
        like: A tensor [B, ...] like those to be sampled.
        checkpoint: Its digest names what is kept.
        folder: Where that is kept.
        conditions: Of the samples. Steps are fitted under conditions of the training set, whatever
            is asked for; under guidance, or without condition, they are kept apart. None for a
            model without.
        drawn_by: The same weights as they will sample, in half precision or compiled: a variance
            head goes on its features. ``model`` if not given.
        objective: See :func:`experiment.variance_heads.learned_variance`.

    Raises:
        RunError: If it wants a variance and the mode that finds it has not run.
    """
    score = model.score if conditions is None else conditions.typical(model)
    if sampler.wanted:
        _refuse_changed(sampler, conditions)
        return sampler.given(
            {
                name: _variance_of(
                    name, sampler, drawn_by or model, like, checkpoint, folder, objective
                )
                for name in sampler.wanted
            }
        )
    if getattr(sampler, "grid", sampler) is not None:
        return sampler.fitted(score, model.sde, like)
    weights = digest_of(checkpoint)
    kind = f"grid-{sampler.steps:02d}" if sampler.tries else "grid"
    kept = _path(kind if conditions is None else kind + conditions.fit, weights, folder)
    fit = _read(kept, weights, _fit)
    if fit is None:
        fit = sampler.fit(score, model.sde, like)
        _write(kept, weights, clock=fit.grid.clock, density=fit.grid.density, rule=fit.rule)
        rule = f" by the rule {fit.rule!r}" if sampler.tries else ""
        say(f"steps fitted to the model{rule}, once: {kept}")
    return sampler.settled(fit)


def _refuse_changed(sampler: Sampler, conditions: Conditions | None) -> None:
    """A variance is that of the score that it was measured or trained on.

    Raises:
        RunError: Under guidance, or without the condition that the model was given then.
    """
    if conditions is not None and conditions.changed:
        raise RunError(
            f"{type(sampler).__name__} with variance={', '.join(sorted(sampler.wanted))} knows "
            f"the errors of the score under each condition, and these samples are to be drawn "
            f"{conditions}. Take another sampler, or mode.guidance=1 and no mode.cond=none."
        )


def _fit(content: dict[str, Any]) -> Fit:
    grid = FittedGrid(tuple(content["clock"]), tuple(content["density"]))
    if content["rule"] not in RULES:
        raise ValueError(content["rule"])
    return Fit(grid, content["rule"])


def _variance_of(
    name: str,
    sampler: Sampler,
    model: ScoreModel,
    like: Tensor,
    checkpoint: Path,
    folder: Path,
    objective: Mapping[str, Tensor] | None,
) -> ReverseVariance:
    """The variance of this name as it was found before."""
    if name == "analytic":
        variance = kept_variance(checkpoint, folder)
    elif name == "learned":
        shape = tuple(like.shape[1:])
        where = {"folder": folder, "objective": objective}
        variance = learned_variance(checkpoint, digest_of(checkpoint), model, shape, **where)
    else:
        variance = kept_head(name, digest_of(checkpoint), folder, model)
    if variance is None:
        raise RunError(
            f"{type(sampler).__name__} needs the {name} variance of {checkpoint} for "
            f"variance={name}; run `python run.py {VARIANCES[name].mode}` with the same choices "
            "first."
        )
    return variance


def kept_variance(checkpoint: Path, folder: Path) -> AnalyticVariance | None:
    """The analytic variance of the weights of ``checkpoint``, if mode=calibrate has run."""
    weights = digest_of(checkpoint)
    return _read(_path("variance", weights, folder), weights, _variance)


def keep_variance(variance: AnalyticVariance, checkpoint: Path, folder: Path) -> Path:
    """Write ``variance``, found for the weights of ``checkpoint``, and return where."""
    weights = digest_of(checkpoint)
    path = _path("variance", weights, folder)
    columns = {"clock": variance.clock.tolist(), "unresolved": variance.unresolved.tolist()}
    _write(path, weights, decoder_std=variance.decoder_std, **columns)
    return path


def _variance(content: dict[str, Any]) -> AnalyticVariance:
    clock, unresolved = (
        torch.tensor(content[key], dtype=torch.float64) for key in ("clock", "unresolved")
    )
    return AnalyticVariance(clock, unresolved, float(content["decoder_std"]))


def digest_of(checkpoint: Path) -> str:
    """What tells the weights of ``checkpoint`` from others."""
    with checkpoint.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _path(kind: str, weights: str, folder: Path) -> Path:
    return folder / f"{kind}-{weights[:16]}.json"


def _write(path: Path, weights: str, **content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"weights": weights, **content}).encode())


def _read(path: Path, weights: str, build: Callable[[dict[str, Any]], Found]) -> Found | None:
    """What is in ``path``, if it is whole and of these weights."""
    try:
        content = json.loads(path.read_text())
        return build(content) if content["weights"] == weights else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
