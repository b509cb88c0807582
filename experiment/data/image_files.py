"""Folders of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from experiment.data.dataset import Dataset
from experiment.data.labels import conditions
from experiment.data.pictures import Header, Pictures, another_size, read_header, read_image
from experiment.data.samples import Samples, each_block, is_lazy, some_rows
from experiment.data.split import split_rows
from experiment.errors import RunError
from experiment.progress import progress
from sde_lib import validation

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_folder(
    path: str | Path,
    size: int | None = None,
    test_size: float = 0.1,
    seed: int = 0,
    lazy: str | bool = "auto",
    conditional: bool = False,
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
        lazy: Whether pictures are decoded each time that they are asked for; auto does so where
            all of them would take more than 1 GiB.
        conditional: Whether the folder that a picture is in, below ``path`` or below ``train`` and
            ``test``, is its class; classes are counted in the order of their names.

    Raises:
        RunError: If there are no pictures, they differ in size, or a file is damaged; of pictures
            decoded later only the fronts of the files are looked at before.
    """
    path = Path(path).expanduser()
    size = None if size is None else validation.count("image_folder", "size", size)
    folders = [path / "train", path / "test"]
    parted = all(folder.is_dir() for folder in folders)
    folders = folders if parted else [path]
    parts = [_pictures(folder) for folder in folders]
    files = [file for part in parts for file in part]
    mode = _mode(files, size)
    samples = _samples(files, mode, size, lazy)
    name = path.absolute().name
    if parted:
        train, test = torch.arange(len(files)).split([len(part) for part in parts])
    else:
        train, test = split_rows(name, len(files), test_size, seed)
    conds = {}
    if validation.flag("image_folder", "conditional", conditional):
        labels = _labels(folders, parts)
        conds = conditions(name, labels[train.numpy()], labels[test.numpy()])
    parts = (some_rows(samples, rows) for rows in (train, test))
    return Dataset(name, *parts, levels=256, **conds)


@dataclass(frozen=True)
class _Decoder:
    """Decodes a file by its number; goes to other processes with its list of files alone."""

    files: list[Path]
    mode: str
    size: int | None

    def __call__(self, row: int) -> numpy.ndarray:
        return read_image(self.files[row], self.mode, self.size)

    def called(self, row: int) -> str:
        """The path of a file."""
        return str(self.files[row])


def _mode(files: list[Path], size: int | None) -> str:
    """Grey if all pictures are; each file is opened, none is decoded."""
    headers = [read_header(file) for file in progress(files, "files")]
    if size is None:
        for file, header in zip(files, headers, strict=True):
            if sorted(header[1:]) != sorted(headers[0][1:]):  # an EXIF note may turn it
                raise another_size(str(file), _extent(header), str(files[0]), _extent(headers[0]))
    return "L" if all(header.grey for header in headers) else "RGB"


def _extent(header: Header) -> str:
    return f"{header.width}x{header.height}"


def _samples(files: list[Path], mode: str, size: int | None, lazy: str | bool) -> Samples:
    decoder = _Decoder(files, mode, size)
    pictures = Pictures.of(decoder, decoder.called, len(files))
    if is_lazy("image_folder", lazy, numpy.prod(pictures.shape, dtype=float)):
        return pictures
    whole, start = torch.empty(pictures.shape, dtype=torch.uint8), 0
    for block in each_block(pictures, "pictures"):
        whole[start : start + len(block)] = block
        start += len(block)
    return whole


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


def _labels(folders: list[Path], parts: list[list[Path]]) -> numpy.ndarray:
    """The class of each picture, int64 [N], by the folder of the first level that it is in."""
    names = []
    for folder, files in zip(folders, parts, strict=True):
        for file in files:
            inner = file.relative_to(folder).parts[:-1]
            if not inner:
                raise RunError(
                    f"image_folder: data.conditional=true takes the subfolder of a picture for "
                    f"its class, and {file} lies in none. Move it, or leave conditional out."
                )
            names.append(inner[0])
    return numpy.unique(names, return_inverse=True)[1]
