"""A table without a download: patches of two photographs that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiment.data.dataset import Dataset
from sde_lib import validation

SIDE = 8  # of a patch
BLOCK = 16  # side of the squares that go to one part whole, so that no pixel is in both
GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def patches(test_blocks: int = 520, seed: int = 0) -> Dataset:
    r"""Grey 8x8 patches, [N, 63] continuous: what BSDS300 is among the tables of the literature.

    Levels 0..255 are spread over their bins and divided by 256; the mean of the patch is taken
    off, and its last pixel, which then says nothing new, is left out. The photographs are cut
    into squares of 16x16. Those drawn for the test give one patch each, so that test samples are
    as independent as the draw; the others give all 81 patches that lie in them.

    Reference: Papamakarios et al., Masked Autoregressive Flow for Density Estimation, 2017,
    section 4.2 (BSDS300); the photographs are China and flower of scikit-learn.

    Args:
        test_blocks: Squares of the 2,080 that are kept for the test, each one test sample.
        seed: Of that draw, of the place of a test patch in its square, and of the spreading.

    Raises:
        ValueError: If ``test_blocks`` leaves no square to train on.
        ImportError: Without scikit-learn.
    """
    blocks = _blocks(_photographs())
    if validation.count("patches", "test_blocks", test_blocks) >= len(blocks):
        raise ValueError(
            f"patches needs test_blocks below its {len(blocks)} squares; got {test_blocks}."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(blocks), generator=generator)
    test, train = (_windows(blocks[part]) for part in order.tensor_split([int(test_blocks)]))
    place = torch.randint(test.shape[1], (len(test),), generator=generator)
    test = test[torch.arange(len(test)), place]
    return Dataset("patches", *(_centred(part, generator) for part in (train.flatten(0, 1), test)))


def _photographs() -> list[Tensor]:
    """Grey levels [H, W] of each, whole numbers as float64."""
    from sklearn.datasets import load_sample_images

    grey = torch.tensor(GREY, dtype=torch.float64)
    images = load_sample_images().images  # bytes [H, W, 3]
    return [(torch.tensor(image, dtype=torch.float64) @ grey).round() for image in images]


def _blocks(photographs: Sequence[Tensor]) -> Tensor:
    """Squares [N, 16, 16] of all photographs; what is left over at their edges is not used."""
    cut = (photo.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK) for photo in photographs)
    return torch.cat([squares.flatten(0, 1) for squares in cut])


def _windows(blocks: Tensor) -> Tensor:
    """All patches within each of N squares, [N, 81, 64]."""
    return blocks.unfold(1, SIDE, 1).unfold(2, SIDE, 1).flatten(3).flatten(1, 2)


def _centred(patches: Tensor, generator: torch.Generator) -> Tensor:
    """[N, 64] levels to [N, 63] float32."""
    noise = torch.rand(patches.shape, generator=generator, dtype=torch.float64)
    x = (patches + noise) / 256
    return (x - x.mean(1, keepdim=True))[:, :-1].float()
