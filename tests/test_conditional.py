"""Conditional models in every mode, on classes whose densities are in closed form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from known_classes import SHARES, KnownClasses, classes, log_joint
from PIL import Image
from test_cli import TINY, refused, run
from torch.testing import assert_close

from experiment.class_marginal import joined, log_shares, seen_classes
from experiment.conditions import Conditions, in_turn, score_of_rows, typical
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.estimators import estimate
from experiment.evaluation import evaluate, show
from experiment.fitted import fitted
from experiment.settings import Likelihood
from experiment.tiles import save_grid
from likelihood import Exact, FixedGrid, Hutchinson
from score_models import Vector
from sde_lib.samplers import Ancestral, FlowAdams

DATA = classes()
JOINT = log_joint(DATA, DATA.test)
EXACT = Likelihood(FixedGrid(32), Exact(), batch_size=10)
# the prior is off by the mean of the data at t_max, alpha = 0.0066 times some units in x / sigma
MISMATCH = 0.1


@pytest.fixture(scope="module")
def model():
    return KnownClasses(DATA.units)


def nats(result):
    """log p of each sample, with what the prior at t_max is off by set right."""
    return -(result.per_sample + result.errors["prior_mismatch"])


@pytest.mark.parametrize("cond", ["own", "none", "marginal"])
def test_the_likelihood_is_that_of_the_class_of_none_or_summed_over_all(model, cond):
    found = evaluate(model, DATA, replace(EXACT, cond=cond), seed=0)

    of_own = JOINT.gather(1, DATA.test_cond[:, None])[:, 0]
    shares = log_shares(DATA)
    known = {
        "own": of_own - shares[DATA.test_cond],
        "none": (JOINT - shares + SHARES.log()).logsumexp(1),  # those of the source
        "marginal": JOINT.logsumexp(1),
    }
    assert_close(nats(found), known[cond], rtol=0, atol=2e-3)
    assert ("own" in found.how) == (cond == "own")


def test_the_class_posterior_is_bayes(model, capsys):
    found = evaluate(model, DATA, replace(EXACT, cond="marginal"), seed=0)

    known = JOINT - JOINT.logsumexp(1, keepdim=True)
    right = (known.argmax(1) == DATA.test_cond).double().mean()
    # two priors at t_max, each off by a little
    assert_close(found.posterior, known, rtol=0, atol=MISMATCH)
    assert found.class_accuracy == pytest.approx(float(right), abs=1.5 / len(DATA.test))
    true = -float(known.gather(1, DATA.test_cond[:, None]).mean())
    assert found.class_nats == pytest.approx(true, abs=MISMATCH)
    row = json.loads(json.dumps(found.as_row()))
    assert row["class_accuracy"] == found.class_accuracy and "posterior" not in row
    show(found, DATA, "test set")
    assert f"right one for {100 * found.class_accuracy:.1f} ±" in capsys.readouterr().out


def test_a_sample_does_not_depend_on_its_batch_nor_on_the_conditions_of_its_mates(model):
    probed = replace(EXACT, solver=FixedGrid(12), divergence=Hutchinson(2), batch_size=24)
    for cond in ("own", "marginal"):
        settings = replace(probed, cond=cond)
        whole = evaluate(model, DATA, settings, seed=0)
        parts = evaluate(model, DATA, replace(settings, batch_size=9), seed=0)
        assert_close(parts.per_sample, whole.per_sample)


def test_classes_that_were_not_there_in_training_have_no_share():
    data = SimpleNamespace(cond=SimpleNamespace(count=4), train_cond=torch.tensor([0, 2, 2, 2]))
    assert_close(log_shares(data).exp(), torch.tensor([0.25, 0, 0.75, 0]).double())


def test_posteriors_are_averaged_over_draws_and_lost_batches_are_not_numbers():
    draws = torch.tensor([[0.2, 0.8], [0.6, 0.4]]).double().log()
    found = joined([draws, None], [1, 2], 2, 2)
    assert_close(found[0].exp(), torch.tensor([0.4, 0.6]).double())
    assert found.shape == (3, 2) and bool(found[1:].isnan().all())
    assert seen_classes(found[:1], torch.tensor([1])) == (1.0, pytest.approx(-math.log(0.6)))


def test_the_bounds_are_under_the_condition_of_each_sample(model):
    settings = replace(EXACT, bounds=10, batch_size=13)
    ode = evaluate(model, DATA, settings, seed=0)
    found = estimate(model, DATA, settings, ode, seed=0)

    known = JOINT.gather(1, DATA.test_cond[:, None])[:, 0] - log_shares(DATA)[DATA.test_cond]
    (value, error), (ode_value, _) = found.values["ELBO"], found.values["probability-flow ODE"]
    assert ode_value == pytest.approx(-float(known.mean()), abs=MISMATCH)
    # the error is of the spread over samples, in which that of the draws is contained
    assert value == pytest.approx(-float(known.mean()), abs=5 * error)
    wrong = replace(DATA, test_cond=(DATA.test_cond + 1) % 3)
    other, _ = estimate(model, wrong, settings, ode, seed=0).values["ELBO"]
    assert other > value + 1


@pytest.mark.parametrize(
    ("settings", "data", "dropout", "words"),
    [
        (Likelihood(cond="none"), DATA, 0.0, "likelihood.cond=none.*label_dropout=0.1"),
        (Likelihood(cond="none"), Dataset("x", DATA.train, DATA.test), 0.1, "comes without"),
        (
            Likelihood(cond="marginal"),
            replace(DATA, cond=Vector(2), train_cond=DATA.train, test_cond=DATA.test),
            0.1,
            "no end of vectors",
        ),
    ],
)
def test_what_cannot_be_scored_is_told(settings, data, dropout, words):
    with pytest.raises((ValueError, RunError), match=words):
        settings.check(data, label_dropout=dropout)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="likelihood.bounds are of one condition"):
        Likelihood(cond="marginal", bounds=10)
    with pytest.raises(ValueError, match="cond to be one of"):
        Likelihood(cond=None)


def test_conditions_are_functions_of_seed_and_number_and_have_the_shares_of_the_data():
    drawn, n = Conditions(DATA, 3), 2000
    whole = drawn.of(range(n))
    assert torch.equal(drawn.of(range(5, 90)), whole[5:90])
    assert not torch.equal(Conditions(DATA, 4).of(range(n)), whole)
    share = log_shares(DATA).exp()
    found = torch.bincount(whole, minlength=3) / n
    assert bool(((found - share).abs() < 5 * (share * (1 - share) / n).sqrt()).all())


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [(2, [2, 2, 2, 2]), ([2, 0], [0, 2, 0, 2]), ("none", [3, 3, 3, 3])],
)
def test_given_conditions_are_taken_in_turn(asked, wanted):
    conditions = Conditions(DATA, 0, asked, label_dropout=0.1)
    assert conditions.of(range(1, 5)).tolist() == wanted
    assert conditions.turns() == (2 if asked == [2, 0] else None)
    assert conditions.fixed == (asked != [2, 0])


def test_an_unconditional_model_has_none():
    plain = Conditions(Dataset("x", DATA.train, DATA.test), 0)
    assert plain.of(range(3)) is None and str(plain) == "" and plain.about() == {}
    score = object()
    assert plain.score(SimpleNamespace(score=score), range(3)) is score


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (DATA, {"guidance": 2.0}, "mode.guidance=2 asks.*label_dropout=0.1"),
        (DATA, {"asked": "none"}, "mode.cond=none asks.*label_dropout=0.1"),
        (DATA, {"asked": "none", "guidance": 2.0, "label_dropout": 0.1}, "Drop one of the two"),
        (DATA, {"asked": 7}, "whole number in 0 .. 2"),
        (DATA, {"guidance": -1.0}, "guidance"),
        (Dataset("x", DATA.train, DATA.test), {"asked": 0}, "mode.cond is for a conditional"),
        (Dataset("x", DATA.train, DATA.test), {"guidance": 2.0}, "mode.guidance is for a cond"),
    ],
)
def test_conditions_that_model_or_data_do_not_allow_are_refused(data, options, words):
    with pytest.raises((RunError, ValueError), match=words):
        Conditions(data, 0, **options)


def test_steps_are_kept_by_weights_and_guidance_and_variances_are_of_the_plain_score(
    model, tmp_path
):
    (tmp_path / "weights.pt").write_bytes(b"these")
    where = {"like": DATA.test[:1], "checkpoint": tmp_path / "weights.pt", "folder": tmp_path}

    def fit(**options):
        conditions = Conditions(DATA, 0, label_dropout=0.1, **options)
        return fitted(FlowAdams(12), model, conditions=conditions, **where).grid

    plain, class_of_all = fit(), fit(asked=1)
    guided, without = fit(guidance=3.0), fit(asked="none")
    assert plain == class_of_all and len({plain, guided, without}) == 3
    names = {path.name.rpartition("-")[0] for path in tmp_path.glob("grid*.json")}
    assert names == {"grid", "grid-guided-3", "grid-unconditional"}
    changed = Conditions(DATA, 0, guidance=3.0, label_dropout=0.1)
    with pytest.raises(RunError, match="variance=analytic knows the errors.*guidance 3"):
        fitted(Ancestral(4, variance="analytic"), model, conditions=changed, **where)


def test_pilots_see_conditions_of_all_the_training_set(model):
    assert set(typical(DATA).tolist()) == {0, 1, 2}
    ordered = replace(
        DATA, train=DATA.train, train_cond=DATA.train_cond.sort().values
    )  # as files of one class after the other are
    assert set(typical(ordered)[:16].tolist()) == {0, 1, 2}
    score = score_of_rows(model, DATA, "test", 5)
    assert_close(score.cond, DATA.test_cond[:5])


def test_a_picture_has_a_row_for_each_class_and_its_name_beside_it(tmp_path):
    assert in_turn(DATA) == [0, 1, 2]
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    with Image.open(save_grid(images, tmp_path / "a.png", 2, labels=["0", "12", "3"])) as named:
        with Image.open(save_grid(images, tmp_path / "b.png", 2)) as bare:
            assert named.height == bare.height == 3 * 50 + 2
            margin = named.width - bare.width
            left = torch.tensor(np.array(named))[:, :margin]
    dark = (left < 128).any(1).reshape(-1)[1:-1].unflatten(0, (3, 50))
    assert 10 < margin < 40 and dark.any(1).all(), "each row has its name"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    tiny = [*TINY, "data.conditional=true", "training.label_dropout=0.1"]
    done = run("mode=train", *tiny, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


SAME = [*TINY, "data.conditional=true"]


def test_a_conditional_model_is_trained_scored_and_sampled_on_the_command_line(trained):
    path = trained / "runs" / "digits-vp-unet"
    rows = json.loads((path / "likelihood.json").read_text())
    assert rows[-1]["condition"] == "each under its own condition"
    done = run("mode=likelihood", *SAME, "likelihood.cond=marginal", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert "likeliest class" in done.stdout + done.stderr
    rows = json.loads((path / "likelihood.json").read_text())
    assert rows[-1]["condition"] == "marginal over all classes"
    curve = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval/bits_per_dim" in row for row in curve) == 1, "one curve, of one quantity"


def test_guided_samples_are_kept_apart_and_do_not_depend_on_the_batch(trained):
    folder = trained / "runs" / "digits-vp-unet" / "samples"

    def drawn(*options):
        before = set(folder.glob("samples-*.npz"))
        done = run("mode=sample", *SAME, "mode.num_samples=5", *options, cwd=trained)
        assert done.returncode == 0, done.stderr
        (new,) = set(folder.glob("samples-*.npz")) - before
        return np.load(new), json.loads(new.with_suffix(".json").read_text()), new

    guided, about, path = drawn("mode.cond=3", "mode.guidance=2")
    assert guided["cond"].tolist() == [3] * 5 and about["guidance"] == 2 and about["cond"] == 3
    mixed, about, first = drawn()
    assert path.name[:-10] == first.name[:-10] and path != first
    first.rename(first.with_suffix(".kept"))
    again, _, _ = drawn("mode.batch_size=2")
    assert about["cond"] == "training"
    assert np.array_equal(mixed["cond"], again["cond"])
    assert np.abs(mixed["samples"].astype(int) - again["samples"]).max() <= 1, "but for rounding"


def test_what_a_model_was_not_trained_for_is_told_in_one_line(trained):
    odd = run("mode=sample", *SAME, "mode.cond=none", "mode.guidance=3", cwd=trained)
    refused(odd, "Drop one of the two")
