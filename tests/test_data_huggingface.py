"""Pictures of Hugging Face: with the package where it is installed, and with a stand-in for it."""

import importlib.util
import io
import os
import pickle
import socket
import sys
import types

import pytest
import torch
from data_files import random_bytes
from PIL import Image

from experiment.data import hub as source
from experiment.data import huggingface
from experiment.errors import RunError, one_line
from score_models import Classes

INSTALLED = importlib.util.find_spec("datasets") is not None
GREY, COLOUR = random_bytes(12, 6, 5), random_bytes(12, 6, 5, 3)
KIND = [i % 3 for i in range(12)]


def png(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


class ImageFeature:
    """Of a column of pictures."""

    def __init__(self, decode=True):
        self.decode = decode


class ClassFeature:
    """Of a column of classes."""

    def __init__(self, names, dtype="int64"):
        self.num_classes, self.dtype = len(names), dtype


class Table:
    """What of a data set of the package is used."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}

    def select_columns(self, names):
        return Table({name: self.columns[name] for name in names}, self.features)

    def cast_column(self, name, feature):
        assert not feature.decode, "bytes are decoded here, where damage can be named"
        return self


def stand_in(images, labels):
    """The module, and what it loads."""
    encoded = [image if image is None else {"bytes": image, "path": None} for image in images]
    features = {"image": ImageFeature(), "label": ClassFeature("abc")}
    table = Table({"image": encoded, "label": labels}, features)
    return types.SimpleNamespace(
        Image=ImageFeature,
        disable_progress_bars=lambda: None,
        load_dataset=lambda path: {"train": table},
    )


def written(folder, images, labels):
    """A parquet file by the package itself."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    encoded = [image if image is None else {"bytes": image, "path": None} for image in images]
    table = datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features)
    table.to_parquet(str(folder / "train.parquet"))


