"""Sets read from files: exact values, and a clear word about what is missing or broken."""

import gzip
import hashlib
import io
import os
import pickle
import random
import struct
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiment.data import arrays, cifar10, fashion_mnist, image_folder, mnist
from experiment.data.unpickle import load_bytes
from experiment.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "SCORE_SDE_DATA"
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def same(tensor, values):
    """Equal in shape and in every value."""
    return tensor.shape == values.shape and bool((tensor.numpy() == values).all())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def _no_data_by_chance(monkeypatch, tmp_path):
    """Neither the variable nor the folder ``data`` of the place the tests are started from."""
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


# ---------------------------------------------------------------------------- idx files


def idx(images):
    return b"\x00\x00\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()


def write_idx(folder, train, test, pack=True):
    for name, images in ((TRAIN, train), (TEST, test)):
        if pack:
            write(folder / f"{name}.gz", gzip.compress(idx(images), mtime=0))
        else:
            write(folder / name, idx(images))


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


# ---------------------------------------------------------------------------- where to look


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


# ---------------------------------------------------------------------------- CIFAR-10


def python2_batch(images):
    """What Python 2 wrote: byte strings as keys, and the array's bytes as one of them."""
    rows = images.reshape(len(images), -1)
    n, width = struct.pack("<H", len(rows)), struct.pack("<H", rows.shape[1])
    minus_1 = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + minus_1 * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01M" + n + b"M" + width + b"\x86" + dtype + b"\x89T"
    state += struct.pack("<i", rows.size) + rows.tobytes() + b"tb"
    label = b"U\x0bbatch_labelU\x15training batch 1 of 5U\x06labels](K\x06K\x09e"
    return b"\x80\x02}(" + label + b"U\x04data" + array + state + b"u."


def python3_batch(images, protocol=4, text=False):
    rows = images.reshape(len(images), -1)
    record = {b"batch_label": b"batch", b"labels": [6, 9], b"data": rows, b"filenames": [b"a.png"]}
    if text:
        record = {key.decode(): value for key, value in record.items()}
    return pickle.dumps(record, protocol=protocol)


def batches(train, test, pickled=python2_batch):
    """Content of the six files by name."""
    parts = [*np.array_split(train, 5), test]
    return {name: pickled(part) for name, part in zip(BATCHES, parts, strict=True)}


def write_batches(folder, contents):
    for name, content in contents.items():
        write(folder / "cifar-10-batches-py" / name, content)


