"""CIFAR-10 in each of its forms: exact values, and a clear word about what is broken."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from data_files import (
    BATCHES,
    Bomb,
    batches,
    python2_batch,
    python3_batch,
    random_bytes,
    same,
    write_archive,
    write_batches,
    write_npz,
    write_sheets,
)
from PIL import Image

from experiment.data import cifar, cifar10
from experiment.data.unpickle import load_bytes
from experiment.errors import RunError

pytestmark = pytest.mark.usefixtures("no_data_by_chance")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The sets of these tests are whole."""
    monkeypatch.setattr(cifar, "SIZES", (12, 4))


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
    rows = np.zeros((4, 3072), np.uint8)
    rows[1, 1024 * 2 + 32 * 5 + 7] = 200  # blue, row 5, column 7
    write_batches(tmp_path, batches(np.tile(rows, (3, 1)), rows))
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


@pytest.mark.parametrize("form", FORMS)
def test_a_set_that_is_not_whole_does_not_go_under_the_name(tmp_path, photographs, form):
    train, test = photographs
    FORMS[form](tmp_path, train[:6], test)
    with pytest.raises(RunError, match=r"leads to 6 \+ 4 images, and CIFAR-10 has 12 \+ 4"):
        cifar10(tmp_path)
