"""The training loop: it reaches the floor, a stop changes no bit, nothing bad enters silently."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from experiment.batches import Batches
from experiment.checkpoint import load_checkpoint, save_checkpoint
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.seeds import stream
from experiment.state import State
from experiment.training import Training, fit
from score_models import (
    EDM,
    DenoisingScoreMatching,
    Noise,
    Objective,
    ScoreModel,
    UniformTimes,
    noise_regression,
)
from score_models.networks import MLP
from sde_lib import VPSDE
from sde_lib.oracles import Gaussian

OBJECTIVE = DenoisingScoreMatching(noise_regression, UniformTimes())
SHORT = Training(steps=8, batch_size=16, lr=0.01, warmup=3, weight_decay=0.1, log_every=1)


class Dropped(nn.Module):
    """An MLP behind dropout, which draws from torch's global stream."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.mlp = MLP((2,), width=8, blocks=1)

    def forward(self, x, noise_level, cond=None):
        return self.mlp(self.dropout(x), noise_level, cond)


class Spied(Objective):
    """The usual objective, whose losses [B] pass through ``after(x0, losses)``."""

    def __init__(self, after) -> None:
        self.after = after

    def draw(self, sde, shape, generator):
        return OBJECTIVE.draw(sde, shape, generator)

    def loss(self, model, x0, draws, cond=None):
        return self.after(x0, OBJECTIVE.loss(model, x0, draws, cond))


def state_of(
    model: ScoreModel, settings: Training, objective: Objective = OBJECTIVE, **how
) -> State:
    return State(model, objective, settings.profiles, settings.adam, **how)


def small_state(settings: Training = SHORT, seed: int = 0, after=None, **how) -> State:
    torch.manual_seed(seed)
    objective = OBJECTIVE if after is None else Spied(after)
    model = ScoreModel(Dropped(), VPSDE(), EDM(data_std=0.5))
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.3)  # no zeros, so that every weight has a gradient
    return state_of(model, settings, objective, **how)


def levels_data(size: int = 40) -> Dataset:
    """Data of eight levels, whose dequantization is random too."""
    values = torch.randint(8, (size, 2), generator=torch.Generator().manual_seed(1))
    return Dataset("levels", values, values[:4], levels=8)


