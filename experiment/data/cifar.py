"""CIFAR-10: the official python version, arrays, or lossless sheets of tiles."""

from __future__ import annotations

import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor

from experiment.data.array_files import read_npz
from experiment.data.dataset import Dataset
from experiment.data.locate import data_root, missing
from experiment.data.pictures import read_image
from experiment.data.unpickle import load_bytes
from experiment.errors import RunError

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
SIZES = 50_000, 10_000
TILE = 32


def cifar10(root: str | Path | None = None) -> Dataset:
    """50,000 + 10,000 photographs, [N, 3, 32, 32] of 256 levels.

    Read from whichever is there: ``cifar-10-batches-py/`` or ``cifar-10-python.tar.gz`` (whose
    pickles are read without being run), ``cifar10.npz`` with uint8 arrays ``train`` and ``test``
    (channels first or last), or lossless ``train_00.webp`` ... and ``test_00.webp`` ... whose
    tiles of 32x32 are the images, row by row.

    Reference: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        root: Folder that holds one of these, or a folder ``cifar10/`` with one in it; None is the
            variable SCORE_SDE_DATA, else ``data``.

    Raises:
        RunError: If nothing is found, a file is damaged, or images are missing.
    """
    base = data_root(root)
    folders = [base / "cifar10", base / "cifar-10", base]
    for folder in folders:
        for pattern, read in _READERS.items():
            if (folder / pattern).exists():
                train, test = read(folder / pattern)
                _check_sizes(folder / pattern, train, test)
                return Dataset("cifar10", train, test, levels=256)
    raise missing(
        "cifar10", [" or ".join(_READERS)], folders, "https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _check_sizes(path: Path, *parts: Tensor) -> None:
    """A figure on a part of the test set must not go under the name of the whole."""
    found, wanted = (" + ".join(f"{n:,}" for n in sizes) for sizes in (map(len, parts), SIZES))
    if found != wanted:
        raise RunError(
            f"cifar10: {path} leads to {found} images, and CIFAR-10 has {wanted}. Get it again, "
            "or read a part of it with data=arrays."
        )


def _from_batches(folder: Path) -> tuple[Tensor, Tensor]:
    absent = [batch for batch in BATCHES if not (folder / batch).exists()]
    if absent:
        raise RunError(f"cifar10: {folder} lacks {', '.join(absent)}. Unpack the archive again.")
    parts = [
        _decode_batch(str(folder / batch), (folder / batch).read_bytes()) for batch in BATCHES
    ]
    return torch.cat(parts[:-1]), parts[-1]


def _from_archive(path: Path) -> tuple[Tensor, Tensor]:
    parts = {}
    try:
        with tarfile.open(path) as archive:
            for name, content in _files(archive):  # in memory: nothing is unpacked to disk
                if name in BATCHES:
                    parts[name] = _decode_batch(f"{path}: {name}", content)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        done = ", ".join(parts) or "none"
        why = " ".join(str(error).split())  # tarfile's own words may take several lines
        raise RunError(
            f"{path} is damaged ({why}); batches that could be read: {done}. Get it again."
        ) from error
    absent = [batch for batch in BATCHES if batch not in parts]
    if absent:
        raise RunError(f"{path} lacks {', '.join(absent)}. Get it again.")
    return torch.cat([parts[batch] for batch in BATCHES[:-1]]), parts[BATCHES[-1]]


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile():
            yield Path(member.name).name, archive.extractfile(member).read()
    while archive.fileobj.read(2**20):  # to the end, where gzip has its checksum
        pass


def _decode_batch(where: str, content: bytes) -> Tensor:
    """Images [N, 3, 32, 32] of one pickled batch; a row holds its red, green and blue planes."""
    try:
        rows = load_bytes(content).get("data")
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{where} is refused: {error}. Get the official python version again."
        ) from error
    if not isinstance(rows, numpy.ndarray) or rows.ndim != 2 or rows.shape[1] != 3 * TILE**2:
        got = getattr(rows, "shape", type(rows).__name__)
        raise RunError(f"{where}: 'data' must be an array of bytes [N, {3 * TILE**2}]; got {got}.")
    return torch.from_numpy(rows.copy()).reshape(-1, 3, TILE, TILE)


def _from_npz(path: Path) -> tuple[Tensor, Tensor]:
    found = read_npz(path)
    if not {"train", "test"} <= found.keys():
        raise RunError(
            f"{path} must hold the arrays train and test; it holds {', '.join(found) or 'none'}."
        )
    train, test = (_channel_first(path, part, found[part]) for part in ("train", "test"))
    return train, test


def _channel_first(path: Path, key: str, images: numpy.ndarray) -> Tensor:
    if images.dtype != numpy.uint8 or images.shape[1:] not in ((TILE, TILE, 3), (3, TILE, TILE)):
        raise RunError(
            f"{path}: {key} must be uint8 [N, 32, 32, 3] or [N, 3, 32, 32]; got {images.dtype} "
            f"{list(images.shape)}."
        )
    images = images.transpose(0, 3, 1, 2) if images.shape[-1] == 3 else images
    return torch.from_numpy(numpy.ascontiguousarray(images))


def _from_sheets(first: Path) -> tuple[Tensor, Tensor]:
    return _sheets(first.parent, "train"), _sheets(first.parent, "test")


def _sheets(folder: Path, part: str) -> Tensor:
    found = sorted(
        path for path in folder.iterdir() if re.fullmatch(rf"{part}_\d\d\.webp", path.name)
    )
    wanted = [f"{part}_{i:02d}.webp" for i in range(max(1, len(found)))]
    absent = sorted(set(wanted) - {path.name for path in found})
    if absent:
        raise RunError(
            f"cifar10: {folder} lacks {', '.join(absent)}; sheets are numbered without a gap."
        )
    return torch.cat([_tiles(path) for path in found])


def _tiles(path: Path) -> Tensor:
    """Images [N, 3, 32, 32] of one sheet, row by row."""
    sheet = torch.from_numpy(read_image(path, "RGB"))
    if sheet.shape[0] % TILE or sheet.shape[1] % TILE:
        raise RunError(
            f"{path} must be made of 32x32 tiles; it is {sheet.shape[1]}x{sheet.shape[0]} pixels."
        )
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    tiles = sheet.reshape(rows, TILE, columns, TILE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(rows * columns, 3, TILE, TILE)


_READERS: dict[str, Callable[[Path], tuple[Tensor, Tensor]]] = {
    "cifar-10-batches-py": _from_batches,
    "cifar-10-python.tar.gz": _from_archive,
    "cifar10.npz": _from_npz,
    "train_00.webp": _from_sheets,
}
