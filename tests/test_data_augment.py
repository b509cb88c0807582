"""Random flips: an image or its mirror, as the batch's generator has it."""

import math
from pathlib import Path

import pytest
import torch

from experiment.augment import HorizontalFlip, augmentation
from experiment.data import Dataset
from experiment.run import Run
from sde_lib import PerSample

IMAGES = torch.arange(2000 * 12).reshape(2000, 2, 2, 3)


def flipped(x, made):
    """Which of the images ``made`` has mirrored; each must be itself or its mirror."""
    itself, mirror = ((made == y).flatten(1).all(1) for y in (x, x.flip(-1)))
    assert bool((itself ^ mirror).all())
    return mirror


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_so_many_images_are_mirrored_and_the_others_stay(seeded, probability):
    share = flipped(IMAGES, HorizontalFlip(probability)(IMAGES, seeded(0))).double().mean()
    bound = 5 * math.sqrt(probability * (1 - probability) / len(IMAGES))
    assert abs(float(share) - probability) < bound


@pytest.mark.parametrize("probability, all_of_them", [(0.0, False), (1.0, True)])
def test_none_or_all_of_them_are_mirrored_where_that_is_certain(seeded, probability, all_of_them):
    found = flipped(IMAGES, HorizontalFlip(probability)(IMAGES, seeded(0)))
    assert bool((found == all_of_them).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_dtype_and_shape_stay_and_the_batch_is_not_written_to(seeded, dtype):
    x = torch.rand(50, 1, 4, 5, generator=seeded(1)).mul(255).to(dtype)
    kept = x.clone()
    made = HorizontalFlip()(x, seeded(0))
    assert made.dtype == dtype and made.shape == x.shape and torch.equal(x, kept)


def test_flips_are_a_function_of_the_generator_and_of_a_sample_s_own_stream(seeded):
    flip = HorizontalFlip()
    assert torch.equal(flip(IMAGES, seeded(3)), flip(IMAGES, seeded(3)))
    assert not torch.equal(flip(IMAGES, seeded(3)), flip(IMAGES, seeded(4)))
    whole = flip(IMAGES[:20], PerSample(range(20)))
    alone = [flip(IMAGES[i : i + 1], PerSample([i])) for i in range(20)]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("shape", [(7,), (2, 8)])
def test_vectors_and_signals_are_refused(shape):
    with pytest.raises(ValueError, match="mirrors images .*are no images. Leave augment out"):
        HorizontalFlip().check(shape)
    with pytest.raises(ValueError, match="mirrors images"):
        HorizontalFlip()(torch.zeros(3, *shape))


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan, "half"])
def test_a_probability_is_between_0_and_1(probability):
    with pytest.raises(ValueError, match="HorizontalFlip needs probability"):
        HorizontalFlip(probability)


def test_a_run_has_the_augmentation_that_was_chosen_if_it_is_for_its_data(tmp_path):
    images = Dataset("mine", torch.rand(9, 1, 4, 4), torch.rand(9, 1, 4, 4))
    vectors = Dataset("mine", torch.rand(9, 4), torch.rand(9, 4))
    config = {"run": {"root": str(tmp_path), "name": "x"}}
    chosen = {"augment": {"_target_": "experiment.augment.HorizontalFlip", "probability": 0.5}}

    def build(node):
        return HorizontalFlip(node["probability"])

    assert augmentation(Run(config, build, conf=Path("conf")), images) is None
    run = Run(config | chosen, build, conf=Path("conf"))
    assert augmentation(run, images) == HorizontalFlip(0.5)
    with pytest.raises(ValueError, match="no images"):
        augmentation(run, vectors)
