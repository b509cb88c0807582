"""Variance heads on disk: trained for one model, kept by the digest of its weights."""

from __future__ import annotations

import io
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.checkpoint import write_atomically
from score_models import ScoreModel
from score_models.variance_head import VarianceHead
from score_models.variance_kinds import KINDS, HeadKind
from sde_lib import validation
from sde_lib.reverse_variance import AnalyticVariance
from sde_lib.state_variance import StateVariance


@dataclass(frozen=True)
class HeadSettings:
    """How a head is trained.

    Args:
        kind: npr, sn or learned.
        steps: Iterations of AdamW.
        batch_size: Training samples an iteration.
        lr: Learning rate after a short warm-up; it falls to zero along a cosine.
        width: Channels of the head.
        blocks: Its residual blocks.
        grid_steps: Of kind=learned: T of the bound that teaches it; 50 if not given.
    """

    kind: str = "npr"
    steps: int = 1500
    batch_size: int = 128
    lr: float = 2e-3
    width: int = 32
    blocks: int = 2
    grid_steps: int | None = None

    def __post_init__(self) -> None:
        owner = "mode=train_variance"
        validation.choice(owner, "kind", self.kind, KINDS)
        for name in ("steps", "batch_size", "width", "blocks"):
            whole = validation.count(owner, name, getattr(self, name))
            object.__setattr__(self, name, whole)
        validation.real(owner, "lr", self.lr, above=0)
        if self.grid_steps is None:
            return
        if self.kind != "learned":
            raise ValueError(
                f"{owner} has grid_steps for kind=learned alone: npr and sn are of a level, not "
                f"of a step; got grid_steps={self.grid_steps} with kind={self.kind}."
            )
        object.__setattr__(
            self, "grid_steps", validation.count(owner, "grid_steps", self.grid_steps)
        )

    def meaning(self, analytic: AnalyticVariance) -> HeadKind:
        """What the output of the head means and how it is taught."""
        options = {} if self.grid_steps is None else {"steps": self.grid_steps}
        return KINDS[self.kind](analytic, **options)


def new_head(model: ScoreModel, shape: tuple[int, ...], settings: HeadSettings) -> VarianceHead:
    """A head for the features of ``model``, from the global random stream.

    Raises:
        ValueError: If its network has no features.
    """
    device = next(model.parameters()).device
    level = torch.tensor(model.sde.t_max, dtype=torch.float64, device=device)
    features = model.features(torch.zeros(1, *shape, device=device), level)
    head = VarianceHead(tuple(features.shape[1:]), shape, settings.width, settings.blocks)
    return head.to(device)


def head_path(kind: str, weights: str, folder: Path) -> Path:
    """Where the head of these weights is kept."""
    return folder / f"head-{kind}-{weights[:16]}.pt"


def keep_head(
    path: Path,
    weights: str,
    settings: HeadSettings,
    analytic: AnalyticVariance,
    head: VarianceHead,
    **more: object,
) -> None:
    """Write a head with all that it takes to use it, at once or not at all."""
    columns = {"clock": analytic.clock.cpu(), "unresolved": analytic.unresolved.cpu()}
    content = {
        "weights": weights,
        "settings": asdict(settings),
        "features": list(head.features),
        "shape": list(head.shape),
        "analytic": {**columns, "decoder_std": analytic.decoder_std},
        "head": {name: value.cpu() for name, value in head.state_dict().items()},
        **more,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getbuffer())


def read_head(path: Path, weights: str) -> dict[str, Any] | None:
    """What is in ``path``, if it is whole and of these weights; runs nothing that it holds."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content if content["weights"] == weights else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError):
        return None
    except pickle.UnpicklingError:
        return None


def kept_head(name: str, weights: str, folder: Path, model: ScoreModel) -> StateVariance | None:
    """The variance of a head whose training is finished; None where there is none.

    Args:
        name: npr, sn or learned.
        weights: Digest of the checkpoint of ``model``.
        folder: Where heads are kept.
        model: Whose features the head is on.
    """
    content = read_head(head_path(name, weights, folder), weights)
    if content is None or not content.get("finished"):
        return None
    settings = HeadSettings(**content["settings"])
    shapes = (tuple(content[part]) for part in ("features", "shape"))
    head = VarianceHead(*shapes, settings.width, settings.blocks)
    head = head.to(next(model.parameters()).device)
    head.load_state_dict(content["head"])
    return variance_of_head(model, head, settings, AnalyticVariance(**content["analytic"]))


def variance_of_head(
    model: ScoreModel, head: VarianceHead, settings: HeadSettings, analytic: AnalyticVariance
) -> StateVariance:
    """The variance that a trained head makes, its numbers where the model is."""

    def there(column: Tensor) -> Tensor:
        return column.to(next(model.parameters()).device)

    near = replace(
        analytic, clock=there(analytic.clock), unresolved=there(analytic.unresolved)
    )  # else each step would wait for the copy
    head.eval().requires_grad_(False)
    return settings.meaning(near).variance(model, head)
