"""What a run keeps of its data: units, and a fingerprint that tells another file."""

import hashlib
import json
import re
from pathlib import Path
from pydoc import locate

import numpy as np
import pytest
import torch
from data_files import random_bytes, write_array
from test_cli import TINY, run

from experiment.config import fill_measured
from experiment.data import Dataset, arrays
from experiment.errors import RunError
from experiment.measured import (
    as_trained,
    conditioned,
    fingerprint,
    measure,
    refuse_other_data,
)
from likelihood import Standardization
from score_models import Classes, Vector

pytestmark = pytest.mark.usefixtures("no_data_by_chance")
EXPERIMENT = Path(__file__).resolve().parents[1] / "experiment"


def normal(mean=0.0, std=1.0, seed=0, shape=(200, 3)):
    values = np.random.default_rng(seed).normal(mean, std, shape).astype("f4")
    return torch.from_numpy(values)


def stored(data):
    """A configuration as it comes back from a checkpoint."""
    return json.loads(json.dumps({"measured": measure(data).as_node()}))


@pytest.mark.parametrize("shape", [(200, 3), (50, 2, 4, 5)], ids=str)
def test_units_come_back_from_the_configuration_bit_for_bit(shape):
    data = Dataset("mine", normal(3, 2, shape=shape), normal(seed=1, shape=shape))
    units = as_trained(data, stored(data)).units
    for name in ("shift", "scale"):
        assert torch.equal(getattr(units, name), getattr(data.units, name))


def test_data_that_changed_are_taken_in_the_units_of_the_training_with_a_warning(capsys):
    before = Dataset("mine", normal(3, 2), normal(3, 2, seed=1))
    after = Dataset("mine", normal(30, 20, seed=2), normal(30, 20, seed=3))
    found = as_trained(after, stored(before))
    assert torch.equal(found.units.scale, before.units.scale)
    assert torch.equal(found.test, after.test), "the samples are those there are"
    assert not torch.equal(after.units.scale, before.units.scale), "and the set itself as it was"
    said = capsys.readouterr().out
    assert said.startswith("warning: mine differ from what the model was trained on (test_digest")
    assert said.count("\n") == 1
    as_trained(before, stored(before))
    assert capsys.readouterr().out == "", "nothing to say where nothing changed"


def test_levels_have_bins_whatever_is_stored():
    data = Dataset("mine", torch.tensor([[0], [1]]), torch.tensor([[0], [1]]), levels=4)
    assert measure(data).shift is None
    assert as_trained(data, stored(data)).units == data.units


@pytest.mark.parametrize(
    "other, words",
    [
        (Dataset("mine", normal(shape=(9, 4)), normal(shape=(9, 4))), r"shape: \[3\] -> \[4\]"),
        (
            Dataset(*("mine", *[torch.arange(12).reshape(4, 3)] * 2), levels=17),
            "dtype: float32 -> int64; levels: None -> 17",
        ),
        (
            Dataset(
                *("mine", normal(), normal(seed=1)),
                cond=Classes(2),
                train_cond=torch.arange(200) % 2,
                test_cond=torch.arange(200) % 2,
            ),
            r"cond: None -> Classes\(count=2\)",
        ),
    ],
    ids=["shape", "levels", "cond"],
)
def test_data_of_another_kind_are_refused(other, words):
    before = stored(Dataset("mine", normal(), normal(seed=1)))
    with pytest.raises(RunError, match=f"mine are no longer of the kind .*{words}.*files of the"):
        as_trained(other, before)


def test_a_model_of_a_version_that_measured_nothing_is_used_as_it_was():
    data = Dataset("mine", normal(), normal(seed=1))
    assert as_trained(data, {}) is data and as_trained(data, {"measured": None}) is data
    refuse_other_data("runs/x", None, stored(data)["measured"])


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("row", [0, 17, 39])
def test_a_fingerprint_sees_each_of_few_samples_and_the_condition(part, row):
    def made(value, kind=0):
        parts = {"train": normal(shape=(40, 3)), "test": normal(seed=1, shape=(40, 3))}
        parts[part][row, 1] += value
        labels = torch.arange(40) % 3
        labels[row] = (labels[row] + kind) % 3
        conds = {"train_cond": torch.arange(40) % 3, "test_cond": torch.arange(40) % 3}
        return Dataset("mine", **parts, cond=Classes(3), **conds | {f"{part}_cond": labels})

    same = fingerprint(made(0.0))
    assert same == fingerprint(made(0.0))
    for other in (made(1e-3), made(0.0, kind=1)):
        changed = {key for key, value in fingerprint(other).items() if value != same[key]}
        assert changed == {f"{part}_digest"}


