"""Heads and the analytic variance of a run: on which data, from where on, and in which file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import ANALYTIC, SDE, U, time, vector_model
from torch import nn
from torch.testing import assert_close

from experiment import train_variance
from experiment.batches import trained_units
from experiment.calibrate import calibrate, calibrated
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.fitted import digest_of, fitted, kept_variance
from experiment.training import Training
from experiment.variance_heads import (
    HeadSettings,
    head_path,
    keep_head,
    kept_head,
    new_head,
    read_head,
    unfinished_path,
    variance_of_head,
)
from score_models import ScoreModel
from sde_lib.oracles import GaussianMixture
from sde_lib.reverse_variance import AnalyticVariance
from sde_lib.samplers import Ancestral

SMALL = {"steps": 9, "batch_size": 8, "width": 4, "blocks": 1}
CENTRES = torch.tensor([-0.75, -0.25, 0.25, 0.75])  # of four bins from -1 to 1


@pytest.fixture
def vectors() -> ScoreModel:
    return vector_model()


def some_data(size: int = 40) -> Dataset:
    return Dataset("noise", *torch.randn(2, size, 2, generator=torch.Generator().manual_seed(0)))


def levels() -> Dataset:
    values = torch.randint(4, (300, 2), generator=torch.Generator().manual_seed(0))
    return Dataset("levels", values, values[:40], 4)


class FakeRun(SimpleNamespace):
    """What these modes ask of a run, around a model that is there."""

    def __init__(self, folder, model, data, seed=0, **training) -> None:
        checkpoint = folder / "step.pt"
        checkpoint.write_bytes(b"weights")
        super().__init__(path=folder, model=model, data=data, seed=seed, checkpoint=checkpoint)
        self.config, self.fitted = {"training": training}, folder / "fitted"

    def device(self) -> torch.device:
        return torch.device("cpu")

    def build(self, part: str) -> Dataset:
        return {"data": self.data}[part]

    def trained(self) -> tuple[FakeRun, ScoreModel, Path, int]:
        return self, self.model, self.checkpoint, 6

    def head(self, kind: str = "npr", at=head_path) -> Path:
        return at(kind, digest_of(self.checkpoint), self.fitted)


@pytest.fixture
def run(vectors, tmp_path, monkeypatch) -> FakeRun:
    """One whose gains are not measured, and which is calibrated."""
    monkeypatch.setattr(train_variance, "gains", lambda *arguments: ["so much"])
    monkeypatch.setattr(train_variance, "WRITE_EVERY", 4)
    made = FakeRun(tmp_path, vectors, some_data())
    calibrated(made, vectors, made.data, made.checkpoint, 20, 5)
    return made


def kill_once(monkeypatch) -> None:
    """In the seventh iteration from now on."""
    real, calls = train_variance.head_loss, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train_variance, "head_loss", killed)


def train(run, **changes) -> None:
    train_variance.train_variance(run, **SMALL | changes)


@pytest.mark.parametrize("dequantize", [True, False])
def test_the_units_of_a_training_are_bin_centres_or_spread_over_the_bins(dequantize):
    data, generator = levels(), torch.Generator().manual_seed(0)
    centres = CENTRES[data.train]
    for training in ({"dequantize": dequantize}, vars(Training(dequantize=dequantize))):
        off = (trained_units(training, data).encode(data.train, generator) - centres).abs()
        assert float(off.max()) <= 0.25 + 1e-6
        assert (float(off.max()) > 0.1) == dequantize
    assert trained_units({}, data) == data.units, "a configuration of before there was a choice"
    continuous = some_data()
    units = trained_units({"dequantize": dequantize}, continuous)
    assert torch.equal(units.encode(continuous.test), continuous.units.encode(continuous.test))


def test_a_model_of_bin_centres_is_calibrated_on_bin_centres(tmp_path):
    """With the exact score of points nothing is open where noise is far smaller than a bin.

    Spread over the bins the data would be off by w / (sigma sqrt(12)) there, in units of noise.
    """
    data = levels()
    points = GaussianMixture(torch.cartesian_prod(CENTRES, CENTRES), 0.0)
    model = SimpleNamespace(sde=SDE, score=points.score(SDE))
    run = FakeRun(tmp_path, model, data, dequantize=False)

    found, _ = calibrated(run, model, data, run.checkpoint, 200, 30)

    # a noise of a tenth of a bin or less: log(0.05) = -3; float32 states are off by 1e-7 / sigma
    fine = (found.clock < -3) & (found.clock > -4.5)
    assert int(fine.sum()) > 2
    assert float(found.unresolved[fine].max()) < 1e-3


@pytest.mark.parametrize("dequantize", [True, False])
def test_heads_are_taught_and_held_to_data_of_the_units_of_the_model(
    dequantize, vectors, tmp_path, monkeypatch
):
    seen = {}

    class Seen(Exception):
        """Enough was seen."""

    def taught(kind, model, head, x0, generator, cond):
        seen["train"] = x0
        raise Seen

    def held(flow, x, *arguments, **options):
        seen["test"] = x
        raise Seen

    monkeypatch.setattr(train_variance, "head_loss", taught)
    monkeypatch.setattr(train_variance, "discrete_bounds", held)
    run = FakeRun(tmp_path, vectors, levels(), dequantize=dequantize)
    calibrated(run, vectors, run.data, run.checkpoint, 20, 5)
    with pytest.raises(Seen):
        train(run)
    with pytest.raises(Seen):
        train_variance.gains(run, vectors, run.data, {}, 40)
    for x in seen.values():
        off = (x.unsqueeze(-1) - CENTRES).abs().min(-1).values
        assert (float(off.max()) < 1e-6) != dequantize


def test_calibrating_before_a_head_or_with_it_gives_the_same_file(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(train_variance, "gains", lambda *arguments: [])
    run = FakeRun(tmp_path, vectors, some_data(2100))
    calibrate(run)
    (path,) = (tmp_path / "fitted").glob("variance-*.json")
    before = path.read_bytes()
    path.unlink()
    train(run)
    assert path.read_bytes() == before


def test_heads_are_kept_by_the_weights_and_an_unfinished_one_is_none(vectors, tmp_path):
    checkpoint = tmp_path / "step.pt"
    checkpoint.write_bytes(b"weights")
    weights, settings = digest_of(checkpoint), HeadSettings("npr", width=8, blocks=1)
    head = new_head(vectors, (2,), settings)
    nn.init.normal_(head.leave.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    path = head_path("npr", weights, tmp_path)
    asked = Ancestral(4, variance="npr", data_variance=2.0)
    where = {"like": torch.zeros(1, 2), "checkpoint": checkpoint, "folder": tmp_path}

    def refused():
        with pytest.raises(RunError, match="mode=train_variance mode.kind=npr"):
            fitted(asked, vectors, **where)

    refused()
    keep_head(path, weights, settings, ANALYTIC, head, finished=False)
    refused()
    keep_head(path, weights, settings, ANALYTIC, head, finished=True)
    ready = fitted(asked, vectors, **where)
    assert ready.data_variance == 2.0
    x, level = torch.randn(3, 2), SDE.level(time(0.1))
    direct = variance_of_head(vectors, head, settings, ANALYTIC)
    eps_hat = vectors.noise(x, level.t)
    assert_close(
        ready.variance.unresolved(x, level, eps_hat), direct.unresolved(x, level, eps_hat)
    )
    assert read_head(path, "npr", "other weights") is None
    assert kept_head("sn", weights, tmp_path, vectors) is None


def training(model, path, kind="npr", seed=0, analytic=ANALYTIC) -> train_variance._Training:
    run, settings = FakeRun(path.parent, model, some_data(), seed), HeadSettings(kind, **SMALL)
    return train_variance._Training(run, model, run.data, settings, analytic, path, "weights")


def test_a_training_that_was_killed_goes_on_to_the_same_bits(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(train_variance, "WRITE_EVERY", 4)
    straight = training(vectors, tmp_path / "straight.pt").fit(None).state_dict()
    path = tmp_path / "cut.pt"
    kill_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        training(vectors, path).fit(None)
    begun = read_head(path, "npr", "weights")
    assert begun.iteration == 4 and not begun.finished
    resumed = training(vectors, path).fit(begun).state_dict()
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight)
    other = training(vectors, path, seed=1).fit(None).state_dict()
    assert not torch.equal(other["leave.weight"], straight["leave.weight"])


def test_a_training_of_other_choices_begins_again(vectors, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_variance, "WRITE_EVERY", 4)
    path = tmp_path / "head.pt"
    fresh = training(vectors, path, "learned").fit(None).state_dict()
    training(vectors, path).fit(None)
    again = training(vectors, path, "learned").fit(read_head(path, "npr", "weights")).state_dict()
    assert "from the start" in capsys.readouterr().out
    for name, weight in fresh.items():
        assert torch.equal(again[name], weight)


def test_a_training_of_another_seed_or_analytic_variance_begins_again(
    vectors, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_variance, "WRITE_EVERY", 4)
    path = tmp_path / "head.pt"
    training(vectors, path, seed=1).fit(None)
    begun = read_head(path, "npr", "weights")
    assert begun.seed == 1 and begun.iteration == 8
    fresh = training(vectors, tmp_path / "other.pt").fit(None).state_dict()
    again = training(vectors, path).fit(begun).state_dict()
    assert "other choices (seed=1); from the start" in capsys.readouterr().out
    for name, weight in fresh.items():
        assert torch.equal(again[name], weight)
    begun = read_head(path, "npr", "weights")
    for other in (
        AnalyticVariance(U + 0.1, ANALYTIC.unresolved, 1.0),
        AnalyticVariance(U, 0.9 * ANALYTIC.unresolved, 1.0),
        AnalyticVariance(U, ANALYTIC.unresolved, 2.0),
        AnalyticVariance(U[:9], ANALYTIC.unresolved[:9], 1.0),
    ):
        training(vectors, tmp_path / "other.pt", analytic=other).fit(begun)
        assert "(another analytic variance); from the start" in capsys.readouterr().out


def test_a_finished_head_stays_until_another_is_finished(run, monkeypatch):
    train(run)
    before, half_way = run.head().read_bytes(), run.head(at=unfinished_path)
    assert not half_way.exists(), "nothing is left over"
    kill_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(run, fresh=True, lr=0.1)
    assert half_way.exists() and run.head().read_bytes() == before
    train(run, fresh=True, lr=0.1)
    assert not half_way.exists() and run.head().read_bytes() != before
    assert read_head(run.head(), "npr", digest_of(run.checkpoint)).settings.lr == 0.1


def test_a_training_that_was_cut_short_is_gone_on_with_by_the_same_command(
    run, monkeypatch, capsys
):
    train(run)
    straight = read_head(run.head(), "npr", digest_of(run.checkpoint)).head.state_dict()
    run.head().unlink()
    kill_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    train(run)
    assert "going on from iteration 4" in capsys.readouterr().out
    resumed = read_head(run.head(), "npr", digest_of(run.checkpoint)).head.state_dict()
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight)


def test_what_a_finished_head_was_trained_with_is_told_where_it_differs(run, capsys):
    train(run)
    run.seed = 3
    train(run, lr=0.5)
    said = capsys.readouterr().out
    assert "already there" in said and "trained with lr=0.002, seed=0; mode.fresh=true" in said
    assert "so much" in said


def without(part):
    def damage(path):
        content = torch.load(path, weights_only=True)
        del content[part]
        torch.save(content, path)

    return damage


DAMAGE = {
    "text": lambda path: path.write_text("abc"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    **{f"no {part}": without(part) for part in ("weights", "settings", "head", "analytic")},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_head_is_told_in_one_sentence(damage, run):
    train(run)
    path = run.head()
    damage(path)
    where = {"checkpoint": run.checkpoint, "folder": path.parent, "like": torch.zeros(1, 2)}
    says = f"{path.name} is damaged.*delete it.*mode.kind=npr mode.fresh=true"
    with pytest.raises(RunError, match=says):
        fitted(Ancestral(4, variance="npr"), run.model, **where)
    with pytest.raises(RunError, match=says):
        train(run)
    if path.is_file():
        train(run, fresh=True)
        assert fitted(Ancestral(4, variance="npr"), run.model, **where).wanted == frozenset()


def test_a_damaged_training_is_told_in_one_sentence(run):
    train(run)
    more = {"finished": False, "seed": 0, "iteration": 4, "optimizer": {}}
    stored = read_head(run.head(), "npr", digest_of(run.checkpoint))
    path = run.head(at=unfinished_path)
    kept = kept_variance(run.checkpoint, path.parent)
    keep_head(path, digest_of(run.checkpoint), stored.settings, kept, stored.head, **more)
    run.head().unlink()
    with pytest.raises(RunError, match=f"{path.name} is damaged.*delete it"):
        train(run)
