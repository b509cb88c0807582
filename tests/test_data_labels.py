"""What goes with each sample: classes from every source, vectors from arrays."""

import gzip
import struct

import numpy as np
import pytest
import torch
from data_files import (
    batches,
    picture,
    random_bytes,
    save,
    write,
    write_archive,
    write_array,
    write_batches,
    write_idx,
    write_npz,
    write_sheets,
)
from sklearn.datasets import load_digits

from experiment.config import differences
from experiment.data import Dataset, arrays, cifar, cifar10, digits, image_folder, mnist
from experiment.data.labels import conditions
from experiment.errors import RunError
from score_models import Classes, Vector

pytestmark = pytest.mark.usefixtures("no_data_by_chance")
TRAIN, TEST = torch.tensor([[0.0, 1.0], [2.0, 5.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0]] * 2)


def write_labels(folder, train, test):
    for part, labels in (("train", train), ("t10k", test)):
        content = b"\x00\x00\x08\x01" + struct.pack(">I", len(labels)) + bytes(labels)
        write(folder / f"{part}-labels-idx1-ubyte.gz", gzip.compress(content))


def test_each_digit_comes_with_what_is_written():
    data, bare = digits(conditional=True), digits()
    assert data.cond == Classes(10) and bare.cond is None and bare.train_cond is None
    assert torch.equal(data.train, bare.train), "the split is the same"
    found = load_digits()
    known = {image.tobytes(): label for image, label in zip(found.data, found.target, strict=True)}
    for part in ("train", "test"):
        images = getattr(data, part).flatten(1).double().numpy()
        assert getattr(data, f"{part}_cond").tolist() == [
            known[image.tobytes()] for image in images
        ]


def test_idx_labels_come_back_in_their_order(tmp_path):
    write_idx(tmp_path, random_bytes(5, 4, 4), random_bytes(3, 4, 4, seed=1))
    write_labels(tmp_path, [3, 1, 4, 1, 5], [9, 2, 6])
    data = mnist(tmp_path, conditional=True)
    assert data.train_cond.tolist() == [3, 1, 4, 1, 5] and data.test_cond.tolist() == [9, 2, 6]
    assert data.train_cond.dtype == torch.int64 and data.cond == Classes(10)
    assert mnist(tmp_path).cond is None


@pytest.mark.parametrize(
    "labels, error, words",
    [
        (([3, 1, 4], [9, 2, 6]), ValueError, "there are 5 train samples and 3 labels"),
        (([3, 1, 4, 10, 5], [9, 2, 6]), ValueError, "in 0..9; that of train sample 3 is 10"),
        (None, RunError, r"not found: train-labels-idx1-ubyte\[.gz\], t10k-labels-idx1-ubyte"),
    ],
    ids=["too few", "out of range", "none"],
)
def test_idx_labels_that_do_not_go_with_the_images_are_refused(tmp_path, labels, error, words):
    write_idx(tmp_path, random_bytes(5, 4, 4), random_bytes(3, 4, 4, seed=1))
    if labels is not None:
        write_labels(tmp_path, *labels)
    with pytest.raises(error, match=f"mnist: .*{words}"):
        mnist(tmp_path, conditional=True)


def test_damaged_idx_labels_are_named(tmp_path):
    write_idx(tmp_path, random_bytes(5, 4, 4), random_bytes(3, 4, 4, seed=1))
    write_labels(tmp_path, [3, 1, 4, 1, 5], [9, 2, 6])
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-2]))
    with pytest.raises(RunError, match=f"{path} is damaged: .* 5 labels, .*Label 3 is the first"):
        mnist(tmp_path, conditional=True)
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x03" + content[4:]))
    with pytest.raises(RunError, match=f"{path} is no idx file of labels"):
        mnist(tmp_path, conditional=True)


def npz_with_labels(folder, train, test):
    write_npz(folder, train, test)
    found = dict(np.load(folder / "cifar10.npz"))
    labels = {"train_labels": np.array([6, 9] * 6), "test_labels": np.array([6, 9] * 2)}
    np.savez(folder / "cifar10.npz", **found, **labels)


