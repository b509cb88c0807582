"""Conformance: what an objective must hold, to be run on one of your own."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from score_models.model import ScoreModel
from score_models.objective import Objective
from score_models.parameterization import EDM
from sde_lib.batch_rows import BatchRows
from sde_lib.checks import ConformanceError
from sde_lib.processes import VPSDE
from sde_lib.sde import SDE

SIGMAS = 5  # standard errors that chance is allowed
STD = 0.6  # of the data that the exact score is of
BATCH, ROWS = 12, range(3, 8)
WAYS = 4  # in which the score can be wrong


def check_objective(
    objective: Objective,
    sde: SDE | None = None,
    *,
    shape: tuple[int, ...] = (3,),
    samples: int = 4000,
    seed: int = 0,
) -> None:
    r"""Check that an objective is one: on Gaussian data, whose score is known.

    Its draws are tensors with a row for each sample, on the CPU, and those of a row do not depend
    on which others are drawn; so it is with the loss [B]. Loss and gradients are finite. At the
    exact score the mean gradient vanishes, in four directions that the score could go wrong in:
    a proper objective is least there. The mean of the n per-sample gradients is allowed five
    times std / sqrt(n), as they are drawn independently, or one in each slice, which varies less.
    What the objective hears in ``observe`` alone decides its state.

    Args:
        objective: An instance of the class to check; a copy of it is prepared and used.
        sde: The process to check it on; VPSDE if not given.
        shape: Of one sample.
        samples: n.
        seed: Of all randomness.

    Raises:
        ConformanceError: With one sentence: what disagrees, by how much, and what it should be.
    """
    sde = VPSDE() if sde is None else sde
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        made = copy.deepcopy(objective)
        made.prepare(probed_model(sde), torch.zeros(2, *shape))
    finally:
        torch.set_rng_state(torch_state)
    _check_draws(made, sde, shape, seed)
    _check_loss(made, sde, shape, seed)
    _check_gradient(made, sde, (samples, *shape), seed)
    _check_state(made, sde, shape, seed)


class _Wrong(nn.Module):
    """Under EDM's parameterization of the data's spread zero is exact; this is what is added:
    four functions of input and noise level, a weight each, for each sample or for all."""

    def __init__(self, rows: int, weights: Tensor | None = None) -> None:
        super().__init__()
        weights = torch.zeros(rows, WAYS) if weights is None else weights
        self.weights = nn.Parameter(weights)
        self.leave = nn.Identity()

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        flat, level = x.flatten(1), noise_level[:, None].tanh()
        ways = torch.stack([torch.ones_like(flat), flat, level.expand_as(flat), level * flat], 1)
        wrong = (self.weights[:, :, None].to(x) * ways).sum(1)
        return self.leave(wrong.view_as(x))


def probed_model(sde: SDE, rows: int = 1, weights: Tensor | None = None) -> ScoreModel:
    """The exact score of data N(0, STD²), or what ``weights`` [rows, 4] add to it; they are
    parameters, 0 if not given, one row for all samples or one for each."""
    return ScoreModel(_Wrong(rows, weights), sde, EDM(STD))


def _data(shape: tuple[int, ...], seed: int) -> Tensor:
    return STD * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _refuse(objective: Objective, what: str) -> None:
    raise ConformanceError(f"{type(objective).__name__}: {what}")


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-6)


def _check_draws(objective: Objective, sde: SDE, shape: tuple[int, ...], seed: int) -> None:
    whole = objective.draw(sde, (BATCH, *shape), BatchRows(seed, BATCH))
    some = objective.draw(sde, (len(ROWS), *shape), BatchRows(seed, BATCH, ROWS))
    for name, drawn in whole.items():
        if drawn.ndim == 0 or len(drawn) != BATCH or drawn.device.type != "cpu":
            _refuse(
                objective,
                f"draw should give tensors on the CPU with one row a sample, {BATCH} here; "
                f"{name} is {tuple(drawn.shape)} on {drawn.device}.",
            )
        if not torch.equal(drawn[ROWS.start : ROWS.stop], some[name]):
            _refuse(
                objective,
                f"what draw gives for a row should not depend on which others are drawn; {name} "
                "does. Draw with sde_lib.noise.rand and randn, and what belongs to the whole "
                "batch from whole_batch.",
            )


def _check_loss(objective: Objective, sde: SDE, shape: tuple[int, ...], seed: int) -> None:
    x0 = _data((BATCH, *shape), seed)
    model = probed_model(sde, 1, torch.tensor([[0.3, -0.2, 0.1, 0.2]]))
    draws = objective.draw(sde, x0.shape, BatchRows(seed, BATCH))
    loss = objective.loss(model, x0, draws).detach()
    if loss.shape != (BATCH,) or not bool(loss.isfinite().all()):
        _refuse(
            objective,
            f"the loss should be finite, one number a sample, [{BATCH}]; got "
            f"{tuple(loss.shape)}, {loss.flatten()[:4].tolist()}...",
        )
    rows = slice(ROWS.start, ROWS.stop)
    some = {name: drawn[rows] for name, drawn in draws.items()}
    alone = objective.loss(model, x0[rows], some).detach()
    if not _same(alone, loss[rows]):
        _refuse(
            objective,
            "the loss of a sample should not depend on its batch mates; alone it differs by "
            f"{float((alone - loss[rows]).abs().max()):.3g}.",
        )


def _check_gradient(objective: Objective, sde: SDE, shape: tuple[int, ...], seed: int) -> None:
    model, x0 = probed_model(sde, shape[0]), _data(shape, seed + 1)
    objective(model, x0, BatchRows(seed + 1, shape[0])).sum().backward()
    each = model.network.weights.grad  # [n, WAYS]: each sample has weights of its own
    own = objective.parameters() if isinstance(objective, nn.Module) else []
    found = [each, *(p.grad for p in own if p.grad is not None)]
    if each is None or not all(bool(g.isfinite().all()) for g in found):
        _refuse(objective, "the gradients should be finite, and the model should get one.")
    if not bool(each.any()):
        _refuse(objective, "the gradient of the model is zero: the loss does not depend on it.")
    mean, error = each.mean(0), each.std(0) / math.sqrt(len(each))
    excess = (mean.abs() / error.clamp(min=1e-30)).nan_to_num()
    if bool((excess > SIGMAS).any()):
        i = int(excess.argmax())
        _refuse(
            objective,
            "at the exact score of Gaussian data the mean gradient should vanish; in direction "
            f"{i} it is {float(mean[i]):.4g}, {float(excess[i]):.1f} standard errors from 0 "
            f"over {len(each)} samples, allowed {SIGMAS}.",
        )


def _check_state(objective: Objective, sde: SDE, shape: tuple[int, ...], seed: int) -> None:
    x0, model = _data((BATCH, *shape), seed), probed_model(sde)
    draws = objective.draw(sde, x0.shape, BatchRows(seed, BATCH))
    twins = [copy.deepcopy(objective) for _ in range(2)]
    for twin in twins:
        twin.observe(draws, twin.loss(model, x0, draws).detach())
    if not isinstance(objective, nn.Module):
        return
    one, other = (twin.state_dict() for twin in twins)
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    if differ:
        _refuse(
            objective,
            "its state should be a function of the draws and losses it is told in observe; "
            f"{differ[0]} is not.",
        )
