"""Arrays that stay in their files: the same data, in little memory, and no damage unnoticed."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import random_bytes, write_array

from experiment.data import Dataset, arrays
from experiment.data.samples import Rows, is_lazy, row_indices
from experiment.data.stored import StoredArray, stored_npy
from experiment.errors import RunError
from experiment.measured import measure

pytestmark = pytest.mark.usefixtures("no_data_by_chance")
ROOT = Path(__file__).resolve().parents[1]
PARTS = slice(3, 11, 2), slice(None, None, -1), torch.tensor([7, 0, 7, -1, 3]), slice(0, 0)


def normal(*shape, seed=0, dtype="f4"):
    return np.random.default_rng(seed).normal(3, 2, shape).astype(dtype)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    "values, levels",
    [
        (normal(40, 3), None),
        (normal(40, 2, 3, 4, dtype=">f8"), None),
        (normal(40, 5, dtype="f2"), None),
        (random_bytes(40, 3, 4, 4), None),
        (random_bytes(40, 6).astype(">i4") % 17, 17),
        (np.random.default_rng(0).integers(0, 60_000, (40, 3)), 60_000),
    ],
    ids=lambda v: str(v.dtype) if isinstance(v, np.ndarray) else "",
)
def test_samples_read_from_the_file_are_those_held_in_memory(tmp_path, suffix, values, levels):
    path = write_array(tmp_path / f"mine{suffix}", mine=values)
    lazy, held = (arrays(path, levels=levels, lazy=lazy) for lazy in (True, False))
    assert not isinstance(lazy.train, torch.Tensor) and isinstance(held.train, torch.Tensor)
    for part in ("train", "test"):
        here, there = getattr(held, part), getattr(lazy, part)
        assert there.shape == here.shape and there.dtype == here.dtype and len(there) == len(here)
        assert torch.equal(there[:], here)
    for rows in PARTS:
        taken = (
            held.train[torch.arange(36)[rows.start : rows.stop : 2]]
            if rows == PARTS[0]
            else (held.train.flip(0) if rows == PARTS[1] else held.train[rows])
        )
        assert torch.equal(lazy.train[rows], taken)
    assert lazy.levels == held.levels and lazy.range == held.range
    assert measure(lazy).fingerprint == measure(held).fingerprint
    if levels is None and held.levels is None:  # sums in another order
        for name in ("shift", "scale"):
            torch.testing.assert_close(getattr(lazy.units, name), getattr(held.units, name))


def test_two_parts_and_a_second_file_may_stay_where_they_are(tmp_path):
    train, test = normal(9, 4), normal(5, 4, seed=1)
    both = write_array(tmp_path / "both.npz", train=train, test=test)
    first, second = tmp_path / "a.npy", tmp_path / "b.npy"
    np.save(first, train)
    np.save(second, test)
    for data in (arrays(both, lazy=True), arrays(first, test_path=second, lazy=True)):
        assert torch.equal(data.train[:], torch.from_numpy(train))
        assert torch.equal(data.test[:], torch.from_numpy(test))


def test_a_pickled_copy_reads_the_same_rows(tmp_path):
    data = arrays(write_array(tmp_path / "mine.npy", mine=normal(50, 3)), lazy=True)
    content = pickle.dumps(data.train)
    copy = pickle.loads(content)
    assert torch.equal(copy[torch.tensor([4, 1])], data.train[torch.tensor([4, 1])])
    assert len(content) < 45 * 8 + 3000, "indices and a path, no samples"


def test_a_view_of_rows_sorts_what_it_reads_and_gives_it_in_the_order_asked_for():
    class Counted:
        shape, dtype, asked = (10, 1), torch.float32, []

        def __len__(self):
            return 10

        def __getitem__(self, rows):
            self.asked.append(rows.tolist())
            return rows[:, None].float()

    of = Counted()
    view = Rows(of, torch.tensor([9, 2, 5, 7]))
    assert view[torch.tensor([3, 0, 1, 0])].flatten().tolist() == [7, 9, 2, 9]
    assert of.asked == [[2, 7, 9, 9]]
    assert view.in_order()[:].flatten().tolist() == [2, 5, 7, 9]


@pytest.mark.parametrize("rows", [torch.tensor([3]), torch.tensor([-4]), 1, [1], torch.ones(3)])
def test_rows_that_are_not_there_or_no_indices_are_refused(rows):
    with pytest.raises(IndexError, match="of 3 samples|int64 indices"):
        row_indices(rows, 3)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_file_that_is_cut_short_is_named_with_the_first_sample_that_is_not_whole(
    tmp_path, suffix
):
    path = write_array(tmp_path / f"mine{suffix}", mine=normal(50, 3))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=f"{path} is cut short: .*50 samples|{path} cannot be read"):
        arrays(path, lazy=True)


def test_a_file_that_is_cut_short_in_the_middle_of_training_is_named(tmp_path):
    path = write_array(tmp_path / "mine.npy", mine=normal(50, 3))
    data = arrays(path, lazy=True)
    os.truncate(path, 128 + 20 * 12)
    with pytest.raises(RunError, match="Sample 20 is the first that is not whole"):
        data.train[:]
    path.unlink()
    with pytest.raises(FileNotFoundError, match="mine.npy"):
        data.train[:]


@pytest.mark.parametrize(
    "values, levels, bad, words",
    [
        (normal(50, 3), None, np.nan, r"finite; sample 13 holds nan at \(1,\)"),
        (normal(50, 3, dtype="f8"), None, 1e300, r"finite; sample 13 holds 1e\+300 at \(1,\)"),
        (random_bytes(50, 3).astype("i2"), 256, -1, r"in 0..255; sample 13 holds -1 at \(1,\)"),
        (random_bytes(50, 3) % 17, 17, 17, r"in 0..16; sample 13 holds 17 at \(1,\)"),
    ],
    ids=["nan", "overflow", "negative", "too large"],
)
def test_values_that_are_not_allowed_are_found_at_the_door_and_when_a_batch_is_read(
    tmp_path, values, levels, bad, words
):
    path = write_array(tmp_path / "mine.npy", mine=values)
    data = arrays(path, levels=levels, lazy=True)
    values[13, 1] = bad
    np.save(path, values)  # while a training reads it
    with pytest.raises(RunError, match=f"{path}: values must be .*{words}. Repair"):
        data.train[torch.arange(45)], data.test[:]
    with pytest.raises(RunError, match=f"{path}: values must be .*{words}"):
        arrays(path, levels=levels, lazy=True)


def test_a_bit_that_was_flipped_in_a_stored_npz_is_found_at_the_door(tmp_path):
    path = write_array(tmp_path / "mine.npz", train=random_bytes(60, 9), test=random_bytes(20, 9))
    content = bytearray(path.read_bytes())
    content[300] ^= 4
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path}: the array 'train' cannot be read: Bad CRC-32"):
        arrays(path, lazy=True)


@pytest.mark.parametrize("form", ["compressed", "by column"])
def test_a_form_without_single_rows_is_refused_if_it_must_be_lazy_and_else_held(tmp_path, form):
    path = tmp_path / "mine.npz"
    if form == "compressed":
        np.savez_compressed(path, mine=normal(30, 4))
    else:
        np.savez(path, mine=np.asfortranarray(normal(30, 4)))
    with pytest.raises(RunError, match=f"{path}.*single samples of it cannot be read.*lazy=false"):
        arrays(path, lazy=True)
    assert torch.equal(arrays(path, lazy="auto").train, arrays(path, lazy=False).train)


def test_auto_leaves_large_files_where_they_are(tmp_path, monkeypatch):
    path = write_array(tmp_path / "mine.npy", mine=normal(30, 4))
    assert isinstance(arrays(path).train, torch.Tensor)
    monkeypatch.setattr("experiment.data.samples.LAZY_BYTES", 100)
    assert isinstance(arrays(path).train, Rows)
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, mine=normal(30, 4))
    assert isinstance(arrays(packed).train, torch.Tensor), "it cannot be read by rows"


@pytest.mark.parametrize("lazy", ["always", None, 1])
def test_lazy_is_true_false_or_auto(lazy):
    with pytest.raises(ValueError, match="mine needs lazy to be one of auto, false, true"):
        is_lazy("mine", lazy, 0)


@pytest.mark.parametrize("scale", [1, 255, 127.5], ids=str)
def test_bytes_dressed_up_as_floats_are_found_in_the_file_too(tmp_path, scale):
    values = random_bytes(40, 9) / scale - (scale == 127.5)
    path = write_array(tmp_path / "mine.npy", mine=values)
    with pytest.raises(ValueError, match="look like bytes"):
        arrays(path, lazy=True)


def test_objects_and_single_numbers_are_refused(tmp_path):
    single = tmp_path / "single.npy"
    np.save(single, np.array(0.3))
    with pytest.raises(RunError, match="single number"):
        arrays(single, lazy=True)
    objects = write_array(tmp_path / "objects.npy", mine=np.array([[{}], [{}]], dtype=object))
    with pytest.raises(RunError, match="holds Python objects"):
        arrays(objects, lazy=True)


def test_stretches_of_neighbours_are_read_at_once_and_give_the_same(tmp_path, monkeypatch):
    values = normal(100, 3)
    stored = stored_npy(write_array(tmp_path / "mine.npy", mine=values))
    places = []
    fill = StoredArray._fill
    monkeypatch.setattr(
        StoredArray, "_fill", lambda self, *a: (places.append(a[2]), fill(self, *a))
    )
    rows = np.array([5, 6, 7, 40, 41, 2])
    assert (stored[rows] == values[rows]).all()
    assert [(place - stored.offset) // 12 for place in places] == [5, 40, 2]


GROWTH = """
import sys, torch
from experiment.data import arrays
from experiment.measured import measure

