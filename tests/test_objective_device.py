"""On a GPU no objective waits for it, neither in its loss nor in what it hears of the losses."""

from __future__ import annotations

import pytest
import torch
from test_conf import GROUPS, compose

import run
from score_models import EDM, ScoreModel
from score_models.networks import MLP
from sde_lib import VPSDE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", GROUPS["objective"])
def test_an_objective_never_waits_for_the_gpu(choice: str) -> None:
    objective = run.instantiate(compose(f"objective={choice}")["objective"])
    model = ScoreModel(MLP((2,), width=8, blocks=1), VPSDE(), EDM(0.6)).cuda()
    x0 = torch.randn(32, 2, device="cuda")
    objective.prepare(model, x0)
    if isinstance(objective, torch.nn.Module):
        objective.cuda()
    draws = objective.draw(model.sde, x0.shape, torch.Generator().manual_seed(0))
    draws = {name: drawn.cuda() for name, drawn in draws.items()}
    objective.loss(model, x0, draws).sum().backward()  # what is copied once has been
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = objective.loss(model, x0, draws)
        loss.mean().backward()
        objective.observe(draws, loss.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(loss.isfinite().all())
