"""Images side by side as one picture of whole pixels: grids, and the way from noise to data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiment.canvas import write_picture
from sde_lib.validation import count

if TYPE_CHECKING:
    from PIL import Image

TILE = 48  # pixels; a digit of 8x8 needs about this much to be read on a screen
PALE, HEADING = 225, 16  # grey between the tiles, pixels of a line above them
PAD = 2  # pixels between tiles


def save_grid(
    images: Tensor,
    path: str | Path,
    columns: int | None = None,
    scale: int | None = None,
    pad: int = PAD,
    labels: Sequence[str] = (),
) -> Path:
    """Write images side by side as one PNG.

    Args:
        images: uint8 [N, C, H, W]. One or two channels show the first in grey, three or more the
            first three as red, green, blue.
        path: Where to; the folder is made.
        columns: Images in a row; the grid is about square if not given.
        scale: Whole-number enlargement by repetition; tiles get at least 48 pixels if not given.
        pad: Pixels between tiles.
        labels: What to write left of the rows, one each; none leaves no room for them.

    Raises:
        ValueError: If images are no uint8 of that shape, there is none, or a number is below 1.
    """
    _check_images(images)
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    columns = min(count("save_grid", "columns", columns), len(images))
    scale = _scale(images, "save_grid", scale)
    pad = count("save_grid", "pad", pad, at_least=0)
    tiled = _tile(images.detach().cpu(), columns, scale, pad)
    return _save_pixels(torch.cat([_margin(labels, tiled), tiled], 1) if labels else tiled, path)


def save_strip(
    states: Sequence[Tensor],
    path: str | Path,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write the way from noise to data: one row a sample, one column a state.

    Args:
        states: Images uint8 [N, C, H, W], one batch a state, noise first.
        path: Where to.
        scale: As in ``save_grid``.
        labels: What to write above the columns, where all of it fits.

    Raises:
        ValueError: If there is no state, or the batches differ in shape.
    """
    if not states or len({state.shape for state in states}) != 1:
        raise ValueError(
            f"save_strip needs one batch of the same shape a state; got shapes "
            f"{[tuple(state.shape) for state in states]}."
        )
    images = torch.stack(list(states), dim=1).flatten(0, 1)  # [N, S, ...] -> [N S, ...]
    _check_images(images)
    tiled = _tile(images.detach().cpu(), len(states), _scale(images, "save_strip", scale), PAD)
    return _save_pixels(torch.cat([_heading(labels, tiled), tiled]) if labels else tiled, path)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"a grid needs images as uint8 [N, C, H, W], none of them 0; got "
            f"{images.dtype} {tuple(images.shape)}; scale to 0..255 and round first."
        )


def _scale(images: Tensor, what: str, scale: int | None) -> int:
    """Of tiles with 48 pixels or more, if not given."""
    return count(
        what, "scale", math.ceil(TILE / max(images.shape[2:])) if scale is None else scale
    )


def _heading(labels: Sequence[str], tiled: Tensor) -> Tensor:
    """A line [H, ...] to go above ``tiled``, a label in the middle of each column; none if one of
    them is wider than that."""
    from PIL import Image, ImageDraw, ImageFont

    font, column = ImageFont.load_default(), (tiled.shape[1] - PAD) / len(labels)
    if max(map(font.getlength, labels)) > column - PAD:
        return tiled[:0]
    line = Image.new("L", (tiled.shape[1], HEADING), PALE)
    for place, label in enumerate(labels):
        middle = PAD / 2 + (place + 0.5) * column
        ImageDraw.Draw(line).text((middle, HEADING / 2), label, 0, font, anchor="mm")
    return _as_pixels(line, tiled)


def _margin(labels: Sequence[str], tiled: Tensor) -> Tensor:
    """A column to go left of ``tiled``, a label in the middle of each row."""
    from PIL import Image, ImageDraw, ImageFont

    font, row = ImageFont.load_default(), (tiled.shape[0] - PAD) / len(labels)
    width = math.ceil(max(map(font.getlength, labels))) + 4 * PAD
    line = Image.new("L", (width, tiled.shape[0]), PALE)
    for place, label in enumerate(labels):
        middle = PAD / 2 + (place + 0.5) * row
        ImageDraw.Draw(line).text((width / 2, middle), label, 0, font, anchor="mm")
    return _as_pixels(line, tiled)


def _as_pixels(line: Image.Image, tiled: Tensor) -> Tensor:
    """A grey picture as pixels with the channels of ``tiled``."""
    grey = torch.frombuffer(bytearray(line.tobytes()), dtype=torch.uint8)
    grey = grey.reshape(line.height, line.width)
    return grey if tiled.ndim == 2 else grey[..., None].expand(-1, -1, tiled.shape[2])


def _tile(images: Tensor, columns: int, scale: int, pad: int) -> Tensor:
    """One picture [H, W] or [H, W, 3] from [N, C, H, W], pale grey between the tiles."""
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    number, channels, height, width = images.shape
    rows = math.ceil(number / columns)
    canvas = torch.full(
        (channels, rows * (height + pad) + pad, columns * (width + pad) + pad),
        PALE,
        dtype=torch.uint8,
    )
    for index, image in enumerate(images):
        top = pad + index // columns * (height + pad)
        left = pad + index % columns * (width + pad)
        canvas[:, top : top + height, left : left + width] = image
    return canvas.permute(1, 2, 0).squeeze(-1)


def _save_pixels(pixels: Tensor, path: str | Path) -> Path:
    from PIL import Image

    picture = Image.fromarray(pixels.contiguous().numpy())
    return write_picture(path, lambda partial: picture.save(partial, format="PNG"))
