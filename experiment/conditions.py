"""Under what condition each sample is drawn or scored: by its own, by a fixed one, or by none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiment.data import Dataset, Samples
from experiment.errors import RunError
from experiment.seeds import hashed
from score_models import Conditioning, ScoreModel, classifier_free, conditioned
from sde_lib import validation

Score = Callable[[Tensor, Tensor], Tensor]
TYPICAL = 64  # conditions under which pilots look at a model
NONE = "none"  # of mode.cond and likelihood.cond
LISTED = 16  # classes at most that pictures have a row each for


def score_of_rows(model: ScoreModel, data: Dataset, part: str, count: int) -> Score:
    """The score under the conditions of the first ``count`` samples of a ``part``, train or test;
    ``model.score`` where there are none."""
    if data.cond is None:
        return model.score
    own: Samples = getattr(data, f"{part}_cond")
    device = next(model.parameters()).device
    return conditioned(model.score, own[:count].to(device), others=typical(data).to(device))


def score_for(model: ScoreModel, data: Dataset, part: str, count: int, cond: str) -> Score:
    """The score for the first ``count`` samples of a ``part``, as ``likelihood.cond`` has it."""
    return score_of_none(model) if cond == NONE else score_of_rows(model, data, part, count)


def score_of_each(model: ScoreModel, data: Dataset) -> Score:
    """The score whose row c is that of class c."""
    device = next(model.parameters()).device
    every = data.cond.each("likelihood.cond=marginal").to(device)
    return conditioned(model.score, every, others=typical(data).to(device))


def score_of_none(model: ScoreModel) -> Score:
    """The score without its condition."""
    device = next(model.parameters()).device
    return conditioned(model.score, model.cond.null(1, device))


def typical(data: Dataset) -> Tensor:
    """Conditions of training samples spread evenly over the set, in random order.

    Pilots look at a model under these, so that what they find does not depend on what is asked.
    """
    count = min(TYPICAL, len(data.train_cond))
    rows = torch.linspace(0, len(data.train_cond) - 1, count, dtype=torch.float64).long()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return data.train_cond[rows[order]]


def refuse_no_null(owner: str, label_dropout: float) -> None:
    """Refuse to leave out a condition that was never left out in training.

    Raises:
        RunError: Saying how to train.
    """
    if label_dropout == 0:
        raise RunError(
            f"{owner} asks for the score without condition, and this model has always been "
            "trained with one (training.label_dropout=0). Train with "
            "training.label_dropout=0.1, or leave it out."
        )


def in_turn(data: Dataset) -> list[int] | None:
    """All classes of the training set for a picture with a row each; None where that is too many
    rows, or there are no classes."""
    found = None if data.cond is None else data.cond.few(LISTED)
    if found is None:
        return None
    return [c for c in found if c in set(data.train_cond[:].tolist())]


@dataclass(frozen=True)
class Conditions:
    """The condition of each sample that is drawn, a function of the seed and its number alone.

    Args:
        data: What the model was trained on.
        seed: Of the run.
        asked: None draws conditions of training samples, so that the samples are a mixture as the
            data are; a condition is that of all samples, a list of them is taken in turn;
            ``"none"`` leaves it out.
        guidance: Scale of classifier-free guidance.
        label_dropout: Of the training.

    Raises:
        RunError: For what the data or the training of the model do not allow.
        ValueError: For what is no condition, or no scale.
    """

    data: Dataset
    seed: int
    asked: Any = None
    guidance: float = 1.0
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        scale = validation.real("mode=sample", "guidance", self.guidance, at_least=0)
        object.__setattr__(self, "guidance", scale)
        if self.spec is None:
            self._refuse_unconditional()
        elif self.without:
            refuse_no_null("mode.cond=none", self.label_dropout)
            if scale != 1:
                raise RunError(
                    f"mode.guidance={scale:g} strengthens a condition, and mode.cond=none leaves "
                    "it out. Drop one of the two."
                )
        elif scale != 1:
            refuse_no_null(f"mode.guidance={scale:g}", self.label_dropout)
        if self.spec is not None:
            self._listed()  # refuses what is none

    def _refuse_unconditional(self) -> None:
        if self.asked is not None or self.guidance != 1:
            given = "cond" if self.asked is not None else "guidance"
            raise RunError(
                f"mode.{given} is for a conditional model, and this one was trained on "
                f"{self.data.name} without conditions. Leave it out, or train one with "
                "data.conditional=true."
            )

    @property
    def spec(self) -> Conditioning | None:
        """What a condition is; None for an unconditional model."""
        return self.data.cond

    @property
    def without(self) -> bool:
        """Whether the condition is left out."""
        return self.spec is not None and self.asked == NONE

    @property
    def fixed(self) -> bool:
        """Whether all samples are under the same."""
        listed = None if self.spec is None else self._listed()
        return self.spec is None or listed is not None and len(listed) == 1

    @property
    def changed(self) -> bool:
        """Whether samples are of another score than the one that was trained on each condition:
        guided, or without."""
        return self.without or self.guidance != 1

    def _listed(self) -> Tensor | None:
        """The conditions taken in turn, [K, ...]; None if they are drawn."""
        if self.asked is None:
            return None
        return self.spec.null(1) if self.without else self.spec.read("mode.cond", self.asked)

    def of(self, rows: range) -> Tensor | None:
        """Those of the samples ``rows``; None for an unconditional model."""
        if self.spec is None:
            return None
        listed = self._listed()
        if listed is not None:
            return listed[torch.tensor(rows) % len(listed)]
        size = len(self.data.train_cond)
        return self.data.train_cond[
            torch.tensor([hashed(self.seed, "conditions", i) % size for i in rows])
        ]

    def score(self, model: ScoreModel, rows: range) -> Score:
        """The score of the samples ``rows``."""
        listed = None if self.spec is None else self._listed()
        one = listed is not None and len(listed) == 1
        return self._bound(model, listed if one else self.of(rows))

    def typical(self, model: ScoreModel) -> Score:
        """The score that pilots look at: the same guidance, under conditions of the training set,
        or under none where that is what is asked for."""
        if self.spec is None:
            return model.score
        return self._bound(model, self._listed() if self.without else typical(self.data))

    def _bound(self, model: ScoreModel, cond: Tensor | None) -> Score:
        if cond is None:
            return model.score
        device = next(model.parameters()).device
        cond = cond.to(device)
        others = cond if self.without else typical(self.data).to(device)
        if self.guidance == 1:
            return conditioned(model.score, cond, others=others)
        return classifier_free(model, cond, self.guidance, others=others)

    def density(self, model: ScoreModel) -> Score | None:
        """A score function of all samples together, whose density may be drawn; None if there is
        none."""
        if self.spec is None or (self.fixed and self.guidance == 1):
            return self.score(model, range(1))
        mixture = self.asked is None and self.guidance == 1 and self.label_dropout > 0
        return score_of_none(model) if mixture else None

    @property
    def fit(self) -> str:
        """What steps are fitted to, beside the weights; "" for the score that was trained."""
        if self.without:
            return "-unconditional"
        return f"-guided-{self.guidance:g}" if self.guidance != 1 else ""

    def turns(self) -> int | None:
        """How many conditions are taken in turn, if that is more than one."""
        listed = None if self.spec is None else self._listed()
        return None if listed is None or len(listed) == 1 else len(listed)

    def labels(self) -> list[str]:
        """Short names of the conditions taken in turn, where they have any."""
        listed = self._listed()
        return [f"{value}" for value in listed.tolist()] if listed.ndim == 1 else []

    def __str__(self) -> str:
        if self.spec is None:
            return ""
        if self.without:
            return "without condition"
        drawn = "under conditions of training samples"
        what = drawn if self.asked is None else f"under cond={self.asked}"
        return what + (f", guidance {self.guidance:g}" if self.guidance != 1 else "")

    def about(self) -> dict[str, Any]:
        """For the files: nothing for an unconditional model."""
        if self.spec is None:
            return {}
        asked = "training" if self.asked is None else self.asked
        return {"cond": asked, "guidance": self.guidance}