def train(state: State, folder, settings: Training = SHORT, **changes) -> tuple[bool, list]:
    """Run ``fit`` with callbacks that note what was called when."""
    events: list[tuple[str, int, Any]] = []
    options = {
        "data": levels_data(),
        "on_log": lambda values, iteration: events.append(("log", iteration, values)),
        "on_checkpoint": lambda s: events.append(("checkpoint", s.iteration, None)),
        "on_evaluate": lambda s: events.append(("evaluate", s.iteration, None)),
        "should_stop": lambda: False,
        **changes,
    }
    data = options.pop("data")
    done = fit(state, data, settings, seed=5, failure_folder=folder, **options)
    return done, events


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list | tuple):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, node


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two states agree in every key, number and bit."""
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        equal = torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key]
        assert equal, key


def test_a_gaussian_is_learned_to_the_floor_of_its_loss_within_five_percent(tmp_path):
    correlation, sde = torch.tensor([[1.0, 0.8], [0.8, 1.0]]), VPSDE()
    std = torch.tensor([2.0, 0.5])
    source = Gaussian(torch.tensor([3.0, -1.0]), covariance=correlation * std[:, None] * std)
    draws = [source.sample(20_000, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    data = Dataset("gaussian", *draws)
    # standardised data have the correlation as covariance; along its axes, of variance v, the part
    # of the noise that no network can know is alpha² v / (alpha² v + sigma²)
    t = torch.linspace(sde.t_min, sde.t_max, 20_001, dtype=torch.float64)
    signal = sde.alpha(t)[:, None] ** 2 * torch.linalg.eigvalsh(correlation.double())
    unknowable = (signal / (signal + sde.sigma(t)[:, None] ** 2)).mean(1)
    floor = float(torch.trapezoid(unknowable, t)) / (sde.t_max - sde.t_min)

    def test_loss(model):
        with torch.no_grad():
            x0, generator = data.units.encode(data.test), torch.Generator().manual_seed(2)
            return float(OBJECTIVE(model, x0, generator).mean())

    settings = Training(steps=300, batch_size=256, lr=5e-3, warmup=20, ema=0.98)
    torch.manual_seed(0)
    model = ScoreModel(MLP((2,), width=32, blocks=1), sde, Noise(data_std=1.0))
    state = state_of(model, settings)
    before = test_loss(state.ema)
    train(state, tmp_path, settings, data=data)

    assert before == pytest.approx(1.0, rel=0.05), "it starts at the variance of the noise"
    assert test_loss(state.model) == pytest.approx(floor, rel=0.05)
    assert test_loss(state.ema) == pytest.approx(floor, rel=0.05)


# 40 samples, 16 a batch: the batch after 2 iterations spans two epochs, 5 iterations are two
@pytest.mark.parametrize("stops", [[2], [3], [5], [1, 4, 7]], ids=str)
def test_stop_and_resume_equals_a_straight_run_bit_for_bit(tmp_path, stops):
    straight = small_state()
    assert train(straight, tmp_path)[0] is True

    state = small_state()
    for number, stop in enumerate(stops):
        done, events = train(state, tmp_path, should_stop=lambda: state.iteration == stop)  # noqa: B023
        assert done is False and events[-1][:2] == ("checkpoint", stop)
        path = save_checkpoint(tmp_path, state.iteration, state.state_dict())
        state = small_state(seed=100 + number)  # another start, which the checkpoint replaces
        state.load(load_checkpoint(path))
        assert state.iteration == stop
        torch.manual_seed(number)  # nor does the global stream matter
    assert train(state, tmp_path)[0] is True

    assert state.iteration == straight.iteration == SHORT.steps
    assert_same(state.state_dict(), straight.state_dict())


def test_another_seed_is_another_run(tmp_path):
    runs = []
    for seed in (5, 6):
        state = small_state()
        quiet = {name: lambda *_: None for name in ("on_log", "on_checkpoint", "on_evaluate")}
        fit(state, levels_data(), SHORT, seed=seed, failure_folder=tmp_path, **quiet)
        runs.append(state.model.state_dict())
    with pytest.raises(AssertionError):
        assert_same(*runs)


def test_after_the_last_iteration_nothing_is_left_to_do(tmp_path):
    state = small_state()
    train(state, tmp_path)
    before = copy.deepcopy(state.state_dict())
    assert train(state, tmp_path) == (True, [])
    assert_same(state.state_dict(), before)


@pytest.mark.parametrize("size, batch_size", [(40, 16), (7, 7), (10, 3), (5, 1), (12, 4)])
def test_each_sample_is_seen_exactly_once_in_every_epoch(size, batch_size):
    batches, epochs = Batches(size, batch_size, seed=0), 6
    seen = torch.cat([batches(i) for i in range(math.ceil(epochs * size / batch_size))])
    assert all(len(batches(i)) == batch_size for i in range(5))
    rows = seen[: epochs * size].reshape(epochs, size)
    assert bool((rows.sort(1).values == torch.arange(size)).all())
    assert len({tuple(row) for row in rows.tolist()}) > 1, "each epoch has its own order"


def test_batches_are_a_function_of_seed_and_iteration():
    forward = [Batches(10, 3, seed=7)(i) for i in range(20)]
    asked_backwards = Batches(10, 3, seed=7)
    for i in (19, 3, 4, 0, 11, 10, 3):
        assert torch.equal(asked_backwards(i), forward[i])
    other = [Batches(10, 3, seed=8)(i) for i in range(20)]
    assert not torch.equal(torch.cat(other), torch.cat(forward))


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match="batch_size=41 is larger than the training set of 40"):
        Batches(40, 41, seed=0)


def test_training_sees_each_sample_once_an_epoch(tmp_path):
    values = torch.arange(80.0).reshape(40, 2)
    data, seen = Dataset("counted", values, values[:4]), []

    def spy(x0, losses):
        seen.append(data.units.decode(x0)[:, 0].round())
        return losses

    train(small_state(after=spy), tmp_path, Training(steps=10, batch_size=16), data=data)
    epochs = torch.cat(seen).reshape(4, 40)
    assert bool((epochs.sort(1).values == values[:, 0]).all())


def test_streams_are_functions_of_seed_purpose_and_index():
    def draw(*key):
        return tuple(torch.rand(4, generator=stream(*key)).tolist())

    keys = [
        (0, "epoch", 0),
        (1, "epoch", 0),
        (0, "iteration", 0),
        (0, "epoch", 1),
        (2**62, "e", 0),
    ]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(0, "epoch", 0) == draw(0, "epoch", 0)


def test_learning_rate_warms_up_linearly_and_falls_along_a_cosine():
    flat = Training(steps=100, lr=0.5, warmup=10, decay=False)
    falling = Training(steps=100, lr=0.5, warmup=10, decay=True)
    for i in range(100):
        warm = 0.5 * min(1.0, (i + 1) / 10)
        assert flat.lr_at(i) == pytest.approx(warm, rel=1e-12)
        cosine = math.cos(math.pi * i / 200) ** 2  # (1 + cos 2a) / 2 = cos² a
        assert falling.lr_at(i) == pytest.approx(warm * cosine, rel=1e-12)
    assert Training(lr=0.5, warmup=0).lr_at(0) == 0.5
    assert falling.lr_at(100) == pytest.approx(0, abs=1e-16)


def test_the_optimiser_steps_with_the_scheduled_rate_and_decays_the_weights(tmp_path):
    settings = Training(
        steps=5,
        batch_size=8,
        lr=0.01,
        warmup=3,
        weight_decay=0.5,
        beta2=0.9,
        clip=1e9,
        log_every=1,
    )
    state = small_state(settings)
    used, weights, gradients = [], [], []

    def note(values, iteration):
        used.append((state.optimizer.param_groups[0]["lr"], values["train/lr"]))
        weights.append([p.detach().clone() for p in state.model.parameters()])
        gradients.append([p.grad.clone() for p in state.model.parameters()])

    start = [p.detach().clone() for p in state.model.parameters()]
    train(state, tmp_path, settings, on_log=note)
    assert used == [(settings.lr_at(i), settings.lr_at(i)) for i in range(5)]
    for index, (w, *path) in enumerate(zip(start, *weights, strict=True)):
        momentum, variance = torch.zeros(()), torch.zeros(())
        for i, after in enumerate(path):  # Loshchilov and Hutter 2019, algorithm 2
            g, rate = gradients[i][index], settings.lr_at(i)
            momentum = 0.9 * momentum + 0.1 * g
            variance = 0.9 * variance + 0.1 * g**2
            scale = (variance / (1 - 0.9 ** (i + 1))).sqrt() + 1e-8
            w = w * (1 - rate * 0.5) - rate * momentum / (1 - 0.9 ** (i + 1)) / scale
            assert_close(after, w, rtol=1e-4, atol=1e-6)


def test_ema_follows_its_recurrence_and_warms_up(tmp_path):
    settings = Training(steps=8, batch_size=16, lr=0.05, warmup=0, ema=0.3, log_every=1)
    state, live = small_state(settings), []
    start = [p.detach().double() for p in state.model.parameters()]

    def note(values, iteration):
        live.append([p.detach().double().clone() for p in state.model.parameters()])

    train(state, tmp_path, settings, on_log=note)
    decays = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3, 0.3]  # 4 / 13 is above 0.3
    for average, mean, *path in zip(state.ema.parameters(), start, *live, strict=True):
        for decay, weight in zip(decays, path, strict=True):
            mean = decay * mean + (1 - decay) * weight
        assert_close(average.double(), mean, rtol=1e-5, atol=1e-6)
        assert float((average - path[-1]).abs().max()) > 1e-4, "it lags behind"


def test_the_average_is_a_frozen_copy_in_evaluation_mode(tmp_path):
    state = small_state()
    train(state, tmp_path, should_stop=lambda: True)
    assert not any(p.requires_grad for p in state.ema.parameters())
    assert not any(module.training for module in state.ema.modules())
    assert all(module.training for module in state.model.modules())


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_logged(tmp_path, clip):
    settings, norms = Training(steps=4, batch_size=16, clip=clip, log_every=1), []
    state = small_state(settings)

    def note(values, iteration):
        gradients = torch.cat([p.grad.flatten() for p in state.model.parameters()])
        norms.append((float(gradients.norm()), values["train/grad_norm"]))

    train(state, tmp_path, settings, on_log=note)
    for left, logged in norms:
        assert logged > 1e-2
        assert left == pytest.approx(min(clip, logged), rel=1e-3)


def test_the_log_holds_the_mean_since_the_line_before(tmp_path):
    losses = []

    def spy(x0, loss):
        losses.append(float(loss.detach().mean()))
        return loss

    settings = Training(steps=5, batch_size=16, log_every=2)
    _, events = train(small_state(settings, after=spy), tmp_path, settings)
    logged = {i: values["train/loss"] for kind, i, values in events if kind == "log"}
    assert list(logged) == [2, 4, 5]
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert list(logged.values()) == pytest.approx(means, rel=1e-6)
    assert all(v["perf/images_per_s"] > 0 for kind, _, v in events if kind == "log")


def test_the_mean_of_the_log_leaves_out_what_was_passed_over(tmp_path):
    losses = []

    def spoiled(x0, loss):
        losses.append(float(loss.detach().mean()))
        return loss * math.nan if len(losses) == 2 else loss

    settings = Training(steps=3, batch_size=16, log_every=3, max_skipped=1)
    _, events = train(small_state(settings, after=spoiled), tmp_path, settings)
    (logged,) = (values for kind, _, values in events if kind == "log")
    assert logged["train/loss"] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-6)
    assert logged["train/skipped"] == 1


def test_callbacks_come_at_their_intervals_and_at_the_end(tmp_path):
    settings = Training(steps=8, batch_size=16, log_every=5, checkpoint_every=3, evaluate_every=4)
    done, events = train(small_state(settings), tmp_path, settings)
    assert done is True
    assert [event[:2] for event in events] == [
        ("checkpoint", 3),
        ("evaluate", 4),
        ("log", 5),
        ("checkpoint", 6),
        ("log", 8),
        ("checkpoint", 8),
    ]


def test_a_stop_is_logged_and_saved_at_once(tmp_path):
    settings, state = Training(steps=8, batch_size=16, evaluate_every=2), small_state()
    done, events = train(state, tmp_path, settings, should_stop=lambda: state.iteration == 2)
    assert done is False
    assert [event[:2] for event in events] == [("log", 2), ("checkpoint", 2)]


def multiply(loss: Tensor, factor: float) -> Tensor:
    return loss * factor


def spoil_the_gradient(loss: Tensor, factor: float) -> Tensor:
    loss.register_hook(lambda gradient: gradient * factor)
    return loss


def test_as_many_iterations_are_skipped_as_allowed_and_one_more_stops(tmp_path):
    def spoiled(x0, loss):
        return loss * math.nan if state.iteration in (1, 4) else loss

    state = small_state(after=spoiled)
    _, events = train(state, tmp_path, replace(SHORT, max_skipped=2))
    assert state.faults.skipped == 2 and state.iteration == SHORT.steps
    assert [values["train/skipped"] for kind, _, values in events if kind == "log"][-1] == 2
    assert all(bool(w.isfinite().all()) for w in state.model.parameters())
    restored = small_state()
    restored.load(state.state_dict() | {"iteration": state.iteration})
    assert restored.faults.skipped == 2, "the count survives a resume"

    state = small_state(after=spoiled)
    with pytest.raises(RunError, match="at iteration 4, after 1 skipped"):
        train(state, tmp_path, replace(SHORT, max_skipped=1))


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("spoil", [multiply, spoil_the_gradient])
def test_what_is_not_finite_stops_before_the_update_and_the_batch_is_saved(
    tmp_path, spoil, factor
):
    straight = small_state()
    train(straight, tmp_path, should_stop=lambda: straight.iteration == 3)
    batches = []

    def spoiled(x0, loss):
        batches.append(x0)
        return spoil(loss, factor) if len(batches) == 4 else loss

    state = small_state(after=spoiled)
    with pytest.raises(RunError) as caught:
        train(state, tmp_path / "run")

    (path,) = (tmp_path / "run").iterdir()
    for words in ("at iteration 3,", "weights are as before", str(path), "training.lr"):
        assert words in str(caught.value)
    assert state.iteration == 3 and len(batches) == 4
    assert_same(state.state_dict(), straight.state_dict())
    saved = torch.load(path, weights_only=True)
    assert saved["iteration"] == 3 and torch.equal(saved["batch"], batches[3])
    assert math.isfinite(saved["loss"]) == (spoil is spoil_the_gradient)
    assert_same({key: saved[key] for key in straight.state_dict()}, straight.state_dict())


COUNTS = ("steps", "batch_size", "warmup", "log_every", "checkpoint_every", "evaluate_every")


@pytest.mark.parametrize("name", COUNTS)
def test_counts_may_be_written_1e3_but_not_1_5(name):
    value = getattr(Training(**{name: 1e3}), name)
    assert value == 1000 and isinstance(value, int)
    for wrong in (1.5, "100", True, None, math.nan, math.inf, -1):
        with pytest.raises(ValueError, match=f"training needs {name} to be a whole number >= "):
            Training(**{name: wrong})


def test_counts_start_at_one_and_the_warm_up_at_zero():
    assert Training(warmup=0).warmup == 0
    for name in COUNTS:
        if name != "warmup":
            with pytest.raises(
                ValueError, match=f"{name} to be a whole number >= 1; got {name}=0"
            ):
                Training(**{name: 0})


@pytest.mark.parametrize(
    "name, good, bad, allowed",
    [
        ("lr", [1e-9, 10], [0, -1.0], "> 0"),
        ("clip", [1e-9, 1e9], [0.0, -1], "> 0"),
        ("weight_decay", [0, 2.0], [-1e-9], ">= 0"),
        ("ema", [0, 0.9999], [1.0, -0.1], ">= 0 and < 1"),
        ("beta2", [1e-9, 0.999], [0, 1], "> 0 and < 1"),
    ],
)
def test_rates_out_of_range_are_refused_with_the_range(name, good, bad, allowed):
    for value in good:
        assert getattr(Training(**{name: value}), name) == value
    for value in [*bad, "abc", math.nan, math.inf, True, None]:
        with pytest.raises(ValueError) as caught:
            Training(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"training needs {name} to be a finite number")
        assert f"; got {name}=" in message
        sign, bound = allowed.split(" and ")[0].split(" ")
        assert f"{sign} {bound}" in message and allowed.split(" and ")[-1] in message


@pytest.mark.parametrize("wrong", ["false", 0, None])
def test_decay_is_true_or_false(wrong):
    with pytest.raises(ValueError, match="training needs decay to be true or false; got decay="):
        Training(decay=wrong)
