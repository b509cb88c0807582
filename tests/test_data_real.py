"""The real downloads, where there are any."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from experiment.data import cifar10, fashion_mnist, mnist
from experiment.errors import RunError

ROOT = Path(__file__).resolve().parents[1]


NAMED = os.environ.get("SCORE_SDE_DATA")
PLACES = [Path(NAMED).expanduser().absolute()] if NAMED else []


def real(source):
    """The real set, from where the variable says, or else beside or below the project."""
    reasons = []
    for place in PLACES or [ROOT.parent / "shared" / "data", ROOT / "data"]:
        try:
            return source(place)
        except RunError as error:
            if "not found: " not in str(error):
                raise
            reasons.append(str(error))
    pytest.skip(reasons[0])


# Mean and std of the training pixels in [0, 1], a channel, as they are published; then the
# sha256 of the bytes [N, C, H, W] of both parts, of files whose md5 is the published one.
REAL = {
    mnist: (
        [0.1307],
        [0.3081],
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    ),
    fashion_mnist: (
        [0.2860],
        [0.3530],
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    ),
    cifar10: (
        [0.4914, 0.4822, 0.4465],
        [0.2470, 0.2435, 0.2616],
        "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
        "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
    ),
}


@pytest.mark.parametrize("source", REAL, ids=lambda source: source.__name__)
def test_the_real_files_give_the_published_images_and_their_mean_and_std(source):
    data = real(source)
    mean, std, *digests = REAL[source]
    shape, train = ((3, 32, 32), 50_000) if source is cifar10 else ((1, 28, 28), 60_000)
    assert data.train.shape == (train, *shape) and data.test.shape == (10_000, *shape)
    assert data.levels == 256 and data.train.dtype == data.test.dtype == torch.uint8
    for part, digest in zip((data.train, data.test), digests, strict=True):
        assert hashlib.sha256(part.numpy()).hexdigest() == digest
    for channel in range(shape[0]):
        pixels = data.train[:, channel].float() / 255
        assert float(pixels.mean()) == pytest.approx(mean[channel], abs=5e-5)  # four digits given
        assert float(pixels.std()) == pytest.approx(std[channel], abs=5e-5)