def write_archive(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        top = tarfile.TarInfo("cifar-10-batches-py")
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name, content in {"batches.meta": b"not read", **contents}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_npz(folder, train, test, axes=(0, 1, 2, 3)):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cifar10.npz", train=train.transpose(axes), test=test.transpose(axes))


def sheet(images, columns):
    """Tiles of 32x32, row by row."""
    canvas = np.zeros((32 * (len(images) // columns), 32 * columns, 3), np.uint8)
    for i, image in enumerate(images):
        y, x = 32 * (i // columns), 32 * (i % columns)
        canvas[y : y + 32, x : x + 32] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas)


def write_sheets(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(np.array_split(train, 2)):
        sheet(part, 3).save(folder / f"train_{i:02d}.webp", lossless=True)
    sheet(test, 2).save(folder / "test_00.webp", lossless=True)


FORMS = {
    "python 2": lambda folder, *parts: write_batches(folder, batches(*parts)),
    "python 3": lambda folder, *parts: write_batches(folder, batches(*parts, python3_batch)),
    "text keys": lambda folder, *parts: write_batches(
        folder, batches(*parts, partial(python3_batch, text=True))
    ),
    "tar.gz": lambda folder, *parts: write_archive(folder, batches(*parts)),
    "channels first": write_npz,
    "channels last": partial(write_npz, axes=(0, 2, 3, 1)),
    "sheets": write_sheets,
}


@pytest.fixture(scope="module")
def photographs():
    """Twelve and four random images [N, 3, 32, 32]."""
    return random_bytes(12, 3, 32, 32), random_bytes(4, 3, 32, 32, seed=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["cifar10", "cifar-10", "."])
def test_cifar10_comes_back_byte_for_byte_from_every_form_and_place(
    tmp_path, photographs, form, place
):
    FORMS[form](tmp_path / place, *photographs)
    data = cifar10(tmp_path)
    assert same(data.train, photographs[0]) and same(data.test, photographs[1])
    assert (data.name, data.levels, data.train.dtype) == ("cifar10", 256, torch.uint8)


def test_a_row_of_a_batch_holds_red_green_and_blue_planes(tmp_path):
    rows = np.zeros((2, 3072), np.uint8)
    rows[1, 1024 * 2 + 32 * 5 + 7] = 200  # blue, row 5, column 7
    write_batches(tmp_path, batches(np.tile(rows, (5, 1)), rows))
    assert cifar10(tmp_path).test.nonzero().tolist() == [[1, 2, 5, 7]]


def test_the_python_2_batch_of_these_tests_is_what_numpy_reads(photographs):
    record = pickle.loads(python2_batch(photographs[1]), encoding="bytes")
    assert (record[b"data"] == photographs[1].reshape(4, -1)).all()
    assert record[b"labels"] == [6, 9]


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("order", ["C", "F"])
def test_byte_arrays_come_out_of_every_pickle_protocol(protocol, order):
    values = np.asarray(random_bytes(3, 4, 5), order=order)
    record = load_bytes(pickle.dumps({b"data": values, "labels": [1, 2]}, protocol=protocol))
    assert (record["data"] == values).all() and record["data"].dtype == np.uint8
    assert record["labels"] == [1, 2]


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def bombs(marker):
    """Pickles that make the folder ``marker``, by each opcode that can name a function."""
    path = f"S'{marker}'\n".encode()
    rows = random_bytes(2, 3072)
    return {
        "global": b"\x80\x02}S'data'\ncposix\nmkdir\n" + path + b"\x85Rs.",
        "inst": b"}S'data'\n(" + path + b"iposix\nmkdir\ns.",
        "obj": b"\x80\x02}S'data'\n(cposix\nmkdir\n" + path + b"os.",
        "stack global": pickle.dumps({b"data": Bomb(marker)}, protocol=4),
        "beside good data": pickle.dumps({b"data": rows, b"labels": [Bomb(marker)]}, protocol=4),
        "as a key": b"\x80\x02}cposix\nmkdir\n" + path + b"\x85RK\x01s.",
        "by eval": b"\x80\x02}S'data'\ncbuiltins\neval\nS'__import__(\"os\").mkdir(\""
        + str(marker).encode()
        + b"\")'\n\x85Rs.",
    }


@pytest.mark.parametrize("kind", bombs("."))
@pytest.mark.parametrize("form", [write_batches, write_archive])
def test_a_pickle_bomb_in_a_batch_is_refused_and_not_run(tmp_path, photographs, kind, form):
    marker = tmp_path / "marker"
    bomb = bombs(marker)[kind]
    pickle.loads(bomb, encoding="bytes")
    assert marker.is_dir(), "the bomb is live"
    marker.rmdir()

    form(tmp_path, batches(*photographs) | {"data_batch_1": bomb})
    where = f"{tmp_path}.*data_batch_1"
    with pytest.raises(RunError, match=f"{where} is refused: .*nothing was run.*official"):
        cifar10(tmp_path)
    assert not marker.exists()


ROWS = random_bytes(2, 3072)
RECONSTRUCT = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)Rs."


@pytest.mark.parametrize(
    "content, words",
    [
        (python2_batch(ROWS)[:-3000], "is refused: it cannot be read|is refused: pickle data"),
        (python3_batch(ROWS)[:40], "is refused"),
        (b"", "is refused: it cannot be read: Ran out of input"),
        (b"<html>not found</html>", "is refused"),
        (pickle.dumps([ROWS], protocol=2), "is refused: it holds a list, not a dict"),
        (pickle.dumps({b"data": ROWS / 255}, protocol=2), "holds an array that is not of bytes"),
        (pickle.dumps({b"data": ROWS[:, :3071]}, protocol=2), r"\[N, 3072\]; got \(2, 3071\)"),
        (pickle.dumps({b"data": ROWS[0]}, protocol=2), r"\[N, 3072\]; got \(3072,\)"),
        (pickle.dumps({b"data": [1, 2]}, protocol=2), r"\[N, 3072\]; got list"),
        (pickle.dumps({b"labels": [1]}, protocol=2), r"\[N, 3072\]; got NoneType"),
        (RECONSTRUCT, r"\[N, 3072\]; got NoneType"),
        (python2_batch(ROWS).replace(b"M\x02\x00M", b"M\x03\x00M"), "is refused: it cannot be"),
    ],
    ids=[
        "truncated",
        "truncated early",
        "empty",
        "web page",
        "list",
        "floats",
        "short rows",
        "one row",
        "no array",
        "no data",
        "array without bytes",
        "wrong shape",
    ],
)
@pytest.mark.parametrize("form", [write_batches, write_archive])
def test_a_damaged_batch_is_named(tmp_path, photographs, form, content, words):
    form(tmp_path, batches(*photographs) | {"data_batch_3": content})
    with pytest.raises(RunError, match=f"{tmp_path}.*data_batch_3.*({words})"):
        cifar10(tmp_path)


@pytest.mark.parametrize(
    "form, name",
    [(write_batches, "cifar-10-batches-py"), (write_archive, "cifar-10-python.tar.gz")],
)
def test_missing_batches_are_named(tmp_path, photographs, form, name):
    contents = batches(*photographs)
    del contents["data_batch_2"], contents["test_batch"]
    form(tmp_path, contents)
    with pytest.raises(RunError, match=f"{name} lacks data_batch_2, test_batch. .* again"):
        cifar10(tmp_path)


@pytest.mark.parametrize(
    "kept, whole", [(0.0, []), (0.1, []), (0.56, BATCHES[:3]), (0.999, BATCHES[:5])]
)
def test_a_truncated_archive_is_named_with_the_batches_that_could_be_read(
    tmp_path, photographs, kept, whole
):
    write_archive(tmp_path, batches(*photographs))
    path = tmp_path / "cifar-10-python.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    done = ", ".join(whole) or "none"
    with pytest.raises(RunError, match=f"{path} is damaged .*read: {done}. Get it again"):
        cifar10(tmp_path)


@pytest.mark.parametrize(
    "found, words",
    [
        ({"train": random_bytes(2, 32, 32, 3)}, "must hold the arrays train and test.*train"),
        ({}, "must hold the arrays train and test; it holds none"),
        (
            {"train": random_bytes(2, 32, 32, 3), "test": random_bytes(2, 32, 32)},
            r"test must be uint8 .*got uint8 \[2, 32, 32\]",
        ),
        (
            {"train": random_bytes(2, 3, 32, 32) / 255, "test": random_bytes(2, 3, 32, 32)},
            r"train must be uint8 .*got float64 \[2, 3, 32, 32\]",
        ),
    ],
    ids=["one part", "nothing", "grey", "floats"],
)
def test_an_npz_that_is_not_cifar10_is_refused_with_what_it_holds(tmp_path, found, words):
    np.savez(tmp_path / "cifar10.npz", **found)
    with pytest.raises(RunError, match=f"cifar10.npz.*{words}"):
        cifar10(tmp_path)


def test_a_gap_in_the_sheets_is_named(tmp_path, photographs):
    write_sheets(tmp_path, *photographs)
    (tmp_path / "train_01.webp").rename(tmp_path / "train_02.webp")
    with pytest.raises(RunError, match="lacks train_01.webp; sheets are numbered without a gap"):
        cifar10(tmp_path)
    (tmp_path / "train_02.webp").rename(tmp_path / "train_01.webp")
    (tmp_path / "test_00.webp").unlink()
    with pytest.raises(RunError, match="lacks test_00.webp"):
        cifar10(tmp_path)


def test_a_sheet_of_other_tiles_and_a_damaged_one_are_named(tmp_path, photographs):
    write_sheets(tmp_path, *photographs)
    path = tmp_path / "train_01.webp"
    content = path.read_bytes()
    Image.new("RGB", (64, 40)).save(path, lossless=True)
    with pytest.raises(RunError, match=f"{path} must be made of 32x32 tiles; it is 64x40 pixels"):
        cifar10(tmp_path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=f"{path} cannot be read as a picture"):
        cifar10(tmp_path)


# ---------------------------------------------------------------------------- arrays


def write_array(path, **found):
    """A .npz file, or a .npy file of the only array; object arrays by pickle, as numpy does."""
    if path.suffix == ".npz":
        np.savez(path, **found)
    else:
        np.save(path, *found.values(), allow_pickle=True)
    return path


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 16), (2, 5, 6), (1, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4", "<f2"])
def test_floats_of_any_shape_are_continuous_and_come_back_as_float32(tmp_path, shape, dtype):
    train, test = (
        np.random.default_rng(seed).normal(size=(n, *shape)).astype(dtype)
        for seed, n in enumerate((6, 4))
    )
    data = arrays(write_array(tmp_path / "mine.npz", train=train, test=test))
    assert same(data.train, train.astype(np.float32)) and data.train.dtype == torch.float32
    assert same(data.test, test.astype(np.float32))
    assert data.levels is None and data.shape == shape and data.name == "mine"


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 16), (2, 5, 6), (1, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(
    "dtype, levels, stored",
    [
        ("u1", None, torch.uint8),
        ("u1", 256, torch.uint8),
        ("<i8", 200, torch.uint8),
        (">i2", 1000, torch.int64),
        ("<u4", 70_000, torch.int64),
    ],
)
def test_integers_of_any_shape_are_levels_and_come_back_exactly(
    tmp_path, shape, dtype, levels, stored
):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, levels or 256, (n, *shape)).astype(dtype) for n in (20, 10))
    data = arrays(write_array(tmp_path / "mine.npz", train=train, test=test), levels=levels)
    assert same(data.train, train.astype(np.int64)) and same(data.test, test.astype(np.int64))
    assert data.levels == (levels or 256) and data.train.dtype == stored


def test_levels_beyond_a_byte_stay_so_in_a_part_that_has_none_of_them(tmp_path):
    train, test = np.arange(12).reshape(6, 2), 900 + np.arange(6).reshape(3, 2)
    data = arrays(write_array(tmp_path / "mine.npz", train=train, test=test), levels=1000)
    assert same(data.train, train) and same(data.test, test)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_one_array_is_split_at_random_without_loss(tmp_path, suffix, order):
    values = np.asarray(np.random.default_rng(0).normal(size=(50, 3)).astype("f4"), order=order)
    path = write_array(tmp_path / f"mine{suffix}", anything=values)
    data, again = (arrays(path, test_size=0.2, seed=1) for _ in range(2))
    other = arrays(path, test_size=10, seed=2)
    assert (len(data.train), len(data.test), len(other.test)) == (40, 10, 10)
    assert torch.equal(data.test, again.test) and not torch.equal(data.test, other.test)
    rows = torch.cat([data.train, data.test])
    assert sorted(rows.tolist()) == sorted(values.tolist())


def test_the_test_set_may_be_a_second_file(tmp_path):
    train, test = random_bytes(5, 4), random_bytes(3, 4, seed=1)
    first = write_array(tmp_path / "a.npy", a=train)
    second = write_array(tmp_path / "b.npz", b=test)
    data = arrays(first, test_path=second, name="chosen")
    assert same(data.train, train) and same(data.test, test) and data.name == "chosen"


@pytest.mark.parametrize(
    "values, levels, words",
    [
        (np.arange(12).reshape(6, 2), None, "levels=K.*int64 from 0 to 11. Pass data.levels=K"),
        (np.eye(6, dtype="u1"), None, "256 levels, but all of these are 0 or 1"),
        (random_bytes(6, 9).astype("f4"), None, r"look like bytes .*steps of 1\).*data.levels"),
        (random_bytes(6, 9) / 255, None, r"look like bytes .*1/255.*255 \* values"),
        ((random_bytes(6, 9) / 255).astype("f2"), None, "look like bytes"),
        (random_bytes(6, 9) / 255, 256, "must be integers in 0..255; .*float32.*from 0"),
        (random_bytes(6, 9), 17, r"must be in 0..16; .*first \d+ at index \(0, 0\)"),
        (np.full((6, 2), -1), 256, r"must be in 0..255; .*first -1 at index \(0, 0\)"),
        (np.full((6, 2), -1), 300, r"must be in 0..299; .*from -1 to -1.*at index \(0, 0\)"),
        (np.full((6, 2), 2.0**63 * 1.5).astype("u8"), 256, "must be in 0..255"),
        (np.full((6, 2), 0.25), None, "every value of the train set is 0.25"),
        (np.zeros((6, 2)), None, "every value of the train set is 0; constant"),
        (np.zeros((6, 2), "u1"), 256, "every value of the train set is 0; constant"),
        (np.stack([np.arange(6.0) / 7, np.ones(6) / 7], 1), None, "column 1 is the same"),
        (np.full((6, 2), np.nan), None, r"NaN or Inf, first nan at index \(0, 0\)"),
        (np.full((6, 2), 1e300), None, r"NaN or Inf, first inf at index \(0, 0\)"),
        (np.zeros((0, 2), "f4"), None, "nothing to train on; there are 0 samples"),
        (np.zeros((1, 2), "f4"), None, "nothing to train on; there are 1 samples"),
        (np.arange(9.0) / 7, None, r"Scalars are samples of shape \[1\]"),
        (np.zeros((9, 0)), None, "one number or more"),
        (np.array(0.3), None, r"\[N, ...\]; got float64 of shape \(\)"),
        (np.zeros((6, 2), bool), None, "integers or floats .*got bool"),
        (np.zeros((6, 2), complex), None, "integers or floats .*got complex128"),
        (np.full((6, 2), "a"), None, "integers or floats .*got <U1"),
        (np.zeros((6, 2), "M8[s]"), None, "integers or floats .*got datetime64"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused_with_what_was_found(
    tmp_path, values, levels, words
):
    path = write_array(tmp_path / "mine.npy", mine=values)
    with pytest.raises(ValueError, match=f"mine: .*{words}"):
        arrays(path, levels=levels)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_first_nan_of_a_file_is_named_with_its_part(tmp_path, part):
    found = {name: np.random.default_rng(0).normal(size=(9, 4)) for name in ("train", "test")}
    found[part][6, 1] = found[part][7, 0] = np.nan
    path = write_array(tmp_path / "mine.npz", **found)
    with pytest.raises(ValueError, match=rf"the {part} set holds NaN.* at index \(6, 1\), 2 in"):
        arrays(path)


@pytest.mark.parametrize(
    "name, words",
    [
        ("absent.npy", "no file .*absent.npy; pass data.path=FILE"),
        ("table.csv", "got .*table.csv"),
    ],
)
def test_a_file_that_is_missing_or_of_another_kind_is_named(tmp_path, name, words):
    with pytest.raises((RunError, ValueError), match=f"arrays.*{words}"):
        arrays(tmp_path / name)


def test_a_file_whose_arrays_are_not_clear_is_refused_with_their_names(tmp_path):
    x = random_bytes(5, 4)
    three, pair = tmp_path / "three.npz", tmp_path / "pair.npz"
    write_array(three, train=x, x=x, y=x)
    write_array(pair, train=x, test=x)
    with pytest.raises(RunError, match="three.npz must hold .*; it holds train, x, y"):
        arrays(three)
    with pytest.raises(RunError, match="pair.npz must hold .*; it holds train, test"):
        arrays(pair, test_path=pair)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_pickle_bomb_in_an_array_is_refused_and_not_run(tmp_path, suffix):
    marker = tmp_path / "marker"
    path = write_array(tmp_path / f"mine{suffix}", train=np.array([Bomb(marker)]))
    content = np.load(path, allow_pickle=True)
    content if suffix == ".npy" else content["train"]
    assert marker.is_dir(), "the bomb is live"
    marker.rmdir()
    with pytest.raises(RunError, match=f"{path}.*cannot be read.*allow_pickle"):
        arrays(path)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 3, 60, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_truncated_array_file_is_named(tmp_path, suffix, kept):
    path = write_array(tmp_path / f"mine{suffix}", train=np.random.default_rng(0).random((50, 9)))
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(RunError, match=f"{path} cannot be read as numpy arrays: ."):
        arrays(path)


def test_a_damaged_array_is_named_with_its_file(tmp_path):
    train, test = random_bytes(9, 5), random_bytes(9, 5, seed=1)
    path = write_array(tmp_path / "mine.npz", train=train, test=test)
    path.write_bytes(path.read_bytes().replace(test.tobytes(), train.tobytes()))
    with pytest.raises(RunError, match=f"{path}: the array 'test' cannot be read: Bad CRC-32"):
        arrays(path)


def test_a_damaged_header_does_not_shorten_an_array_unnoticed(tmp_path):
    x = random_bytes(600, 40)  # longer than what numpy reads ahead, and sums up by the way
    path = write_array(tmp_path / "mine.npz", train=x, test=x[:9])
    path.write_bytes(path.read_bytes().replace(b"(600, 40)", b"(200, 40)"))
    with pytest.raises(RunError, match=f"{path}: the array 'train' cannot be read: Bad CRC-32"):
        arrays(path)


def test_a_header_that_is_no_python_is_named(tmp_path):
    path = write_array(tmp_path / "mine.npy", mine=random_bytes(9, 5))
    path.write_bytes(path.read_bytes().replace(b"(9, 5)", b"((9, 5"))
    with pytest.raises(RunError, match=f"{path} cannot be read as numpy arrays"):
        arrays(path)


# ---------------------------------------------------------------------------- pictures


def picture(shape, seed=0, mode=None):
    return Image.fromarray(random_bytes(*shape, seed=seed), mode)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def folder_of(path, image, size=None, **options):
    """The set whose four pictures are all ``image``."""
    for part in ("train", "test"):
        for name in ("a", "b"):
            save(image, path / part / f"{name}.png", **options)
    return image_folder(path, size)


@pytest.mark.parametrize(
    "suffix, options", [("png", {}), ("webp", {"lossless": True}), ("bmp", {})]
)
def test_colour_pictures_come_back_byte_for_byte_in_the_order_of_their_names(
    tmp_path, suffix, options
):
    images = random_bytes(5, 6, 4, 3)
    names = ["train/b", "train/a/z", "train/c", "test/2", "test/10"]
    for name, image in zip(names, images, strict=True):
        save(Image.fromarray(image), tmp_path / "mine" / f"{name}.{suffix}", **options)
    (tmp_path / "mine" / "train" / "notes.txt").write_text("no picture")
    data = image_folder(tmp_path / "mine")
    first = images.transpose(0, 3, 1, 2)
    assert same(data.train, first[[1, 0, 2]]) and same(data.test, first[[4, 3]])
    assert (data.name, data.levels, data.train.dtype) == ("mine", 256, torch.uint8)


def test_grey_pictures_have_one_channel(tmp_path):
    image = picture((6, 4))
    data = folder_of(tmp_path, image)
    assert same(data.train, np.stack([np.asarray(image)[None]] * 2))


def test_one_colour_picture_makes_all_of_them_rgb(tmp_path):
    grey, colour = random_bytes(5, 5), random_bytes(5, 5, 3, seed=1)
    for part in ("train", "test"):
        save(Image.fromarray(grey), tmp_path / part / "a.png")
        save(Image.fromarray(grey), tmp_path / part / "b.png")
    save(Image.fromarray(colour), tmp_path / "test" / "c.png")
    data = image_folder(tmp_path)
    assert same(data.train, np.stack([np.stack([grey] * 3)] * 2))
    assert same(data.test[2], colour.transpose(2, 0, 1))


def test_jpeg_blocks_of_one_grey_come_back_exactly(tmp_path):
    blocks = np.kron(
        random_bytes(3, 2), np.ones((8, 8), "u1")
    )  # only the mean of a block is coded
    for name in ("train/a.jpg", "train/b.JPEG", "test/a.jpeg", "test/b.JPG"):
        save(Image.fromarray(blocks), tmp_path / name, quality=100, format="JPEG")
    assert same(image_folder(tmp_path).train, np.stack([blocks[None]] * 2))


def test_transparency_is_dropped_and_the_colour_beneath_it_kept(tmp_path):
    rgba, grey = random_bytes(5, 5, 4), random_bytes(5, 5, 2)
    data = folder_of(tmp_path / "colour", Image.fromarray(rgba))
    assert same(data.train[0], rgba[..., :3].transpose(2, 0, 1))
    data = folder_of(tmp_path / "grey", Image.fromarray(grey, "LA"))
    assert same(data.train[0], grey[None, ..., 0])


def test_palettes_are_looked_up_and_single_bits_are_black_and_white(tmp_path):
    index = random_bytes(5, 5) % 4
    palette = random_bytes(4, 3, seed=1)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    assert same(folder_of(tmp_path / "p", image).train[0], palette[index].transpose(2, 0, 1))
    bits = Image.fromarray((index > 1).astype("u1") * 255).convert("1")
    assert same(folder_of(tmp_path / "1", bits).train[0], (index[None] > 1) * 255)


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_pictures_are_turned_upright_as_their_exif_says(tmp_path, orientation, upright):
    image = random_bytes(3, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = folder_of(tmp_path, Image.fromarray(image), exif=exif)
    assert same(data.train[0], upright(image).transpose(2, 0, 1))


def deep_png(channels, kind):
    """A 3x3 PNG of 16 bits a channel, which Pillow can read but not write in colour."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    rows = random_bytes(3, 6 * channels)
    header = struct.pack(">IIBBBBB", 3, 3, 16, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\x00" + row.tobytes() for row in rows))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "channels, kind", [(1, 0), (3, 2), (2, 4), (4, 6)], ids=["L", "RGB", "LA", "RGBA"]
)
def test_pictures_of_16_bits_are_refused_by_name_not_cut_to_8(tmp_path, channels, kind):
    save(picture((3, 3, 3)), tmp_path / "a.png")
    path = write(tmp_path / "b.png", deep_png(channels, kind))
    Image.open(path).load()  # whole, as Pillow sees it
    with pytest.raises(RunError, match=f"{path} has more than 8 bits a channel; save it with 8"):
        image_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<f4"])
def test_the_depth_is_that_of_the_content_whatever_the_suffix_says(tmp_path, dtype):
    image = Image.fromarray(np.full((3, 3), 300, dtype))
    path = save(image, tmp_path / "a.png", format="TIFF")
    with pytest.raises(RunError, match=f"{path} has more than 8 bits a channel"):
        image_folder(tmp_path)


def test_a_size_crops_the_central_square_and_scales_it(tmp_path):
    image = random_bytes(4, 10, 3)
    for part in ("train", "test"):
        save(Image.fromarray(image), tmp_path / part / "wide.png")
        save(Image.fromarray(image.swapaxes(0, 1)), tmp_path / part / "tall.png")
    data = image_folder(tmp_path, size=4)  # scaled by 1: exact
    assert same(data.train[1], image[:, 3:7].transpose(2, 0, 1))
    assert same(data.train[0], image[:, 3:7].transpose(2, 1, 0))

    ramp = np.tile(np.arange(0, 80, 4, dtype="u1"), (8, 1))  # a filter keeps straight lines
    data = folder_of(tmp_path / "ramp", Image.fromarray(ramp), size=4)
    assert same(data.train[0, 0], np.tile(np.uint8([26, 34, 42, 50]), (4, 1)))


def test_pictures_of_two_sizes_are_refused_by_name_with_the_remedy(tmp_path):
    first = save(picture((4, 6)), tmp_path / "a.png")
    second = save(picture((5, 6)), tmp_path / "b.png")
    with pytest.raises(
        RunError, match=f"{second} is 6x5 pixels, {first} is 6x4; pass data.size=N"
    ):
        image_folder(tmp_path)


def test_a_folder_without_parts_is_split_at_random_without_loss(tmp_path):
    images = random_bytes(20, 4, 4)
    for i, image in enumerate(images):
        save(Image.fromarray(image), tmp_path / f"{i:02d}.png")
    data, again, other = (image_folder(tmp_path, test_size=0.25, seed=i) for i in (3, 3, 4))
    assert (len(data.train), len(data.test)) == (15, 5)
    assert torch.equal(data.test, again.test) and not torch.equal(data.test, other.test)
    rows = torch.cat([data.train, data.test]).flatten(1)
    assert sorted(rows.tolist()) == sorted(images.reshape(20, -1).tolist())


@pytest.mark.parametrize(
    "name, words",
    [("absent", "no folder .*absent; pass data.path=FOLDER"), ("bare", "no pictures .*png.*bare")],
)
def test_a_folder_that_is_missing_or_bare_is_named(tmp_path, name, words):
    write(tmp_path / "bare" / "notes.txt", b"")
    with pytest.raises(RunError, match=f"image_folder: {words}"):
        image_folder(tmp_path / name)


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_a_size_is_a_whole_number_of_pixels(tmp_path, size):
    with pytest.raises(ValueError, match=f"image_folder needs size .*size={size}"):
        image_folder(tmp_path, size=size)


@pytest.mark.parametrize(
    "shape, words", [((1, 4, 4), "there are 1 samples"), ((5, 4, 4), "every value .* is 0")]
)
def test_one_picture_and_constant_pictures_are_refused(tmp_path, shape, words):
    for i in range(shape[0]):
        save(Image.new("L", shape[1:]), tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=words):
        image_folder(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.8])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_truncated_picture_is_named(tmp_path, suffix, kept):
    for i in range(5):
        path = save(picture((16, 16, 3), i), tmp_path / f"{i}.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RunError, match=f"{path} cannot be read as a picture: ..*Repair or remove"):
        image_folder(tmp_path)


# ---------------------------------------------------------------------------- flipped bits


def set_of_idx(folder):
    images = random_bytes(6, 5, 5)
    write_idx(folder, images, images[:3])
    return folder / f"{TRAIN}.gz", lambda: mnist(folder)


def set_of_npz(folder, save=np.savez):
    x = random_bytes(200, 40) // 32  # few values: there is something to compress
    save(folder / "mine.npz", train=x, test=x[:9])
    return folder / "mine.npz", lambda: arrays(folder / "mine.npz")


def set_of_png(folder):
    for i in range(4):
        path = save(picture((16, 16, 3), i), folder / f"{i}.png")
    return path, lambda: image_folder(folder, test_size=2)


def set_of_archive(folder):
    write_archive(folder, batches(random_bytes(10, 3, 32, 32), random_bytes(2, 3, 32, 32)))
    return folder / "cifar-10-python.tar.gz", lambda: cifar10(folder)


CHECKED = {  # forms that carry a checksum
    "idx.gz": set_of_idx,
    "npz": set_of_npz,
    "compressed npz": partial(set_of_npz, save=np.savez_compressed),
    "png": set_of_png,
    "tar.gz": set_of_archive,
}


@pytest.mark.parametrize("form", CHECKED)
def test_a_flipped_bit_is_found_and_the_file_named_or_it_changes_nothing(tmp_path, form):
    path, load = CHECKED[form](tmp_path)
    content, whole = path.read_bytes(), load()
    draw = random.Random(0)
    found = 0
    for _ in range(40):
        bit = draw.randrange(8 * len(content))
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            data = load()
        except RunError as error:
            assert str(path) in str(error)
            found += 1
        else:
            assert torch.equal(data.train, whole.train) and torch.equal(data.test, whole.test)
    assert found > 20, "most bits matter"


# ---------------------------------------------------------------------------- the real files


NAMED = os.environ.get(VARIABLE)  # read before the tests hide it
PLACES = [Path(NAMED).expanduser().absolute()] if NAMED else []


def real(source):
    """The real set, from where the variable says, or else beside or below the project."""
    reasons = []
    for place in PLACES or [ROOT.parent / "shared" / "data", ROOT / "data"]:
        try:
            return source(place)
        except RunError as error:
            if "not found: " not in str(error):
                raise
            reasons.append(str(error))
    pytest.skip(reasons[0])


# Mean and std of the training pixels in [0, 1], a channel, as they are published; then the
# sha256 of the bytes [N, C, H, W] of both parts, of files whose md5 is the published one.
REAL = {
    mnist: (
        [0.1307],
        [0.3081],
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    ),
    fashion_mnist: (
        [0.2860],
        [0.3530],
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    ),
    cifar10: (
        [0.4914, 0.4822, 0.4465],
        [0.2470, 0.2435, 0.2616],
        "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
        "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
    ),
}


@pytest.mark.parametrize("source", REAL, ids=lambda source: source.__name__)
def test_the_real_files_give_the_published_images_and_their_mean_and_std(source):
    data = real(source)
    mean, std, *digests = REAL[source]
    shape, train = ((3, 32, 32), 50_000) if source is cifar10 else ((1, 28, 28), 60_000)
    assert data.train.shape == (train, *shape) and data.test.shape == (10_000, *shape)
    assert data.levels == 256 and data.train.dtype == data.test.dtype == torch.uint8
    for part, digest in zip((data.train, data.test), digests, strict=True):
        assert hashlib.sha256(part.numpy()).hexdigest() == digest
    for channel in range(shape[0]):
        pixels = data.train[:, channel].float() / 255
        assert float(pixels.mean()) == pytest.approx(mean[channel], abs=5e-5)  # four digits given
        assert float(pixels.std()) == pytest.approx(std[channel], abs=5e-5)
