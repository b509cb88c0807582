"""Real 8x8 digits that come with scikit-learn: no download."""

from __future__ import annotations

import torch

from experiment.data.dataset import Dataset
from experiment.data.labels import conditions
from sde_lib import validation


def digits(test_size: int = 360, seed: int = 0, conditional: bool = False) -> Dataset:
    """1,797 handwritten digits, [N, 1, 8, 8] of 17 grey levels.

    Reference: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository,
        1998
    (its test part, as scikit-learn has it).

    Args:
        test_size: Images kept for the test; 360 with seed 0 is the split that published figures
            here use.
        seed: Of scikit-learn's shuffle.
        conditional: Whether the digit that is meant goes with each image, as its class.

    Raises:
        ValueError: If ``test_size`` leaves nothing to train on.
        ImportError: Without scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = found.data  # float64, whole numbers 0..16
    if validation.count("digits", "test_size", test_size) >= len(images):
        raise ValueError(
            f"digits needs test_size below its {len(images)} images; got test_size={test_size}."
        )
    *parts, train_labels, test_labels = train_test_split(
        images, found.target, test_size=int(test_size), random_state=seed
    )
    train, test = (torch.from_numpy(part).to(torch.uint8).reshape(-1, 1, 8, 8) for part in parts)
    wanted = validation.flag("digits", "conditional", conditional)
    conds = conditions("digits", train_labels, test_labels, 10) if wanted else {}
    return Dataset("digits", train, test, levels=17, **conds)
