"""Variance heads on disk: trained for one model, kept by the digest of its weights, or with it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.checkpoint import load_checkpoint, write_atomically
from experiment.errors import RunError
from score_models import ScoreModel
from score_models.variance_head import VarianceHead, head_of
from score_models.variance_kinds import KINDS, HeadKind, interpolated_variance
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
    x0 = torch.zeros(1, *shape, device=next(model.parameters()).device)
    cond = None if model.cond is None else model.cond.null(1, x0.device)
    return head_of(model, x0, cond, settings.width, settings.blocks)


def head_path(kind: str, weights: str, folder: Path) -> Path:
    """Where the finished head of these weights is kept."""
    return folder / f"head-{kind}-{weights[:16]}.pt"


def unfinished_path(kind: str, weights: str, folder: Path) -> Path:
    """Where one is kept while it is trained: never in the place of a finished one."""
    return folder / f"unfinished-{kind}-{weights[:16]}.pt"


def keep_head(
    path: Path,
    weights: str,
    settings: HeadSettings,
    analytic: AnalyticVariance,
    head: VarianceHead,
    **more: object,
) -> None:
    """Write a head with all that it takes to use it, at once or not at all; :class:`StoredHead`
    says what else there may be."""
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


@dataclass(frozen=True)
class StoredHead:
    """A head as a file holds it.

    Args:
        settings: It was trained with.
        analytic: The isotropic variance that it starts from.
        head: On the CPU.
        finished: Whether all iterations were done.
        seed: Of its training; None if the file does not say.
        gains: What a finished one was found to gain, as lines.
        iteration: How many an unfinished one has behind it.
        optimizer: Its state there.
    """

    settings: HeadSettings
    analytic: AnalyticVariance
    head: VarianceHead
    finished: bool = False
    seed: int | None = None
    gains: Sequence[str] = ()
    iteration: int = 0
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> StoredHead:
        """What :func:`keep_head` wrote; raises whatever a damaged file makes it raise."""
        settings = HeadSettings(**content["settings"])
        shapes = (tuple(content[part]) for part in ("features", "shape"))
        head = VarianceHead(*shapes, settings.width, settings.blocks)
        head.load_state_dict(content["head"])
        more = {name: content[name] for name in MORE if name in content}
        return cls(settings, AnalyticVariance(**content["analytic"]), head, **more)

    def differences(self, settings: HeadSettings, seed: int) -> str:
        """The choices that were others then, as ``name=value``; empty if none was."""
        then, now = asdict(self.settings), asdict(settings)
        then, now = then | {"seed": self.seed}, now | {"seed": seed}
        return ", ".join(f"{name}={then[name]}" for name in then if then[name] != now[name])

    def starts_from(self, analytic: AnalyticVariance) -> bool:
        """Whether it is this very variance that the head starts from."""
        own = self.analytic
        return (
            torch.equal(own.clock, analytic.clock.cpu())
            and torch.equal(own.unresolved, analytic.unresolved.cpu())
            and own.decoder_std == analytic.decoder_std
        )


MORE = ("finished", "seed", "gains", "iteration", "optimizer")


def read_head(path: Path, kind: str, weights: str) -> StoredHead | None:
    """What is in ``path``; None if there is nothing, or of other weights. Runs nothing that it
    holds.

    Raises:
        RunError: If it is damaged.
    """
    with undamaged(path, kind):
        if not path.exists():
            return None
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError("a torch file, and no dictionary")
        return StoredHead.of(content) if content["weights"] == weights else None


@contextlib.contextmanager
def undamaged(path: Path, kind: str) -> Iterator[None]:
    """Say of all that goes wrong inside that the head of this ``kind`` in ``path`` is damaged.

    Raises:
        RunError: Saying what to do.
    """
    try:
        yield
    except Exception as error:  # a dozen types, by what is damaged
        raise RunError(
            f"variance head {path} is damaged or none of ours ({type(error).__name__}); delete "
            f"it, or train it anew: `python run.py mode=train_variance mode.kind={kind} "
            "mode.fresh=true` with the same choices."
        ) from error


def kept_head(name: str, weights: str, folder: Path, model: ScoreModel) -> StateVariance | None:
    """The variance of a head whose training is finished; None where there is none.

    Args:
        name: npr, sn or learned.
        weights: Digest of the checkpoint of ``model``.
        folder: Where heads are kept.
        model: Whose features the head is on.

    Raises:
        RunError: If its file is damaged.
    """
    stored = read_head(head_path(name, weights, folder), name, weights)
    if stored is None or not stored.finished:
        return None
    head = stored.head.to(next(model.parameters()).device)
    return variance_of_head(model, head, stored.settings, stored.analytic)


OBJECTIVE = "objective_ema"  # of a checkpoint: the averaged state of an objective with weights
JOINT = "variance.head."  # in the names of that state: a head that was trained with the network


def learned_variance(
    checkpoint: Path,
    weights: str,
    model: ScoreModel,
    shape: tuple[int, ...],
    *,
    folder: Path,
    objective: Mapping[str, Tensor] | None = None,
) -> StateVariance | None:
    """The learned variance of a model: by mode=train_variance, or else by the objective that the
    model itself was trained with; None where there is neither.

    Args:
        checkpoint: Of ``model``.
        weights: Its digest.
        model: Whose features the head is on.
        shape: Of one sample.
        folder: Where heads are kept.
        objective: The averaged state of the objective that goes with ``model``; if not given, that
            of the average that training evaluates.

    Raises:
        RunError: If a file is damaged.
    """
    kept = kept_head("learned", weights, folder, model)
    if kept is not None:
        return kept
    state = load_checkpoint(checkpoint).get(OBJECTIVE) if objective is None else objective
    state = state or {}
    own = {name.partition(JOINT)[2]: value for name, value in state.items() if JOINT in name}
    if not own:
        return None
    width = len(own["enter.weight"])
    blocks = len({name.split(".")[1] for name in own if name.startswith("blocks.")})
    head = new_head(model, shape, HeadSettings("learned", width=width, blocks=blocks))
    head.load_state_dict(own)
    return interpolated_variance(model, head.eval().requires_grad_(False))


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
