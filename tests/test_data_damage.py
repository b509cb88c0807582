"""A flipped bit in a file that carries a checksum."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from data_files import TRAIN, batches, picture, random_bytes, save, write_archive, write_idx

from experiment.data import arrays, cifar, cifar10, image_folder, mnist
from experiment.errors import RunError

pytestmark = pytest.mark.usefixtures("no_data_by_chance")


def set_of_idx(folder):
    images = random_bytes(6, 5, 5)
    write_idx(folder, images, images[:3])
    return folder / f"{TRAIN}.gz", lambda: mnist(folder)


def set_of_npz(folder, save=np.savez):
    x = random_bytes(200, 40) // 32  # few values: there is something to compress
    save(folder / "mine.npz", train=x, test=x[:9])
    return folder / "mine.npz", lambda: arrays(folder / "mine.npz")


def set_of_png(folder):
    for i in range(4):
        path = save(picture((16, 16, 3), i), folder / f"{i}.png")
    return path, lambda: image_folder(folder, test_size=2)


def set_of_archive(folder):
    write_archive(folder, batches(random_bytes(10, 3, 32, 32), random_bytes(2, 3, 32, 32)))
    return folder / "cifar-10-python.tar.gz", lambda: cifar10(folder)


CHECKED = {  # forms that carry a checksum
    "idx.gz": set_of_idx,
    "npz": set_of_npz,
    "compressed npz": partial(set_of_npz, save=np.savez_compressed),
    "png": set_of_png,
    "tar.gz": set_of_archive,
}


@pytest.mark.parametrize("form", CHECKED)
def test_a_flipped_bit_is_found_and_the_file_named_or_it_changes_nothing(
    tmp_path, form, monkeypatch
):
    monkeypatch.setattr(cifar, "SIZES", (10, 2))
    path, load = CHECKED[form](tmp_path)
    content, whole = path.read_bytes(), load()
    draw = random.Random(0)
    found = 0
    for _ in range(40):
        bit = draw.randrange(8 * len(content))
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            data = load()
        except RunError as error:
            assert str(path) in str(error)
            found += 1
        else:
            assert torch.equal(data.train, whole.train) and torch.equal(data.test, whole.test)
    assert found > 20, "most bits matter"
