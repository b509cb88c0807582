"""A table of patches: which pixels they are, and that no pixel is both trained on and tested."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from experiment.data import patches
from experiment.data.photo_patches import _blocks, _photographs

DATA = patches()


def whole(x: torch.Tensor) -> torch.Tensor:
    """Patches [N, 64] with the last pixel put back: the deviations of a patch add up to zero."""
    return torch.cat([x, -x.sum(1, keepdim=True)], 1)


def test_sizes_are_those_of_squares_and_of_their_places() -> None:
    blocks = 2 * (427 // 16) * (640 // 16)
    assert DATA.test.shape == (520, 63) and DATA.train.shape == ((blocks - 520) * 81, 63)
    assert DATA.levels is None and len(patches(test_blocks=2).test) == 2
    with pytest.raises(ValueError, match="below its 2080 squares; got 2080"):
        patches(test_blocks=2080)


def test_patches_are_of_the_photographs_and_no_pixel_is_trained_on_and_tested() -> None:
    squares = _blocks(_photographs()).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(squares, (8, 8), axis=(1, 2))
    known = torch.from_numpy(windows.reshape(len(squares), 81, 64).copy()).float() / 256
    known -= known.mean(2, keepdim=True)
    # spreading moves a number within its bin, and the mean with it: by less than a bin together
    train, corners = whole(DATA.train[::81]), known[:, 0]
    near = torch.cdist(train, corners, p=math.inf) < 1 / 256
    assert bool(near.any(1).all()), "every 81st is the first corner of a square"
    trained = near[near.sum(1) == 1].nonzero()[:, 1]
    test = whole(DATA.test[:40])
    found = torch.cdist(test, known.flatten(0, 1), p=math.inf).unflatten(1, (-1, 81)) < 1 / 256
    found = found.any(2)
    assert bool(found.any(1).all())
    alone = found[found.sum(1) == 1].nonzero()[:, 1]  # elsewhere the sky is as flat
    assert len(trained) > 500 and len(alone) > 15
    assert not {*trained.tolist()} & {*alone.tolist()}


def test_the_split_and_the_noise_are_of_the_seed() -> None:
    assert torch.equal(DATA.test, patches().test) and torch.equal(DATA.train, patches().train)
    assert not torch.equal(DATA.test, patches(seed=1).test)
