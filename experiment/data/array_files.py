"""The user's own arrays: .npy and .npz files of any sample shape."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy
import torch
from torch import Tensor

from experiment.data.dataset import Dataset
from experiment.data.split import split
from experiment.errors import RunError

_DAMAGE: tuple[type[Exception], ...] = (ValueError, EOFError, OSError, KeyError, SyntaxError)
_DAMAGE += (NotImplementedError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error)
_DAMAGE += (tokenize.TokenError,)  # numpy reads the header of an array as Python


def arrays(
    path: str | Path,
    test_path: str | Path | None = None,
    levels: int | None = None,
    test_size: float = 0.1,
    seed: int = 0,
    name: str | None = None,
) -> Dataset:
    """Samples [N, ...] from a ``.npy`` or ``.npz`` file: integers are levels, floats continuous.

    Args:
        path: A ``.npy`` file, or a ``.npz`` file with the arrays ``train`` and ``test``, or with a
            single one.
        test_path: A second such file of one array, the test set; without it one array is split at
            random.
        levels: K of integer data in 0..K-1; 256 by default for uint8, else required.
        test_size: Share (below 1) or number of samples that the split keeps for the test.
        seed: Of the split.
        name: What to call the data; the file's name by default.

    Raises:
        RunError: If a file is missing or damaged.
        ValueError: If the values cannot be what they are said to be; see `Dataset`.
    """
    path = Path(path).expanduser()
    name = name or path.stem
    found = _read(path)
    if test_path is not None:
        found = {
            "train": _only(path, found),
            "test": _only(test_path, _read(Path(test_path).expanduser())),
        }
    if {"train", "test"} <= found.keys():
        levels = _levels(name, found["train"], levels)
        train, test = (_tensor(name, found[part], levels) for part in ("train", "test"))
    else:
        samples = _only(path, found)
        levels = _levels(name, samples, levels)
        values = _tensor(name, samples, levels)
        train, test = split(name, values, test_size, seed)
        Dataset(name, values, values, levels=levels)  # its complaints count rows as the file does
    return Dataset(name, train, test, levels=levels)


def read_npz(path: Path) -> dict[str, numpy.ndarray]:
    """All arrays of a ``.npz`` file, or that of a ``.npy`` file under its stem; no pickles.

    Raises:
        RunError: If the file, or one array in it, is damaged.
    """
    try:
        content = numpy.load(path, allow_pickle=False)
    except _DAMAGE as error:
        why = str(error) or type(error).__name__
        if "pickle" in why:  # numpy's answer to anything that it does not know
            why = "it is no numpy file, or holds Python objects"
        raise RunError(f"{path} cannot be read as numpy arrays: {why}.") from error
    if isinstance(content, numpy.ndarray):
        return {path.stem: content}
    with content:
        return {key: _member(path, content, key) for key in content.files}


def _member(path: Path, content: numpy.lib.npyio.NpzFile, key: str) -> numpy.ndarray:
    try:
        values = content[key]
        _check_sum(content, key)
        return values
    except _DAMAGE as error:
        raise RunError(
            f"{path}: the array {key!r} cannot be read: {error or type(error).__name__}."
        ) from error


def _check_sum(content: numpy.lib.npyio.NpzFile, key: str) -> None:
    """Read to the end, where the checksum is: a damaged header may have asked for less."""
    name = key if key in content.zip.namelist() else f"{key}.npy"
    with content.zip.open(name) as member:
        while member.read(2**20):
            pass


def _read(path: Path) -> dict[str, numpy.ndarray]:
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"arrays are read from .npy and .npz files; got {path}.")
    if not path.is_file():
        raise RunError(f"arrays: no file {path.absolute()}; pass data.path=FILE.")
    return read_npz(path)


def _only(path: str | Path, found: dict[str, numpy.ndarray]) -> numpy.ndarray:
    if len(found) != 1:
        raise RunError(
            f"{path} must hold the arrays train and test, or one array; it holds "
            f"{', '.join(found) or 'none'}."
        )
    return next(iter(found.values()))


def _levels(name: str, values: numpy.ndarray, levels: int | None) -> int | None:
    """``levels``, or what stands for it: 256 for uint8, None for floats unlike bytes."""
    if levels is not None or values.size == 0 or values.dtype.kind not in "fiu":
        return levels
    if values.dtype.kind == "f":
        _refuse_bytes(name, values)
        return None
    if values.dtype != numpy.uint8:
        raise ValueError(
            f"{name}: integer data need levels=K, the number of values there can be; the file "
            f"has {values.dtype} from {values.min()} to {values.max()}. Pass data.levels=K."
        )
    if values.max() <= 1:
        raise ValueError(
            f"{name}: bytes are taken for 256 levels, but all of these are 0 or 1. Pass "
            "data.levels=2 if that is what they are; if they were shares of 1 before, multiply "
            "by 255 and round before you convert."
        )
    return 256


def _refuse_bytes(name: str, values: numpy.ndarray) -> None:
    """Levels dressed up as floats have no density, so a likelihood of them means nothing."""
    low, high, near = values.min(), values.max(), 255 * numpy.finfo(values.dtype).eps
    if not -1 <= low < high <= 255:  # constants, and where NaN is about: reported later
        return
    values = values.astype(numpy.float64)
    if low >= 0 and _whole(values, 0):
        steps, remedy = "1", "values.astype('uint8') and pass data.levels=K, how many there can be"
    elif low >= 0 and high <= 1 and _whole(values * 255.0, near):
        steps, remedy = "1/255", "(255 * values).round().astype('uint8')"
    elif high <= 1 and _whole((values + 1.0) * 127.5, near):
        steps, remedy = "2/255", "(127.5 * (values + 1)).round().astype('uint8')"
    else:
        return
    raise ValueError(
        f"{name}: the {values.dtype} data look like bytes (range {low:g} to {high:g}, all on "
        f"steps of {steps}); taken as continuous their density has no meaning. Save {remedy}."
    )


def _whole(values: numpy.ndarray, tolerance: float) -> bool:
    return bool(numpy.abs(values - numpy.rint(values)).max() <= tolerance)


def _tensor(name: str, values: numpy.ndarray, levels: int | None) -> Tensor:
    """Floats as float32; levels as bytes where they fit, so that images stay small."""
    if values.dtype.kind not in "fiu" or values.ndim == 0:
        raise ValueError(
            f"{name}: samples must be integers or floats [N, ...]; got {values.dtype} of shape "
            f"{values.shape}."
        )
    if values.dtype.kind == "f":
        with numpy.errstate(over="ignore"):  # what float32 cannot hold is reported as Inf
            return torch.from_numpy(values.astype(numpy.float32, order="C"))
    fits = values.size and values.min() >= 0 and values.max() <= 255
    kind = numpy.uint8 if fits and levels is not None and levels <= 256 else numpy.int64
    return torch.from_numpy(values.astype(kind, order="C"))
