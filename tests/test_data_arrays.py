"""Arrays of the user: exact values, and a clear word about what is missing or broken."""

import numpy as np
import pytest
import torch
from data_files import Bomb, random_bytes, same, write_array

from experiment.data import arrays
from experiment.errors import RunError

pytestmark = pytest.mark.usefixtures("no_data_by_chance")


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
        (random_bytes(6, 9) / 127.5 - 1, None, r"look like bytes .*2/255.*127.5 \* \(values"),
        ((random_bytes(6, 9) / 127.5 - 1).astype("f4"), None, "look like bytes .*2/255"),
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
    with pytest.raises(RunError, match=f"{path}.*cannot be read"):
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


def test_rows_are_counted_as_the_file_does(tmp_path):
    values = np.random.default_rng(0).standard_normal((60, 2)).astype("f4")
    values[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"NaN or Inf, first nan at index \(3, 1\)"):
        arrays(write_array(tmp_path / "mine.npy", mine=values))
    levels = np.zeros((60, 2), "i8")
    levels[5, 0], levels[::2] = 4, 1
    with pytest.raises(ValueError, match=r"first 4 at index \(5, 0\)"):
        arrays(write_array(tmp_path / "mine.npy", mine=levels), levels=4)


def test_text_under_a_numpy_suffix_is_not_called_pickled(tmp_path):
    path = tmp_path / "mine.npy"
    path.write_text("garbage")
    with pytest.raises(RunError, match="it is no numpy file, or holds Python objects"):
        arrays(path)
