"""The data room: every source is a function that returns a `Dataset`."""

from experiment.data.array_files import arrays
from experiment.data.cifar import cifar10
from experiment.data.curves import swiss_roll, two_moons, two_spirals
from experiment.data.dataset import Dataset
from experiment.data.hub import huggingface
from experiment.data.idx_files import fashion_mnist, mnist
from experiment.data.image_files import image_folder
from experiment.data.photo_patches import patches
from experiment.data.planar import checkerboard, eight_gaussians, rings
from experiment.data.samples import Samples
from experiment.data.scikit_digits import digits

__all__ = [
    "Dataset",
    "Samples",
    "arrays",
    "checkerboard",
    "cifar10",
    "digits",
    "eight_gaussians",
    "fashion_mnist",
    "huggingface",
    "image_folder",
    "mnist",
    "patches",
    "rings",
    "swiss_roll",
    "two_moons",
    "two_spirals",
]