def test_a_fingerprint_sees_a_sample_more_and_reads_few_rows_of_many(tmp_path, monkeypatch):
    x = normal(shape=(3000, 2))
    path = write_array(tmp_path / "mine.npz", train=x.numpy(), test=x[:9].numpy())
    data = arrays(path, lazy=True)
    asked = []
    read = type(data.train).__getitem__
    monkeypatch.setattr(
        type(data.train),
        "__getitem__",
        lambda self, rows: (asked.append(rows), read(self, rows))[1],
    )
    first = fingerprint(data)
    assert [len(rows) for rows in asked] == [64, 9]
    assert (int(asked[0][0]), int(asked[0][-1])) == (0, 2999)
    more = fingerprint(Dataset("mine", torch.cat([x, x[:1]]), x[:9]))
    assert (first["train_samples"], more["train_samples"]) == (3000, 3001)


def test_a_training_does_not_go_on_with_other_data_and_says_what_to_do():
    before = stored(Dataset("mine", normal(), normal(seed=1)))["measured"]
    after = stored(Dataset("mine", normal(seed=5), normal(seed=1)))["measured"]
    refuse_other_data("runs/x", before, before)
    with pytest.raises(RunError, match="runs/x was trained on other data .train_digest: .*fresh"):
        refuse_other_data("runs/x", before, after)


@pytest.mark.parametrize(
    "cond, conds, node",
    [
        (Classes(3), torch.arange(40) % 3, {"count": 3}),
        (Vector(2), torch.zeros(40, 2), {"size": 2}),
    ],
    ids=["classes", "vector"],
)
def test_a_network_is_told_what_the_data_come_with(cond, conds, node):
    parts = {"train_cond": conds, "test_cond": conds}
    data = Dataset("mine", normal(shape=(40, 3)), normal(1, shape=(40, 3)), cond=cond, **parts)
    found = conditioned({"_target_": "N", "cond": None}, data)
    assert found == {"_target_": "N", "cond": {"_target_": found["cond"]["_target_"], **node}}
    assert locate(found["cond"]["_target_"]) is type(cond)
    assert conditioned({"_target_": "N", "cond": "own"}, data)["cond"] == "own"
    with pytest.raises(RunError, match="data.conditional=true .* mine .* and N takes none"):
        conditioned({"_target_": "N"}, data)


def test_a_network_of_data_without_conditions_stays_as_it_is():
    data = Dataset("mine", normal(), normal(seed=1))
    assert conditioned({"_target_": "N", "cond": None}, data) == {"_target_": "N", "cond": None}


def test_the_spread_is_that_of_the_first_samples_in_model_units():
    data = Dataset("mine", normal(3, 2, shape=(5000, 3)), normal(3, 2, seed=1))
    wanted = data.units.encode(data.train[:4096]).std(correction=0)
    assert measure(data).std == pytest.approx(float(wanted), rel=1e-5)
    config = fill_measured({"a": {"data_std": None}}, data_std=measure(data).std)
    assert config["a"]["data_std"] == measure(data).std


def test_data_with_given_units_are_gone_through_no_second_time(tmp_path, monkeypatch):
    data = arrays(write_array(tmp_path / "mine.npy", mine=normal().numpy()), lazy=True)
    monkeypatch.setattr("experiment.data.dataset.survey", None)
    units = Standardization(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
    assert data.in_units(units).units is units and data.units is not units


def test_the_digest_is_that_of_the_bytes():
    images = torch.from_numpy(random_bytes(3, 2, 2, 2))
    found = fingerprint(Dataset("mine", images, images, levels=256))
    wanted = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    assert found["train_digest"] == found["test_digest"] == wanted


def test_on_the_command_line_a_changed_file_changes_no_units_and_stops_a_training(tmp_path):
    path, own = tmp_path / "mine.npy", [a for a in TINY if "heads" not in a]
    choices = ["data=arrays", f"data.path={path}", "network=mlp", "training=vectors", *own]
    np.save(path, normal(3, 2).numpy())
    first = run(*choices, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    np.save(path, normal(3000, 20, seed=1).numpy())
    drawn = run(*choices, "mode=sample", "mode.num_samples=64", cwd=tmp_path)
    assert drawn.returncode == 0 and "warning: mine differ from what the model" in drawn.stdout
    (samples,) = (tmp_path / "runs").glob("*/samples/samples-*.npz")
    assert abs(np.load(samples)["samples"].mean()) < 100, "about 3, and not about 3000"
    again = run(*choices, "training.steps=12", cwd=tmp_path)
    assert again.returncode == 1 and "was trained on other data (test_digest" in again.stderr


def test_every_mode_that_uses_a_trained_model_takes_data_in_its_units():
    users = [path for path in EXPERIMENT.glob("*.py") if "run.trained()" in path.read_text()]
    assert len(users) >= 5
    for path in users:
        assert re.search(r"as_trained\(data, \w+\.config\)", path.read_text()), path.name
