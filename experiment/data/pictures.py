"""Encoded pictures, decoded when they are asked for; or a clear word about what is damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy
import torch
from torch import Tensor

from experiment.data.samples import row_indices
from experiment.errors import RunError

_GREY = ("1", "L", "LA")
_DEEP = ("I", "F")  # more than 8 bits: Pillow would clip them, not scale them
_DEEP_COLOURS = ";16B"  # of a 16-bit PNG that is not plain grey: Pillow would drop the low bytes


class Header(NamedTuple):
    """What the front of a file says of its picture."""

    grey: bool
    width: int
    height: int


def read_image(
    source: Path | BinaryIO, mode: str, size: int | None = None, called: str = ""
) -> numpy.ndarray:
    """One picture as uint8, [H, W] for mode "L", [H, W, 3] for "RGB".

    Args:
        source: Its file.
        mode: "L" or "RGB".
        size: Crop it to its central square and scale that to size x size.
        called: What messages call it; the path by default.

    Raises:
        RunError: If the file is damaged or no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(source) as picture:
            converted = ImageOps.exif_transpose(picture).convert(mode)
    except _damage() as error:
        raise _broken(called or source, error) from error
    if size is not None:
        converted = ImageOps.fit(converted, (size, size), Image.Resampling.LANCZOS)
    return numpy.array(converted)


def read_header(source: Path | BinaryIO, called: str = "") -> Header:
    """Whether a picture is grey, and its extent before it is turned upright; nothing is decoded.

    Raises:
        RunError: If it has more than 8 bits a channel, or is damaged.
    """
    from PIL import Image

    try:
        with Image.open(source) as picture:
            mode, layout, extent = picture.mode, str(picture.tile), picture.size
    except _damage() as error:
        raise _broken(called or source, error) from error
    if mode.startswith(_DEEP) or _DEEP_COLOURS in layout:
        raise RunError(f"{called or source} has more than 8 bits a channel; save it with 8.")
    return Header(mode in _GREY, *extent)


def _damage() -> tuple[type[Exception], ...]:
    """What Pillow raises for a damaged file."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def _broken(called: object, error: Exception) -> RunError:
    return RunError(
        f"{called} cannot be read as a picture: {error or type(error).__name__}. Repair or remove "
        "it."
    )


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size, decoded when they are asked for, [N, 1 or 3, H, W], uint8.

    Args:
        decode: Number of a picture -> uint8 [H, W] or [H, W, 3].
        called: Number of a picture -> what messages call it.
        count: N.
        first: The first picture, whose size all must have.

    Raises:
        RunError: From reading, for one that is damaged or of another size; names it.
    """

    decode: Callable[[int], numpy.ndarray]
    called: Callable[[int], str]
    count: int
    first: tuple[int, ...]

    @classmethod
    def of(
        cls, decode: Callable[[int], numpy.ndarray], called: Callable[[int], str], count: int
    ) -> Pictures:
        """With the size of the first of them."""
        return cls(decode, called, count, decode(0).shape)

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, C, H, W]."""
        return (self.count, *(self.first[2:] or (1,)), *self.first[:2])

    @property
    def dtype(self) -> torch.dtype:
        """Bytes."""
        return torch.uint8

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        wanted = row_indices(rows, self.count).tolist()
        found = torch.empty((len(wanted), *self.shape[1:]), dtype=torch.uint8)
        for place, row in enumerate(wanted):
            found[place] = _channel_first(self._picture(row))
        return found

    def _picture(self, row: int) -> numpy.ndarray:
        found = self.decode(row)
        if found.shape != self.first:
            raise another_size(
                self.called(row), extent(found), self.called(0), f"{self.first[1]}x{self.first[0]}"
            )
        return found


def _channel_first(image: numpy.ndarray) -> Tensor:
    made = torch.from_numpy(image)
    return made[None] if made.ndim == 2 else made.permute(2, 0, 1)


def another_size(called: str, extent: str, first: str, first_extent: str) -> RunError:
    """Says which picture has another size than the first, and what to do."""
    return RunError(
        f"{called} is {extent} pixels, {first} is {first_extent}; pass data.size=N to crop and "
        "scale all of them to N x N."
    )


def extent(image: numpy.ndarray) -> str:
    """Width and height in pixels."""
    return f"{image.shape[1]}x{image.shape[0]}"
