"""Features of a network: whose they are, and how often they are asked for anew."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from small_models import (
    ANALYTIC,
    SDE,
    Watched,
    picture_model,
    random_model,
    time,
    vector_model,
)
from torch import nn
from torch.testing import assert_close

from experiment.variance_heads import HeadSettings, new_head
from score_models import EDM, ScoreModel, faster


@pytest.fixture
def vectors() -> ScoreModel:
    return vector_model()


@pytest.fixture
def pictures() -> ScoreModel:
    return picture_model()


@pytest.mark.parametrize("make", ["vectors", "pictures"])
def test_the_features_are_what_the_output_is_made_of_and_cost_no_second_pass(make, request):
    model = request.getfixturevalue(make)
    model.network = watched = Watched(model.network)
    shape = (2,) if make == "vectors" else (1, 8, 8)
    x, t = torch.randn(3, *shape), time(0.3)
    model.features(x, t)  # from here on they are kept
    for evaluate in (model.score, model.noise, model.denoised):
        watched.passes = 0
        evaluate(x, t)
        features = model.features(x, t)
        assert watched.passes == 1
        level = torch.full((3,), 0.3)
        scaled = model.parameterization.input(level.double().exp())[0] * x / SDE.alpha(t)
        out = watched.leave(features).reshape(x.shape)
        assert_close(out, watched.network(scaled.float(), level, None), rtol=1e-4, atol=1e-5)


def test_features_of_another_state_are_never_handed_out(vectors):
    x, t = torch.randn(3, 2), time(0.3)
    first = vectors.features(x, t).clone()
    with torch.no_grad():
        other = x.clone().add_(1)
        vectors.score(other, t)  # somebody else's evaluation in between
        assert_close(vectors.features(x, t), first, rtol=0, atol=0)
        vectors.score(x, t)
        x.add_(1)  # written to since
        assert_close(vectors.features(x, t), vectors.features(other, t), rtol=0, atol=0)
        assert not torch.equal(vectors.features(x, time(0.4)), vectors.features(x, t))
    with torch.inference_mode():
        x = torch.randn(3, 2)
        vectors.score(x, t)
        assert vectors.features(x, t).shape == (3, 16)
    twin = copy.deepcopy(vectors)
    assert_close(twin.features(other, t), vectors.features(other, t), rtol=0, atol=0)


def test_a_network_without_a_last_layer_of_that_name_is_refused():
    model = ScoreModel(nn.Linear(2, 2), SDE, EDM(0.7))
    with pytest.raises(ValueError, match="Linear.*module called `leave`.*MLP and UNet do"):
        model.features(torch.zeros(1, 2), time(0.0))


def test_a_pass_that_hides_its_last_layer_is_refused(vectors):
    vectors.features(torch.zeros(3, 2), time(0.0))  # this one was heard
    hidden = vectors.network.leave.forward
    vectors.network.leave = nn.Identity()
    vectors.network.forward = lambda x, level, cond=None: hidden(torch.zeros(len(x), 16))
    with pytest.raises(RuntimeError, match="where hooks see it"):
        vectors.score(torch.zeros(3, 2), time(0.0))


class Conditional(nn.Module):
    """A network that tells conditions apart."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = nn.Linear(2, 2)

    def forward(self, x, noise_level, cond=None):
        return self.leave(x if cond is None else x + cond)


def test_features_of_another_condition_are_never_handed_out():
    model = random_model(Conditional())
    x, t, zero, one = torch.randn(3, 2), time(0.3), torch.zeros(3, 1), torch.ones(3, 1)
    first = model.features(x, t, zero).clone()
    for other in (one, None):
        model.score(x, t, other)
        assert_close(model.features(x, t, zero), first, rtol=0, atol=0)
    model.score(x, t, one)
    one.zero_()  # written to since
    assert_close(model.features(x, t, one), first, rtol=0, atol=0)


def test_a_time_that_was_written_to_is_another_time(vectors):
    x, t = torch.randn(3, 2), time(0.3)
    first = vectors.features(x, t).clone()
    t.copy_(time(1.5))
    again = vectors.features(x, t)
    assert_close(again, vectors.features(x, time(1.5)), rtol=0, atol=0)
    assert not torch.equal(again, first)


def test_in_inference_mode_a_state_that_was_written_to_is_another_state(vectors):
    t = time(0.3)
    with torch.inference_mode():
        x = torch.randn(3, 2)
        vectors.features(x, t)
        x.add_(1)
        found = vectors.features(x, t)
        assert_close(found, vectors.features(x.clone(), t), rtol=0, atol=0)


def test_models_that_share_a_network_share_a_hook_and_not_their_features(vectors):
    x, t = torch.randn(3, 2), time(0.3)
    first = vectors.features(x, t).clone()
    quick = [faster(vectors, precision="bfloat16") for _ in range(5)]
    for model in quick:
        model.keep_features()
    assert len(vectors.network.leave._forward_pre_hooks) == 1
    rounded = quick[0].features(x, t).float()
    assert not torch.equal(rounded, first)
    assert_close(vectors.features(x, t), first, rtol=0, atol=0)
    assert_close(quick[0].features(x, t).float(), rounded, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["copied", "saved"])
def test_a_model_that_keeps_features_is_copied_and_saved(way, vectors):
    x, t = torch.randn(3, 2), time(0.3)
    wanted = vectors.features(x, t).clone()
    if way == "copied":
        other = copy.deepcopy(vectors)
    else:
        file = io.BytesIO()
        torch.save(vectors, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    other.network = watched = Watched(other.network)
    other.score(x, t)
    assert_close(other.features(x, t), wanted, rtol=0, atol=0)
    assert watched.passes == 1, "it hears its own last layer"
    other.score(x + 1, t)
    vectors.network = watched = Watched(vectors.network)
    assert_close(vectors.features(x, t), wanted, rtol=0, atol=0)
    assert watched.passes == 0, "and not the other's"


def test_network_and_head_are_traced_without_a_break_and_give_the_same_variance(vectors):
    """Dynamo alone: what it hands over is run as it is."""
    settings = HeadSettings("npr", width=4, blocks=1)
    head = new_head(vectors, (2,), settings)
    nn.init.normal_(head.leave.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    network = watched = Watched(torch.compile(vectors.network, backend="eager", fullgraph=True))
    traced = ScoreModel(network, SDE, vectors.parameterization).eval()
    whole = torch.compile(head, backend="eager", fullgraph=True)
    kind, found = settings.meaning(ANALYTIC), []
    for model, made in ((vectors, head), (traced, whole)):
        variance = kind.variance(model, made.eval())
        watched.passes = 0
        for u in (0.2, 0.7):
            x, level = torch.linspace(-1, 1, 8).reshape(4, 2), SDE.level(time(u))
            found.append(variance.unresolved(x, level, model.noise(x, level.t)))
    assert watched.passes == 2, "features of a traced pass are heard"
    assert_close(found[2:], found[:2], rtol=1e-5, atol=1e-7)