def peak():
    # of this process alone: ru_maxrss begins at that of whoever started it
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024

def use(path, lazy):
    data = arrays(path, lazy=lazy)
    measure(data), data.train[torch.arange(128)]

small, large = sys.argv[1:]
use(small, True), use(small, False)  # what the code itself takes
before = peak()
use(large, True)
between = peak()
use(large, False)
print(between - before, peak() - between)
"""


def test_a_file_larger_than_memory_is_checked_measured_and_read_in_little_memory(tmp_path):
    head, large = normal(10, 1, 16, 16), tmp_path / "large.npy"
    small = write_array(tmp_path / "small.npy", mine=normal(5000, 1, 16, 16))
    count = 100_000  # 98 MiB, of which all but the front is a hole in the file
    with open(large, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, 1, 16, 16)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(head.tobytes())
        file.truncate(file.tell() + (count - 10) * 1024)
    command = [sys.executable, "-c", GROWTH, str(small), str(large)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lazy, held = map(float, ended.stdout.split())
    assert lazy < 25, "MiB of 98"
    assert held > 70, "or the measurement measures nothing"


def test_samples_on_disk_make_a_data_set_of_their_own(tmp_path):
    class Ramp:
        shape, dtype = (50, 2), torch.float32

        def __len__(self):
            return 50

        def __getitem__(self, rows):
            rows = row_indices(rows, 50)
            return torch.stack([rows, rows**2], 1).float()

    data = Dataset("ramp", Ramp(), Ramp())
    assert data.range == (0.0, 49.0**2)
    torch.testing.assert_close(data.units.shift, Ramp()[:].mean(0))
