"""The same samples at less cost: half precision, compiled networks, captured trajectories."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from score_models import EDM, ScoreModel, faster
from score_models.networks import MLP
from sde_lib import VPSDE, BrownianPaths, Counted
from sde_lib.grids import UniformLogSNR
from sde_lib.noise import noise_over
from sde_lib.oracles import GaussianMixture
from sde_lib.reverse import Score
from sde_lib.samplers import (
    AdaptiveODE,
    Ancestral,
    Captured,
    DPMSolverPP,
    FlowAdams,
    Heun,
    OneStepSampler,
    PredictorCorrector,
    Sampler,
    TorchSDE,
)
from sde_lib.samplers.base import Noise, shortest
from sde_lib.samplers.captured import Tape, rehearse
from sde_lib.sde import Level

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@dataclass(frozen=True)
class Twice(OneStepSampler):
    """Draws two numbers a step: the increment of the path, and a fresh one."""

    stochastic = True

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        return nxt.sigma * (0.6 * noise() + 0.8 * noise()) + 0 * score(x, now.t)


PLANNED = {
    "twice": Twice,
    "flow_adams": partial(FlowAdams, grid=UniformLogSNR()),
    "ancestral": Ancestral,
    "dpmpp_sde": partial(DPMSolverPP, eta=1.0),
    "heun_churn": partial(Heun, churn=5.0),
    "predictor_corrector": PredictorCorrector,
}


@pytest.fixture
def model() -> ScoreModel:
    torch.manual_seed(0)
    network = MLP((2,), width=16, blocks=1)
    torch.nn.init.normal_(network.leave[-1].weight, std=0.2)
    return ScoreModel(network, VPSDE(), EDM(0.5)).eval().requires_grad_(False)


@pytest.mark.parametrize("make", PLANNED.values(), ids=PLANNED.keys())
def test_noise_played_from_a_tape_gives_the_same_samples(
    make: Callable[[int], Sampler], mixture: GaussianMixture
) -> None:
    """What a graph replays, without a graph: rehearse, fill the tape, follow the moves."""
    sde, score, sampler = VPSDE(), mixture.score(VPSDE()), make(7)
    x = sde.prior_sample((5, 2), generator=BrownianPaths(range(5)))
    wanted = list(sampler.trajectory(score, sde, x, generator=BrownianPaths(range(5))))

    tape = Tape(sampler.plan(sde).on(x), x)
    assert rehearse(sampler, sde, x, tape) == len(wanted) - 1
    tape.fill(noise_over(x, BrownianPaths(range(5)), shortest(tape.moves)))
    played = list(sampler.follow(tape.moves, score, x, tape.play()))

    assert [t for t, _ in played] == [t for t, _ in wanted]
    for (_, found), (_, state) in zip(played, wanted, strict=True):
        assert torch.equal(found, state)


@GPU
@pytest.mark.parametrize("make", PLANNED.values(), ids=PLANNED.keys())
def test_a_captured_trajectory_gives_the_same_samples(
    make: Callable[[int], Sampler], model: ScoreModel
) -> None:
    device, model = torch.device("cuda"), model.cuda()
    captured, sampler, score = Captured(make(7)), make(7), Counted(model.score)
    for batch in (range(64), range(64, 128)):
        x = model.sde.prior_sample((64, 2), generator=BrownianPaths(batch, device), device=device)
        wanted = sampler(model.score, model.sde, x, generator=BrownianPaths(batch, device))
        before, spent = score.nfe, Counted(model.score)
        sampler(spent, model.sde, x, generator=BrownianPaths(batch, device))
        found = captured(score, model.sde, x, generator=BrownianPaths(batch, device))
        assert_close(found, wanted)
        assert score.nfe - before == spent.nfe


@pytest.mark.parametrize("sampler", [AdaptiveODE(), TorchSDE()], ids=["adaptive", "torchsde"])
def test_samplers_without_a_plan_are_not_captured(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="Captured needs a sampler with a plan.*has none"):
        Captured(sampler)


def test_without_a_gpu_nothing_is_captured(mixture: GaussianMixture) -> None:
    with pytest.raises(ValueError, match="needs samples on a GPU; got device=cpu"):
        Captured(Ancestral(3))(mixture.score(VPSDE()), VPSDE(), torch.zeros(2, 2))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_network_in_half_precision_keeps_states_in_float32(
    model: ScoreModel, precision: str
) -> None:
    half, seen = faster(model, precision=precision), []
    hook = model.network.leave[-1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    x = model.sde.prior_sample((64, 2), generator=torch.Generator().manual_seed(0))

    ends = [Heun(8)(m.score, m.sde, x) for m in (model, half)]

    hook.remove()
    assert ends[1].dtype == torch.float32
    assert {torch.float32, getattr(torch, precision)} == set(seen)
    # the network is off by some units of the last of 8 or 11 bits, the end by a few times that
    unit = torch.finfo(getattr(torch, precision)).eps
    error = float((ends[1] - ends[0]).abs().max())
    assert 0 < error < 8 * unit * float(ends[0].abs().max())


def test_a_faster_model_shares_the_weights_and_leaves_the_other_as_it_is(
    model: ScoreModel,
) -> None:
    half = faster(model, precision="bfloat16")

    assert half.network.network is model.network
    assert half.network.leave is model.network.leave
    assert not half.training
    assert type(model.network) is MLP


def test_a_faster_model_keeps_its_class_and_every_mode() -> None:
    class Mine(ScoreModel):
        extra = 3

    mine = Mine(MLP((2,), width=8, blocks=1), VPSDE(), EDM(0.5)).train()
    mine.network.eval()

    half = faster(mine, precision="bfloat16")

    assert type(half) is Mine and half.extra == 3
    assert half.training and not half.network.training and not mine.network.training


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
def test_a_compiled_network_gives_the_same_samples(model: ScoreModel) -> None:
    compiled = faster(model, compile=True)
    x = model.sde.prior_sample((8, 2), generator=torch.Generator().manual_seed(0))

    ends = [
        Ancestral(3)(m.score, m.sde, x, generator=BrownianPaths(range(8)))
        for m in (model, compiled)
    ]

    assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    assert type(compiled.network) is not MLP


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8"}, "precision to be one of bfloat16, float16, float32; got"),
        ({"compile": "yes"}, "compile to be true or false"),
    ],
)
def test_impossible_ways_to_be_faster_are_refused(settings, message, model) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        faster(model, **settings)
