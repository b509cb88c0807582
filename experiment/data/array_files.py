"""The user's own arrays: .npy and .npz files of any sample shape."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from experiment.data.dataset import Dataset, check_samples
from experiment.data.labels import conditions
from experiment.data.raw_values import Raw, StoredSamples, in_memory, levels_of
from experiment.data.samples import Samples, is_lazy
from experiment.data.split import split
from experiment.data.stored import NotByRow, stored_npy, stored_npz
from experiment.errors import RunError
from sde_lib import validation

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
    lazy: str | bool = "auto",
    conditional: bool = False,
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
        lazy: Whether samples stay in the file until they are asked for; auto does so from 1 GiB
            on, where the file allows it: a compressed ``.npz`` does not.
        conditional: Whether the ``.npz`` file also says what each sample is: integers [N], the
            class, or floats [N, d], as ``train_labels`` and ``test_labels`` or ``train_cond`` and
            ``test_cond``.

    Raises:
        RunError: If a file is missing or damaged.
        ValueError: If the values cannot be what they are said to be; see `Dataset`.
    """
    path = Path(path).expanduser()
    name = name or path.stem
    found = _found(path, lazy)
    if test_path is not None:
        found = {
            "train": _only(path, found),
            "test": _only(test_path, _found(Path(test_path).expanduser(), lazy)),
        }
    conds = _conds(name, path, found) if validation.flag(name, "conditional", conditional) else {}
    if {"train", "test"} <= found.keys():
        levels = levels_of(name, found["train"], levels)
        train, test = (_samples(name, found[part], levels) for part in ("train", "test"))
    else:
        values = _only(path, found)
        levels = levels_of(name, values, levels)
        samples = _samples(name, values, levels)
        train, test = split(name, samples, test_size, seed)
        if isinstance(samples, Tensor):  # from disk, complaints name the row of the file
            check_samples(name, "train", samples, levels)
    return Dataset(name, train, test, levels=levels, **conds)


def _found(path: Path, lazy: str | bool) -> dict[str, Raw]:
    """The arrays of a file by name, in memory or left where they are."""
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"arrays are read from .npy and .npz files; got {path}.")
    if not path.is_file():
        raise RunError(f"arrays: no file {path.absolute()}; pass data.path=FILE.")
    if not is_lazy("arrays", lazy, path.stat().st_size):
        return read_npz(path)
    try:
        return stored_npz(path) if zipfile.is_zipfile(path) else {path.stem: stored_npy(path)}
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    except NotByRow:
        if str(lazy).lower() != "auto":
            raise
        return read_npz(path)


def _samples(name: str, values: Raw, levels: int | None) -> Samples:
    if isinstance(values, numpy.ndarray):
        return in_memory(name, values, levels)
    samples = StoredSamples(name, values, levels)
    samples.check_wide()
    return samples


def _conds(name: str, path: Path, found: dict[str, Raw]) -> dict[str, Any]:
    """Classes or vectors of both parts, as `Dataset` takes them."""
    for kind in ("labels", "cond"):
        keys = [f"{part}_{kind}" for part in ("train", "test")]
        if found.keys() >= {*keys, "train", "test"}:
            parts = (found[key] for key in keys)
            return conditions(name, *(part[numpy.arange(len(part))] for part in parts))
    raise RunError(
        f"{path}: data.conditional=true wants the arrays train, test, train_labels and "
        "test_labels (or train_cond and test_cond) in one .npz file; it holds "
        f"{', '.join(found) or 'none'}."
    )


def read_npz(path: Path) -> dict[str, numpy.ndarray]:
    """All arrays of a ``.npz`` file, or that of a ``.npy`` file under its stem; no pickles.

    Raises:
        RunError: If the file, or one array in it, is damaged.
    """
    try:
        content = numpy.load(path, allow_pickle=False)
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    if isinstance(content, numpy.ndarray):
        return {path.stem: content}
    with content:
        return {key: _member(path, content, key) for key in content.files}


def _unreadable(path: Path, error: Exception) -> RunError:
    why = str(error) or type(error).__name__
    if "pickle" in why:  # numpy's answer to anything that it does not know
        why = "it is no numpy file, or holds Python objects"
    return RunError(f"{path} cannot be read as numpy arrays: {why}.")


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


def _only(path: str | Path, found: dict[str, Raw]) -> Raw:
    if len(found) != 1:
        raise RunError(
            f"{path} must hold the arrays train and test, or one array; it holds "
            f"{', '.join(found) or 'none'}."
        )
    return next(iter(found.values()))
