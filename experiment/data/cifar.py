"""CIFAR-10: the official python version, arrays, or lossless sheets of tiles."""

from __future__ import annotations

import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy
import torch
from torch import Tensor

from experiment.data.array_files import read_npz
from experiment.data.dataset import Dataset
from experiment.data.labels import conditions
from experiment.data.locate import data_root, missing
from experiment.data.pictures import read_image
from experiment.data.unpickle import load_bytes
from experiment.errors import RunError
from sde_lib import validation

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
SIZES = 50_000, 10_000
TILE = 32


def cifar10(root: str | Path | None = None, conditional: bool = False) -> Dataset:
    """50,000 + 10,000 photographs, [N, 3, 32, 32] of 256 levels.

    Read from whichever is there: ``cifar-10-batches-py/`` or ``cifar-10-python.tar.gz`` (whose
    pickles are read without being run), ``cifar10.npz`` with uint8 arrays ``train`` and ``test``
    (channels first or last), or lossless ``train_00.webp`` ... and ``test_00.webp`` ... whose
    tiles of 32x32 are the images, row by row.

    Labels are those of the pickles; beside ``cifar10.npz``, in it, ``train_labels`` and
    ``test_labels``; beside the sheets ``labels.npz`` with ``train`` and ``test``.

    Reference: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        root: Folder that holds one of these, or a folder ``cifar10/`` with one in it; None is the
            variable SCORE_SDE_DATA, else ``data``.
        conditional: Whether what is shown goes with each image, as one of ten classes.

    Raises:
        RunError: If nothing is found, a file is damaged, or images or labels are missing.
    """
    base = data_root(root)
    folders = [base / "cifar10", base / "cifar-10", base]
    wanted = validation.flag("cifar10", "conditional", conditional)
    for folder in folders:
        for pattern, form in _FORMS.items():
            path = folder / pattern
            if path.exists():
                train, test = form.images(path)
                _check_sizes(path, train, test)
                conds = conditions("cifar10", *form.labels(path), 10) if wanted else {}
                return Dataset("cifar10", train, test, levels=256, **conds)
    raise missing(
        "cifar10", [" or ".join(_FORMS)], folders, "https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _check_sizes(path: Path, *parts: Tensor) -> None:
    """A figure on a part of the test set must not go under the name of the whole."""
    found, wanted = (" + ".join(f"{n:,}" for n in sizes) for sizes in (map(len, parts), SIZES))
    if found != wanted:
        raise RunError(
            f"cifar10: {path} leads to {found} images, and CIFAR-10 has {wanted}. Get it again, "
            "or read a part of it with data=arrays."
        )


Part = TypeVar("Part")


def _batches(folder: Path, decode: Callable[[str, bytes], Part]) -> list[Part]:
    absent = [batch for batch in BATCHES if not (folder / batch).exists()]
    if absent:
        raise RunError(f"cifar10: {folder} lacks {', '.join(absent)}. Unpack the archive again.")
    return [decode(str(folder / batch), (folder / batch).read_bytes()) for batch in BATCHES]


def _archive(path: Path, decode: Callable[[str, bytes], Part]) -> list[Part]:
    parts = {}
    try:
        with tarfile.open(path) as archive:
            for name, content in _files(archive):  # in memory: nothing is unpacked to disk
                if name in BATCHES:
                    parts[name] = decode(f"{path}: {name}", content)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        done = ", ".join(parts) or "none"
        why = " ".join(str(error).split())  # tarfile's own words may take several lines
        raise RunError(
            f"{path} is damaged ({why}); batches that could be read: {done}. Get it again."
        ) from error
    absent = [batch for batch in BATCHES if batch not in parts]
    if absent:
        raise RunError(f"{path} lacks {', '.join(absent)}. Get it again.")
    return [parts[batch] for batch in BATCHES]


def _images_of(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(parts[:-1]), parts[-1]


def _labels_of(parts: list[numpy.ndarray]) -> tuple[numpy.ndarray, numpy.ndarray]:
    return numpy.concatenate(parts[:-1]), parts[-1]


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile():
            yield Path(member.name).name, archive.extractfile(member).read()
    while archive.fileobj.read(2**20):  # to the end, where gzip has its checksum
        pass


def _record(where: str, content: bytes) -> dict[str, object]:
    try:
        return load_bytes(content)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{where} is refused: {error}. Get the official python version again."
        ) from error


def _batch_images(where: str, content: bytes) -> Tensor:
    """Images [N, 3, 32, 32] of one pickled batch; a row holds its red, green and blue planes."""
    rows = _record(where, content).get("data")
    if not isinstance(rows, numpy.ndarray) or rows.ndim != 2 or rows.shape[1] != 3 * TILE**2:
        got = getattr(rows, "shape", type(rows).__name__)
        raise RunError(f"{where}: 'data' must be an array of bytes [N, {3 * TILE**2}]; got {got}.")
    return torch.from_numpy(rows.copy()).reshape(-1, 3, TILE, TILE)


def _batch_labels(where: str, content: bytes) -> numpy.ndarray:
    """Classes [N] of one pickled batch."""
    labels = _record(where, content).get("labels")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise RunError(
            f"{where}: 'labels' must be a list of whole numbers; got {type(labels).__name__}."
        )
    return numpy.array(labels, numpy.int64)


def _arrays(path: Path, *keys: str) -> list[numpy.ndarray]:
    if not path.exists():
        raise RunError(f"cifar10: no labels: there is no {path}. Leave data.conditional out.")
    found = read_npz(path)
    if not found.keys() >= {*keys}:
        raise RunError(
            f"{path} must hold the arrays {' and '.join(keys)}; it holds "
            f"{', '.join(found) or 'none'}."
        )
    return [found[key] for key in keys]


def _from_npz(path: Path) -> tuple[Tensor, Tensor]:
    keys = ("train", "test")
    found = zip(keys, _arrays(path, *keys), strict=True)
    train, test = (_channel_first(path, key, images) for key, images in found)
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


class _Form(NamedTuple):
    """A form in which the set is kept: what reads its images, and what their labels."""

    images: Callable[[Path], tuple[Tensor, Tensor]]
    labels: Callable[[Path], Sequence[numpy.ndarray]]


_FORMS = {
    "cifar-10-batches-py": _Form(
        lambda path: _images_of(_batches(path, _batch_images)),
        lambda path: _labels_of(_batches(path, _batch_labels)),
    ),
    "cifar-10-python.tar.gz": _Form(
        lambda path: _images_of(_archive(path, _batch_images)),
        lambda path: _labels_of(_archive(path, _batch_labels)),
    ),
    "cifar10.npz": _Form(_from_npz, lambda path: _arrays(path, "train_labels", "test_labels")),
    "train_00.webp": _Form(
        _from_sheets, lambda path: _arrays(path.with_name("labels.npz"), "train", "test")
    ),
}
