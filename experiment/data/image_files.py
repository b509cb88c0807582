"""Folders of pictures."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy
import torch
from torch import Tensor

from experiment.data.dataset import Dataset
from experiment.data.split import split
from experiment.errors import RunError
from experiment.progress import progress
from sde_lib import validation

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_GREY = ("1", "L", "LA")
_DEEP = ("I", "F")  # more than 8 bits: Pillow would clip them, not scale them
_DEEP_COLOURS = ";16B"  # of a 16-bit PNG that is not plain grey: Pillow would drop the low bytes


def image_folder(
    path: str | Path, size: int | None = None, test_size: float = 0.1, seed: int = 0
) -> Dataset:
    """Every picture under ``path``, in the order of its name: [N, 1 or 3, H, W] of 256 levels.

    Grey if all of them are, else RGB; transparency is dropped. If there are folders ``train`` and
    ``test``, these are the two parts; otherwise a random split is made.

    Args:
        path: Folder, searched with all its subfolders for PNG, JPEG, WebP and BMP files.
        size: Crop each picture to its central square and scale that to size x size; None leaves
            pictures as they are, and they must all have one size.
        test_size: Share (below 1) or number of pictures that the split keeps for the test.
        seed: Of the split.

    Raises:
        RunError: If there are no pictures, they differ in size, or a file is damaged.
    """
    path = Path(path).expanduser()
    size = None if size is None else validation.count("image_folder", "size", size)
    folders = [path / "train", path / "test"]
    parted = all(folder.is_dir() for folder in folders)
    parts = [_pictures(folder) for folder in (folders if parted else [path])]
    grey = [_is_grey(file) for part in parts for file in part]  # a list: every file is checked
    mode = "L" if all(grey) else "RGB"
    images = [_load(part, mode, size) for part in parts]
    name = path.absolute().name
    train, test = images if parted else split(name, images[0], test_size, seed)
    return Dataset(name, train, test, levels=256)


def read_image(path: Path, mode: str, size: int | None = None) -> numpy.ndarray:
    """One picture as uint8, [H, W] for mode "L", [H, W, 3] for "RGB".

    Raises:
        RunError: If the file is damaged or no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            converted = ImageOps.exif_transpose(picture).convert(mode)
    except _damage() as error:
        raise _broken(path, error) from error
    if size is not None:
        converted = ImageOps.fit(converted, (size, size), Image.Resampling.LANCZOS)
    return numpy.array(converted)


def _is_grey(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            mode, layout = picture.mode, str(picture.tile)
    except _damage() as error:
        raise _broken(path, error) from error
    if mode.startswith(_DEEP) or _DEEP_COLOURS in layout:
        raise RunError(f"{path} has more than 8 bits a channel; save it with 8.")
    return mode in _GREY


def _damage() -> tuple[type[Exception], ...]:
    """What Pillow raises for a damaged file."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def _broken(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} cannot be read as a picture: {error or type(error).__name__}. Repair or remove "
        "it."
    )


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RunError(f"image_folder: no folder {folder.absolute()}; pass data.path=FOLDER.")
    files = sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
    )
    if not files:
        raise RunError(
            f"image_folder: no pictures ({', '.join(SUFFIXES)}) under {folder.absolute()}."
        )
    return files


def _load(files: list[Path], mode: str, size: int | None) -> Tensor:
    """Pictures [N, C, H, W] of one size."""
    images = []
    for file in progress(files, "pictures"):
        images.append(read_image(file, mode, size))
        if images[-1].shape != images[0].shape:
            raise RunError(
                f"{file} is {_extent(images[-1])} pixels, {files[0]} is {_extent(images[0])}; "
                "pass data.size=N to crop and scale all of them to N x N."
            )
    stack = torch.from_numpy(numpy.stack(images))
    return stack[:, None] if mode == "L" else stack.permute(0, 3, 1, 2).contiguous()


def _extent(image: numpy.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