def sheets_with_labels(folder, train, test):
    write_sheets(folder, train, test)
    labels = {"train": np.array([6, 9] * 6, "u1"), "test": np.array([6, 9] * 2, "u1")}
    np.savez(folder / "labels.npz", **labels)


def pickled(images):
    """Every batch of these tests says 6, 9: two images each."""
    from data_files import python3_batch

    return python3_batch(images)


FORMS = {
    "npz": npz_with_labels,
    "sheets": sheets_with_labels,
    "batches": lambda folder, *parts: write_batches(folder, batches(*parts, pickled)),
    "archive": lambda folder, *parts: write_archive(folder, batches(*parts, pickled)),
}


@pytest.mark.parametrize("form", FORMS)
def test_cifar10_labels_come_from_every_form(tmp_path, monkeypatch, form):
    count = (10, 2) if form in ("batches", "archive") else (12, 4)
    monkeypatch.setattr(cifar, "SIZES", count)
    FORMS[form](tmp_path, random_bytes(count[0], 3, 32, 32), random_bytes(count[1], 3, 32, 32))
    data = cifar10(tmp_path, conditional=True)
    assert data.cond == Classes(10)
    assert data.train_cond.tolist() == [6, 9] * (count[0] // 2)
    assert data.test_cond.tolist() == [6, 9] * (count[1] // 2)


@pytest.mark.parametrize(
    "write_form, words",
    [
        (write_sheets, "no labels: there is no .*labels.npz. Leave data.conditional out"),
        (write_npz, "must hold the arrays train_labels and test_labels; it holds train, test"),
    ],
)
def test_cifar10_without_labels_says_so(tmp_path, monkeypatch, write_form, words):
    monkeypatch.setattr(cifar, "SIZES", (12, 4))
    write_form(tmp_path, random_bytes(12, 3, 32, 32), random_bytes(4, 3, 32, 32))
    assert cifar10(tmp_path).cond is None
    with pytest.raises(RunError, match=words):
        cifar10(tmp_path, conditional=True)


def test_a_batch_without_a_list_of_labels_is_named(tmp_path, monkeypatch):
    import pickle

    monkeypatch.setattr(cifar, "SIZES", (10, 2))
    contents = batches(random_bytes(10, 3, 32, 32), random_bytes(2, 3, 32, 32), pickled)
    record = {b"data": random_bytes(2, 3072), b"labels": [1, "2"]}
    write_batches(tmp_path, contents | {"data_batch_2": pickle.dumps(record)})
    with pytest.raises(RunError, match="data_batch_2: 'labels' must be a list of whole numbers"):
        cifar10(tmp_path, conditional=True)


@pytest.mark.parametrize("lazy", [True, False])
def test_arrays_have_classes_as_integers_and_vectors_as_floats(tmp_path, lazy):
    x = np.random.default_rng(0).normal(size=(9, 4)).astype("f4")
    labels, vectors = np.arange(9) % 3, x[:, :2] * 7
    path = tmp_path / "mine.npz"
    write_array(path, train=x, test=x[:5], train_labels=labels, test_labels=labels[:5])
    data = arrays(path, conditional=True, lazy=lazy)
    assert data.cond == Classes(3) and data.test_cond.tolist() == [0, 1, 2, 0, 1]
    assert arrays(path, lazy=lazy).cond is None
    write_array(path, train=x, test=x[:5], train_cond=vectors, test_cond=vectors[:5])
    data = arrays(path, conditional=True, lazy=lazy)
    assert data.cond == Vector(2)
    assert torch.equal(data.train_cond, torch.from_numpy(vectors)), "as they are, no units"


@pytest.mark.parametrize(
    "found, error, words",
    [
        ({}, RunError, "wants the arrays train, test, train_labels and test_labels .*; it holds"),
        ({"train_labels": np.zeros(9, int)}, RunError, "wants the arrays"),
        (
            {"train_labels": np.zeros(9, int), "test_labels": np.arange(5)},
            ValueError,
            "labels must be in 0..0; that of test sample 1 is 1",
        ),
        (
            {"train_labels": np.zeros((9, 1), int), "test_labels": np.zeros(5, int)},
            ValueError,
            r"integers \[N\].*train set are int64 of shape \(9, 1\)",
        ),
        (
            {"train_cond": np.zeros((9, 2)), "test_cond": np.zeros((5, 3))},
            ValueError,
            r"the test set .*needs",
        ),
        (
            {"train_cond": np.full((9, 2), np.nan), "test_cond": np.zeros((5, 2))},
            ValueError,
            r"the condition of train sample 0 is \[nan, nan\]",
        ),
        (
            {"train_labels": np.array([-1] * 9), "test_labels": np.zeros(5, int)},
            ValueError,
            "train sample 0 is -1",
        ),
    ],
    ids=["none", "one part", "beyond", "shape", "widths", "nan", "negative"],
)
def test_conditions_that_do_not_go_with_an_array_are_refused(tmp_path, found, error, words):
    x = np.random.default_rng(0).normal(size=(9, 4)).astype("f4")
    path = write_array(tmp_path / "mine.npz", train=x, test=x[:5], **found)
    with pytest.raises(error, match=f"mine.*{words}"):
        arrays(path, conditional=True)


@pytest.mark.parametrize("parted", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
def test_the_subfolder_of_a_picture_is_its_class(tmp_path, parted, lazy):
    shade = {"cat": 10, "dog": 200, "eel": 90}
    for part in ("train", "test") if parted else ("",):
        for kind, grey in shade.items():
            for i in range(4):
                image = picture((4, 4), mode=None).point(lambda v, grey=grey, i=i: grey + i)
                save(image, tmp_path / part / kind / "deeper" / f"{i}.png")
    data = image_folder(tmp_path, conditional=True, lazy=lazy, test_size=4)
    assert data.cond == Classes(3)
    for part in ("train", "test"):
        images, labels = getattr(data, part)[:], getattr(data, f"{part}_cond")
        nearest = [
            list(shade).index(min(shade, key=lambda k, v=v: abs(shade[k] - v)))
            for v in images.flatten(1)[:, 0].tolist()
        ]
        assert labels.tolist() == nearest and len(images) == len(labels)


def test_a_picture_in_no_subfolder_has_no_class(tmp_path):
    path = save(picture((4, 4)), tmp_path / "a.png")
    for i in range(3):
        save(picture((4, 4), i), tmp_path / "cat" / f"{i}.png")
    with pytest.raises(RunError, match=f"{path} lies in none"):
        image_folder(tmp_path, conditional=True)


@pytest.mark.parametrize("source", [digits, mnist, cifar10])
def test_conditional_is_true_or_false(source):
    with pytest.raises(ValueError, match="conditional to be true or false; got conditional='y'"):
        source(conditional="y")


def test_conditions_of_a_data_set_go_together_and_are_one_for_each_sample():
    classes = {"cond": Classes(3), "test_cond": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="mine: cond, train_cond and test_cond go together.*2 of"):
        Dataset("mine", TRAIN, TEST, **classes)
    with pytest.raises(ValueError, match="mine: there are 3 train samples and 2 labels"):
        Dataset("mine", TRAIN, TEST, **classes, train_cond=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="condition of train sample 1 is 3, which is none of"):
        Dataset("mine", TRAIN, TEST, **classes, train_cond=torch.tensor([0, 3, 1]))


def test_more_classes_than_there_are_labels_may_be_known():
    found = conditions("mine", np.array([0, 1]), np.array([4]), count=5)
    assert found["cond"] == Classes(5) and found["test_cond"].tolist() == [4]


def test_an_option_that_is_off_and_one_that_was_not_there_yet_are_the_same():
    assert differences({"a": 1}, {"a": 1, "conditional": False, "b": None}) == []
    assert differences({"conditional": False}, {}) == []
    assert differences({}, {"conditional": True}) == ["conditional: absent -> True"]
    assert differences({"a": None}, {"a": False}) == ["a: None -> False"]
