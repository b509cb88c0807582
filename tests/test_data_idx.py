"""MNIST's format, and where every download is looked for."""

import numpy as np
import pytest
import torch
from data_files import TEST, TRAIN, random_bytes, same, write_idx

from experiment.data import arrays, cifar10, fashion_mnist, mnist
from experiment.errors import RunError

VARIABLE = "SCORE_SDE_DATA"
pytestmark = pytest.mark.usefixtures("no_data_by_chance")


@pytest.mark.parametrize("pack", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize(
    "source, place",
    [
        (mnist, "mnist"),
        (mnist, "MNIST/raw"),
        (mnist, "."),
        (fashion_mnist, "fashion-mnist"),
        (fashion_mnist, "FashionMNIST/raw"),
        (fashion_mnist, "."),
    ],
)
def test_idx_images_come_back_byte_for_byte_from_every_place(tmp_path, source, place, pack):
    train, test = random_bytes(5, 6, 4), random_bytes(3, 6, 4, seed=1)
    write_idx(tmp_path / place, train, test, pack)
    data = source(tmp_path)
    assert same(data.train, train[:, None]) and same(data.test, test[:, None])
    assert data.levels == 256 and data.train.dtype == torch.uint8
    assert data.name == source.__name__


def test_mnist_and_fashion_mnist_side_by_side_are_not_mixed_up(tmp_path):
    digits, clothes = random_bytes(4, 3, 3), random_bytes(4, 3, 3, seed=1)
    write_idx(tmp_path / "mnist", digits, digits)
    write_idx(tmp_path / "fashion-mnist", clothes, clothes)
    assert same(mnist(tmp_path).train, digits[:, None])
    assert same(fashion_mnist(tmp_path).train, clothes[:, None])


@pytest.mark.parametrize("source, own", [(mnist, "mnist"), (fashion_mnist, "fashion-mnist")])
def test_a_gap_is_not_filled_with_the_file_of_another_folder(tmp_path, source, own):
    write_idx(tmp_path, random_bytes(4, 3, 3), random_bytes(4, 3, 3))
    images = random_bytes(4, 3, 3, seed=1)
    write_idx(tmp_path / own, images, images)
    (tmp_path / own / f"{TEST}.gz").unlink()
    (tmp_path / f"{TRAIN}.gz").unlink()  # one file here, the other there: two sets perhaps
    with pytest.raises(RunError, match=rf"{source.__name__}: not found: {TEST}\[.gz\]; looked"):
        source(tmp_path)


def truncated(content):
    return content[:-5]


def of_labels(content):
    return b"\x00\x00\x08\x01" + content[4:]


@pytest.mark.parametrize(
    "damage, pack, words",
    [
        (truncated, False, "5 images of 4x4, 80 bytes; there are 75. Image 4 is the first wrong"),
        (lambda content: content[:18], False, "Image 0 is the first wrong"),
        (lambda content: content + b"\x00", False, "there are 81. Image 5 is the first wrong"),
        (of_labels, False, "no idx file of images.*starts with 00000801"),
        (lambda content: b"", False, "starts with nothing"),
        (truncated, True, "is damaged"),
        (lambda content: content[:12], True, "is damaged"),
        (lambda content: b"<html>not found</html>", True, "is damaged"),
    ],
    ids=["truncated", "header", "too long", "labels", "empty", "cut gz", "gz header", "no gz"],
)
def test_a_damaged_idx_file_is_named_with_what_is_wrong(tmp_path, damage, pack, words):
    write_idx(tmp_path, random_bytes(5, 4, 4), random_bytes(5, 4, 4), pack)
    path = tmp_path / (f"{TEST}.gz" if pack else TEST)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=f"{path}.*{words}.*Get it again"):
        mnist(tmp_path)


@pytest.mark.parametrize(
    "train, test, words",
    [
        (random_bytes(0, 4, 4), random_bytes(3, 4, 4), "train set needs at least two.*got 0"),
        (random_bytes(3, 4, 4), random_bytes(1, 4, 4), "test set needs at least two.*got 1"),
        (random_bytes(3, 4, 4), random_bytes(3, 4, 5), "must be alike.*1, 4, 4.*1, 4, 5"),
        (random_bytes(3, 4, 4) * 0, random_bytes(3, 4, 4), "every value of the train set is 0"),
        (random_bytes(3, 0, 4), random_bytes(3, 0, 4), "one number or more"),
    ],
    ids=["empty set", "one sample", "two shapes", "constant", "no pixels"],
)
def test_whole_idx_files_that_make_no_data_set_are_refused(tmp_path, train, test, words):
    write_idx(tmp_path, train, test, pack=False)
    with pytest.raises(ValueError, match=f"mnist: .*{words}"):
        mnist(tmp_path)


@pytest.mark.parametrize(
    "source, files, places, homepage",
    [
        (mnist, [TRAIN, TEST], ["mnist", "MNIST/raw", "."], "https://"),
        (fashion_mnist, [TRAIN, TEST], ["fashion-mnist", "FashionMNIST/raw", "."], "zalando"),
        (
            cifar10,
            ["cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10.npz", "train_00.webp"],
            ["cifar10", "cifar-10", "."],
            "https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
    ],
)
def test_a_missing_download_says_which_where_from_and_where_to(
    tmp_path, source, files, places, homepage
):
    with pytest.raises(RunError) as refusal:
        source(tmp_path)
    message = str(refusal.value)
    folders = [str(tmp_path / place) for place in places]
    for words in (*files, *folders, homepage, "data.root=PATH", f"{VARIABLE}=PATH"):
        assert words in message, words
    assert message.startswith(f"{source.__name__}: not found: ") and "\n" not in message


@pytest.mark.parametrize("absent, there", [(TRAIN, TEST), (TEST, TRAIN)])
def test_only_the_file_that_is_missing_is_named(tmp_path, absent, there):
    write_idx(tmp_path / "mnist", random_bytes(3, 2, 2), random_bytes(3, 2, 2))
    (tmp_path / "mnist" / f"{absent}.gz").unlink()
    with pytest.raises(RunError, match=rf"not found: {absent}\[.gz\];") as refusal:
        mnist(tmp_path)
    assert there not in str(refusal.value)


def test_the_root_goes_before_the_variable_and_that_before_the_folder_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [random_bytes(3, 2, 2, seed=seed) for seed in range(3)]
    for place, values in zip(("given", "named", "data"), images, strict=True):
        write_idx(tmp_path / place, values, values)

    assert same(mnist().train, images[2][:, None])
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named"))
    assert same(mnist().train, images[1][:, None])
    assert same(mnist(tmp_path / "given").train, images[0][:, None])
    monkeypatch.setenv(VARIABLE, "")  # as good as not set
    assert same(mnist().train, images[2][:, None])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "~/sets")
    images = random_bytes(30, 2, 2)
    write_idx(tmp_path / "sets", images, images)
    np.savez(tmp_path / "mine.npz", train=images, test=images)
    assert same(mnist().train, images[:, None])
    assert same(arrays("~/mine.npz").train, images)