@pytest.fixture(params=["stand-in", "package"])
def load(request, tmp_path, monkeypatch):
    """A function that loads (images, labels) by :func:`huggingface`."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    if request.param == "package" and not INSTALLED:
        pytest.skip("the extra hf is not installed")
    folder = tmp_path / "mine"
    folder.mkdir()

    def loaded(images, labels=KIND, **options):
        if request.param == "stand-in":
            monkeypatch.setitem(sys.modules, "datasets", stand_in(images, labels))
        else:
            monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
            written(folder, images, labels)
        return huggingface(str(folder), **options)

    return loaded


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_pictures_and_classes_come_back_in_both_parts_without_loss(load, images):
    data = load([png(image) for image in images], conditional=True, test_size=3)
    assert (data.name, data.levels, data.cond) == ("mine", 256, Classes(3))
    assert not isinstance(data.train, torch.Tensor)
    whole = torch.from_numpy(images)
    whole = whole[:, None] if images.ndim == 3 else whole.permute(0, 3, 1, 2)
    seen = []
    for part, count in (("train", 9), ("test", 3)):
        samples, labels = getattr(data, part), getattr(data, f"{part}_cond")
        assert samples.shape == (count, *whole.shape[1:]) and samples.dtype == torch.uint8
        for image, label in zip(samples[:], labels.tolist(), strict=True):
            row = next(i for i in range(12) if torch.equal(whole[i], image))
            assert label == KIND[row]
            seen.append(row)
    assert sorted(seen) == list(range(12))


def test_without_conditional_no_classes_are_read(load):
    assert load([png(image) for image in GREY], [0] * 12).cond is None


def test_pictures_are_scaled_and_have_the_channels_asked_for(load):
    data = load([png(image) for image in GREY], size=4, channels=3)
    assert data.shape == (3, 4, 4)


def test_a_damaged_picture_is_named_by_its_row_when_it_is_read(load):
    encoded = [png(image) for image in GREY]
    encoded[7] = encoded[7][:60]
    data = load(encoded, channels=1)
    with pytest.raises(RunError, match=r"mine \(train\), row 7 cannot be read as a picture"):
        data.train[:], data.test[:]


def test_a_picture_in_colour_among_grey_ones_is_named(load, monkeypatch):
    monkeypatch.setattr(source, "LOOKED_AT", 5)
    encoded = [png(image) for image in GREY]
    encoded[7] = png(COLOUR[7])
    data = load(encoded)
    with pytest.raises(RunError, match=r"row 7 is in colour.*pass data.channels=3"):
        data.train[:], data.test[:]


def test_a_row_without_a_picture_is_named(load):
    with pytest.raises(RunError, match="row 3 holds no picture. Remove the row"):
        load([None if i == 3 else png(image) for i, image in enumerate(GREY)])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"column": "img"}, "no column 'img'; there are: image, label. Pass data.column=NAME"),
        ({"column": "label"}, "the column 'label' .* no pictures"),
        ({"label": "kind", "conditional": True}, "no column 'kind'; .* Pass data.label=NAME"),
        ({"label": "image", "conditional": True}, "the column 'image' .* no classes"),
        ({"split": "dev"}, "no split 'dev'; there are: train"),
        ({"test_split": "dev"}, "no split 'dev'; there are: train"),
    ],
)
def test_a_column_or_split_that_is_not_there_is_answered_with_those_there_are(
    load, options, words
):
    with pytest.raises(RunError, match=f"huggingface: .*{words}"):
        load([png(image) for image in GREY], **options)


@pytest.mark.parametrize("options", [{"channels": 2}, {"size": 0}, {"conditional": 1}])
def test_options_of_the_wrong_kind_are_refused(load, options):
    with pytest.raises(ValueError, match=f"huggingface needs {next(iter(options))}"):
        load([png(image) for image in GREY], **options)


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError) as refusal:
        huggingface(str(tmp_path))
    told = one_line(refusal.value)  # ./dev setup does not bring it
    assert "pip install '.[hf]' in " in told and "dev setup" not in told


def test_without_network_the_hub_is_asked_once_and_the_package_told_to_stay_offline(monkeypatch):
    with socket.socket() as unused:  # a port on which nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        told = {}

        def unreachable(path):
            told.update(offline=os.environ.get("HF_HUB_OFFLINE"))
            raise ConnectionError("no network")

        monkeypatch.setitem(
            sys.modules,
            "datasets",
            types.SimpleNamespace(load_dataset=unreachable, disable_progress_bars=lambda: None),
        )
        with pytest.raises(RunError, match=r"no folder .*some/where, and no data set"):
            huggingface("some/where")
        assert told == {"offline": "1"}
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
            monkeypatch.delenv("HF_HUB_OFFLINE")
            with pytest.raises(RunError):
                huggingface("some/where")
            assert told == {"offline": None}, "somebody took the call"


@pytest.mark.skipif(not INSTALLED, reason="the extra hf is not installed")
def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 and no more")
    for place in (tmp_path, path):
        with pytest.raises(RunError, match=f"huggingface: {place} cannot be read: .*[Pp]arquet"):
            huggingface(str(place))


@pytest.mark.skipif(not INSTALLED, reason="the extra hf is not installed")
def test_pickled_copies_saved_sets_and_splits_are_read_by_the_package(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    encoded = {"image": [{"bytes": png(image), "path": None} for image in GREY]}
    table = datasets.Dataset.from_dict(
        encoded, features=datasets.Features({"image": datasets.Image()})
    )
    parts = datasets.DatasetDict(train=table, test=table.select(range(4)))
    parts.save_to_disk(str(tmp_path / "saved"))
    data = huggingface(str(tmp_path / "saved"))
    assert (len(data.train), len(data.test)) == (12, 4), "its own test split"
    assert torch.equal(data.test[:], torch.from_numpy(GREY[:4, None]))
    copy = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(copy[torch.tensor([5, 1])], torch.from_numpy(GREY[[5, 1]][:, None]))
