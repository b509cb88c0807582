"""MNIST and Fashion-MNIST, from the files their authors publish."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy
import torch
from torch import Tensor

from experiment.data.dataset import Dataset
from experiment.data.labels import conditions
from experiment.data.locate import data_root, find, missing
from experiment.errors import RunError
from sde_lib import validation


def mnist(root: str | Path | None = None, conditional: bool = False) -> Dataset:
    """60,000 + 10,000 handwritten digits, [N, 1, 28, 28] of 256 grey levels.

    Reference: LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document
        recognition, 1998.

    Args:
        root: Folder that holds the four files, or ``mnist/`` or ``MNIST/raw/`` with them; None is
            the variable SCORE_SDE_DATA, else ``data``.
        conditional: Whether the digit that is meant goes with each image, as its class.

    Raises:
        RunError: If files are missing or damaged.
    """
    homepage = "https://ossci-datasets.s3.amazonaws.com/mnist/FILE.gz"  # the authors' page refuses
    return _idx_images("mnist", root, ("mnist", "MNIST/raw"), homepage, conditional)


def fashion_mnist(root: str | Path | None = None, conditional: bool = False) -> Dataset:
    """60,000 + 10,000 articles of clothing, [N, 1, 28, 28] of 256 grey levels.

    Reference: Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017.

    Args:
        root: Folder with ``fashion-mnist/`` or ``FashionMNIST/raw/`` in it, or with the four
            files; None is the variable SCORE_SDE_DATA, else ``data``.
        conditional: Whether the kind of article goes with each image, as one of ten classes.

    Raises:
        RunError: If files are missing or damaged.
    """
    homepage = "https://github.com/zalandoresearch/fashion-mnist"
    return _idx_images(
        "fashion_mnist", root, ("fashion-mnist", "FashionMNIST/raw"), homepage, conditional
    )


def _idx_images(
    name: str, root: str | Path | None, places: tuple[str, str], homepage: str, conditional: bool
) -> Dataset:
    base = data_root(root)
    folders = [
        *(base / place for place in places),
        base,
    ]  # own folder first: both sets use the same file names
    kinds = ["images-idx3"]
    if validation.flag(name, "conditional", conditional):
        kinds.append("labels-idx1")
    files = [f"{part}-{kind}-ubyte" for kind in kinds for part in ("train", "t10k")]
    # All from one folder: a gap must not be filled with the other set's file of the same name.
    found = [[find((file, file + ".gz"), [folder]) for file in files] for folder in folders]
    paths = min(found, key=lambda paths: paths.count(None))
    if None in paths:
        absent = [f"{file}[.gz]" for file, path in zip(files, paths, strict=True) if path is None]
        raise missing(name, absent, folders, homepage)
    train, test = (read_idx(path)[:, None] for path in paths[:2])
    labels = [read_idx(path, axes=1).numpy() for path in paths[2:]]
    conds = conditions(name, *labels, 10) if labels else {}
    return Dataset(name, train, test, levels=256, **conds)


def read_idx(path: Path, axes: int = 3) -> Tensor:
    """Images [N, H, W] of an idx3-ubyte file, or labels [N] of an idx1-ubyte file, uint8.

    Args:
        path: The file, packed by gzip or not.
        axes: 3 for images, 1 for labels.

    Raises:
        RunError: If the file is damaged; says where.
    """
    content, start = _unpack(path), 4 + 4 * axes
    what, head = ("images", "labels")[axes == 1], bytes([0, 0, 8, axes])
    if len(content) < start or content[:4] != head:
        raise RunError(
            f"{path} is no idx file of {what}: it must start with the bytes {head.hex()} and "
            f"{axes} size(s), it starts with {content[:4].hex() or 'nothing'}. Get it again."
        )
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != math.prod(shape):
        whole = (len(content) - start) // max(1, math.prod(shape[1:]))
        each = f" of {shape[1]}x{shape[2]}" if axes == 3 else ""
        raise RunError(
            f"{path} is damaged: its header promises {shape[0]} {what}{each}, "
            f"{math.prod(shape)} bytes; there are {len(content) - start}. {what[:-1].title()} "
            f"{min(whole, shape[0])} is the first wrong one. Get it again."
        )
    values = numpy.frombuffer(content, numpy.uint8, offset=start)  # torch's refuses an empty set
    return torch.from_numpy(values.reshape(shape).copy())


def _unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RunError(f"{path} is damaged: {error}. Get it again.") from error
