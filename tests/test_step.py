"""A step: half precision, parts of a batch, memory that runs out, faults kept on the device."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_training import (
    OBJECTIVE,
    SHORT,
    Spied,
    assert_same,
    levels_data,
    small_state,
    state_of,
    train,
)
from torch import nn
from torch.testing import assert_close

from experiment.batches import Recipe
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.faults import Faults
from experiment.speed import LossScale, Speed
from experiment.state import State
from score_models import (
    EDM,
    Classes,
    DenoisingScoreMatching,
    ScoreModel,
    SlicedScoreMatching,
    noise_regression,
)
from score_models.networks import MLP, UNet
from sde_lib import VPSDE
from sde_lib.oracles import Gaussian

PLAIN = replace(SHORT, steps=6)


def plain_state(settings=PLAIN, network=MLP, **how):
    """Without dropout: parts of a batch have masks of their own."""
    torch.manual_seed(1)
    model = ScoreModel(network((2,), width=16, blocks=1), VPSDE(), EDM(data_std=0.5))
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.3)
    return state_of(model, settings, **how)


class Small(MLP):
    """A network for which more than five rows are too many."""

    most = 5

    def forward(self, x, noise_level, cond=None):
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return super().forward(x, noise_level, cond)


def test_where_memory_runs_out_the_rows_come_in_parts_with_the_same_gradient(tmp_path, capsys):
    whole = plain_state()
    train(whole, tmp_path, PLAIN)
    halved = plain_state(network=Small)
    train(halved, tmp_path, PLAIN)
    for a, b in zip(whole.weights, halved.weights, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(" the")[0] for line in said] == [
        "from now on 8 samples at once,",
        "from now on 4 samples at once,",
    ]


def test_a_sample_that_does_not_fit_alone_stops_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(Small, "most", 0)
    state = plain_state(network=Small)
    with pytest.raises(MemoryError, match="with 1 samples at once; use a smaller network"):
        train(state, tmp_path, PLAIN)


def full(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")


@pytest.mark.parametrize(
    "place, name", [(torch, "zeros_like"), (torch.Tensor, "clone")], ids=["optimizer", "averages"]
)
def test_what_stays_in_memory_is_made_before_the_first_iteration_or_refused_there(
    monkeypatch, place, name
):
    state = plain_state()
    loss = OBJECTIVE(state.model, torch.ones(4, 2)).mean()
    loss.backward()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", full)  # by which AdamW makes its numbers, if it has to
        patch.setattr(torch.Tensor, "clone", full)
        state.update(loss.detach(), 1e-3, 1.0)
    assert all(float(own["step"]) == 1 for own in state.optimizer.state.values())
    monkeypatch.setattr(place, name, full)
    with pytest.raises(
        MemoryError, match="before the first iteration.*AdamW.*fewer averages.*fsdp"
    ):
        plain_state()


def test_a_compiled_network_trains_as_a_plain_one_and_is_stored_under_plain_names(tmp_path):
    """By the backend that only takes the graph: code for the machine takes a minute to make."""
    curves, states = [], []
    for backend in (None, "aot_eager"):
        state = plain_state()
        if backend is not None:
            network = torch.compile(state.model.network, backend=backend)
            state.loss.model._modules["network"] = network
        _, events = train(state, tmp_path, PLAIN)
        curves.append([v["train/loss"] for kind, _, v in events if kind == "log"])
        states.append(state.state_dict())
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, values in states[0]["ema"].items():
        assert_close(states[1]["ema"][name], values, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_compiled_is_refused_before_training(monkeypatch):
    cpu, plain = torch.device("cpu"), DenoisingScoreMatching(noise_regression)
    by_parts = SlicedScoreMatching(noise_regression)
    Speed().check(by_parts, cpu)
    with pytest.raises(RunError, match="no second derivatives, of which SlicedScoreMatching"):
        Speed(compile=True).check(by_parts, cpu)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("CXX", "mine")
    with pytest.raises(RunError, match=r"a C\+\+ compiler .* none of mine, g\+\+, clang"):
        Speed(compile=True).check(plain, cpu)
    monkeypatch.setattr("shutil.which", lambda name: name == "mine" or None)
    Speed(compile=True).check(plain, cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_between_log_points_the_host_does_not_wait_for_a_gpu(tmp_path):
    torch.manual_seed(1)
    model = ScoreModel(MLP((2,), width=16, blocks=1), VPSDE(), EDM(data_std=0.5)).cuda()
    settings = replace(PLAIN, steps=30, log_every=10, checkpoint_every=30)
    state, step = state_of(model, settings), State.update

    def guarded(self, *arguments):
        # what a line of the record or a checkpoint asks for comes after the update
        torch.cuda.set_sync_debug_mode("error" if (self.iteration + 1) % 10 else "default")
        return step(self, *arguments)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(State, "update", guarded)
            assert train(state, tmp_path, settings)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_of_the_network_alone_and_learns_as_float32_does(tmp_path, precision):
    source = Gaussian(torch.zeros(2), torch.tensor([1.5, 0.5]))
    draws = [source.sample(4000, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    data, settings = Dataset("gaussian", *draws), replace(SHORT, steps=150, batch_size=128)
    curves, seen = [], []

    def spy(x0, losses):
        seen.append(losses.dtype)
        return losses

    for speed in (Speed(), Speed(precision=precision)):
        state = plain_state(settings, speed=speed)
        _, events = train(state, tmp_path, settings, data=data)
        curves.append([v["train/loss"] for kind, _, v in events if kind == "log"])
        assert {w.dtype for w in state.weights} == {torch.float32}
        assert {w.dtype for w in state.averages[0].weights} == {torch.float32}
    exact, half = (torch.tensor(curve) for curve in curves)
    assert not torch.equal(exact, half)
    # batches, times and noise are the same, so that curves differ by rounding alone
    assert float((half - exact).abs().mean() / exact.mean()) < 0.02

    state = plain_state(settings, speed=Speed(precision=precision))
    state.trained.objective = Spied(spy)
    state.loss.objective = state.trained.objective
    train(state, tmp_path, replace(settings, steps=1), data=data)
    assert seen == [torch.float32], "preconditioning and loss stay in float32"


def test_a_gradient_that_overflows_halves_the_loss_scale_and_is_no_fault(tmp_path):
    state, overflows = small_state(), {2, 3}

    def spoil(x0, loss):
        return loss * math.inf if state.iteration in overflows else loss

    state = small_state(after=spoil)
    state.scale = LossScale(state.device, start=1024.0, patience=3)
    before = [w.detach().clone() for w in state.weights]
    _, events = train(state, tmp_path, SHORT)
    scales = [v["train/loss_scale"] for kind, _, v in events if kind == "log"]
    assert scales == [1024, 1024, 512, 256, 256, 256, 512, 512]
    assert state.faults.skipped == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, state.weights, strict=True))
    assert all(bool(w.isfinite().all()) for w in state.weights)


def test_a_loss_scale_changes_no_gradient(tmp_path):
    exact, scaled = plain_state(), plain_state()
    scaled.scale = LossScale(scaled.device, start=4096.0)
    train(exact, tmp_path, PLAIN)
    train(scaled, tmp_path, PLAIN)
    for a, b in zip(exact.weights, scaled.weights, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_one_fault_too_many_freezes_the_weights_until_somebody_asks():
    faults, nan, one = (
        Faults(torch.device("cpu"), allowed=1),
        torch.tensor(math.nan),
        torch.ones(()),
    )
    bad = [False, True, False, True, False, True]
    left_out = [
        bool(faults.note(torch.tensor(b), nan if b else one, one * n, n))
        for n, b in enumerate(bad)
    ]
    assert left_out == [False, True, False, True, True, True]
    assert int(faults.fatal) == 3 and faults.skipped == 1
    loss, norm = faults.values.tolist()
    assert math.isnan(loss) and norm == 3.0


def test_a_device_that_nobody_waits_for_leaves_out_the_same_updates(tmp_path):
    """What a GPU does, on tensors that a CPU computes: the optimiser is told by a flag."""
    straight, state = plain_state(), plain_state()
    train(straight, tmp_path, PLAIN, should_stop=lambda: straight.iteration == 3 and 1)
    train(state, tmp_path, PLAIN, should_stop=lambda: state.iteration == 3 and 1)
    for weight in state.weights:
        weight.grad = torch.full_like(weight, math.nan)
    state.optimizer.grad_scale = torch.tensor(1.0)
    state.optimizer.found_inf = torch.tensor(1.0)
    state.optimizer.step()
    assert_same(state.state_dict(), straight.state_dict())


def test_the_record_says_how_often_the_gradient_was_clipped(tmp_path):
    for clip, share in ((1e-3, 1.0), (1e9, 0.0)):
        settings = replace(SHORT, clip=clip)
        _, events = train(small_state(settings), tmp_path, settings)
        logged = [values for kind, _, values in events if kind == "log"]
        assert {values["train/clipped"] for values in logged} == {share}
        assert all(values["perf/memory_gb"] > 0.01 for values in logged)
        assert all(0 <= values["perf/waiting"] <= 1 for values in logged)


def test_conditioning_and_its_dropout_are_functions_of_the_row():
    data, labels = levels_data(), torch.arange(40)
    data = replace(data, cond=Classes(40), train_cond=labels, test_cond=labels[:4])
    recipe = Recipe(data, data.units, OBJECTIVE, VPSDE(), 16, seed=0, label_dropout=0.3)
    dropped = torch.cat([recipe(i, range(16)).cond for i in range(200)]) == 40
    assert abs(float(dropped.float().mean()) - 0.3) < 5 * math.sqrt(0.21 / dropped.numel())
    whole = recipe(3, range(16))
    assert torch.equal(recipe(3, range(5, 9)).cond, whole.cond[5:9])
    kept = whole.cond < 40
    assert torch.equal(whole.cond[kept], recipe.batches(3)[kept]), "labels go with their samples"


def image_state(speed: Speed | None = None):
    torch.manual_seed(1)
    network = UNet((3, 8, 8), width=8, multipliers=(1,), blocks=1, attention=(), heads=2)
    model = ScoreModel(network, VPSDE(), EDM(data_std=0.5))
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.1)
    return state_of(model, PLAIN, speed=speed)


def image_data() -> Dataset:
    values = torch.randint(8, (40, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    return Dataset("images", values, values[:4], levels=8)


@pytest.mark.parametrize("first, then", [(False, True), (True, False)], ids=str)
def test_a_run_goes_on_with_another_layout_in_memory(tmp_path, first, then):
    ends = []
    for layouts in ((first, first), (first, then)):
        state = image_state(Speed(channels_last=layouts[0]))
        train(state, tmp_path, PLAIN, data=image_data(), should_stop=lambda: state.iteration == 3)  # noqa: B023
        stored = state.state_dict() | {"iteration": 3}
        state = image_state(Speed(channels_last=layouts[1]))
        state.load(stored)
        train(state, tmp_path, PLAIN, data=image_data())
        strides = {w.stride() for w in state.weights if w.ndim == 4 and w.shape[-1] > 1}
        assert all((stride[1] == 1) == layouts[1] for stride in strides)
        assert [w.stride() for w in state.averages[0].weights] == [
            w.stride() for w in state.weights
        ]
        ends.append(state)
    for a, b in zip(ends[0].weights, ends[1].weights, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_layout_of_images_is_for_images_alone():
    volume = UNet((1, 8, 8, 8), width=8, multipliers=(1,), blocks=1, attention=(), heads=2)
    model = ScoreModel(volume, VPSDE(), EDM(data_std=0.5))
    Speed(channels_last=True).of_model(model, torch.device("cpu"))
    assert all(w.is_contiguous() for w in model.parameters())
    with pytest.raises(RunError, match="fsdp cuts weights along their rows"):
        Speed(channels_last=True).of_model(model, torch.device("cpu"), contiguous=True)


def test_what_is_frozen_or_not_used_stays_and_the_rest_is_trained(tmp_path):
    torch.manual_seed(1)
    network = MLP((2,), width=16, blocks=1)
    network.unused = nn.Linear(2, 2)
    model = ScoreModel(network, VPSDE(), EDM(data_std=0.5))
    network.enter.weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    state = state_of(model, PLAIN)
    train(state, tmp_path, PLAIN)
    changed = {n for n, w in network.state_dict().items() if not torch.equal(w, before[n])}
    assert not changed & {"enter.weight", "unused.weight", "unused.bias"}
    assert {"enter.bias", "leave.2.weight"} <= changed
    again = state_of(ScoreModel(copy.deepcopy(network), VPSDE(), EDM(0.5)), PLAIN)
    again.load(state.state_dict() | {"iteration": state.iteration})
    for part in ("model", "ema", "averages"):
        assert_same(again.state_dict()[part], state.state_dict()[part])


def test_a_loss_scale_that_has_fallen_to_one_stays_there():
    scale = LossScale(torch.device("cpu"), start=2.0)
    scale.adapt(torch.tensor(True))
    again = LossScale(torch.device("cpu"), start=2.0)
    again.load_state_dict(scale.state_dict())
    assert float(again.factor) == 1.0
    other = LossScale(torch.device("cpu"), start=1.0)
    other.load_state_dict(again.state_dict() | {"factor": torch.tensor(8.0)})
    assert float(other.factor) == 1.0, "a run in another precision has its own"
