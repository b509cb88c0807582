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
from experiment.data.locate import data_root, find, missing
from experiment.errors import RunError


def mnist(root: str | Path | None = None) -> Dataset:
    """60,000 + 10,000 handwritten digits, [N, 1, 28, 28] of 256 grey levels.

    Reference: LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document
        recognition, 1998.

    Args:
        root: Folder that holds the four files, or ``mnist/`` or ``MNIST/raw/`` with them; None is
            the variable SCORE_SDE_DATA, else ``data``.

    Raises:
        RunError: If files are missing or damaged.
    """
    homepage = "https://ossci-datasets.s3.amazonaws.com/mnist/FILE.gz"  # the authors' page refuses
    return _idx_images("mnist", root, ("mnist", "MNIST/raw"), homepage)


def fashion_mnist(root: str | Path | None = None) -> Dataset:
    """60,000 + 10,000 articles of clothing, [N, 1, 28, 28] of 256 grey levels.

    Reference: Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017.

    Args:
        root: Folder with ``fashion-mnist/`` or ``FashionMNIST/raw/`` in it, or with the four
            files; None is the variable SCORE_SDE_DATA, else ``data``.

    Raises:
        RunError: If files are missing or damaged.
    """
    homepage = "https://github.com/zalandoresearch/fashion-mnist"
    return _idx_images("fashion_mnist", root, ("fashion-mnist", "FashionMNIST/raw"), homepage)


def _idx_images(
    name: str, root: str | Path | None, places: tuple[str, str], homepage: str
) -> Dataset:
    base = data_root(root)
    folders = [
        *(base / place for place in places),
        base,
    ]  # own folder first: both sets use the same file names
    files = [f"{part}-images-idx3-ubyte" for part in ("train", "t10k")]
    # Both from one folder: a gap must not be filled with the other set's file of the same name.
    found = [[find((file, file + ".gz"), [folder]) for file in files] for folder in folders]
    paths = min(found, key=lambda paths: paths.count(None))
    if None in paths:
        absent = [f"{file}[.gz]" for file, path in zip(files, paths, strict=True) if path is None]
        raise missing(name, absent, folders, homepage)
    train, test = (read_idx(path)[:, None] for path in paths)
    return Dataset(name, train, test, levels=256)


def read_idx(path: Path) -> Tensor:
    """Images [N, H, W], uint8, of an idx3-ubyte file, packed by gzip or not.

    Raises:
        RunError: If the file is damaged; says where.
    """
    content = _unpack(path)
    if len(content) < 16 or content[:4] != b"\x00\x00\x08\x03":
        raise RunError(
            f"{path} is no idx file of images: it must start with the bytes 00000803 and three "
            f"sizes, it starts with {content[:4].hex() or 'nothing'}. Get it again."
        )
    shape = struct.unpack(">3I", content[4:16])
    if len(content) - 16 != math.prod(shape):
        whole = (len(content) - 16) // max(1, shape[1] * shape[2])
        raise RunError(
            f"{path} is damaged: its header promises {shape[0]} images of {shape[1]}x{shape[2]}, "
            f"{math.prod(shape)} bytes; there are {len(content) - 16}. Image "
            f"{min(whole, shape[0])} is the first wrong one. Get it again."
        )
    pixels = numpy.frombuffer(content, numpy.uint8, offset=16)  # torch's refuses an empty set
    return torch.from_numpy(pixels.reshape(shape).copy())


def _unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RunError(f"{path} is damaged: {error}. Get it again.") from error
