"""Points of the plane whose density has a closed form: eight Gaussians, a checkerboard, rings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from experiment.data.dataset import Dataset
from sde_lib import validation

Draw = Callable[[int, torch.Generator], Tensor]


def planar(
    name: str,
    draw: Draw,
    log_density: Callable[[Tensor], Tensor],
    entropy: float,
    train_size: int,
    test_size: int,
    seed: int,
) -> Dataset:
    """Draw a data set of the plane, the test set first: it does not depend on ``train_size``.

    Two draws, not one that is parted: the numbers in the front of a longer draw are others.

    Args:
        name: Of the set.
        draw: (n, generator) -> n independent samples [n, 2].
        log_density: [B, 2] -> [B], nats.
        entropy: Of the source, nats.
        train_size: Number of training samples.
        test_size: Number of test samples.
        seed: Of the generator.
    """
    test_size = validation.count(name, "test_size", test_size)
    train_size = validation.count(name, "train_size", train_size)
    generator = torch.Generator().manual_seed(seed)
    test, train = (draw(n, generator).float() for n in (test_size, train_size))
    return Dataset(name, train, test, entropy=entropy, log_density=log_density)


def uniform(n: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), float64 [n]."""
    return torch.rand(n, generator=generator, dtype=torch.float64)


def eight_gaussians(train_size: int = 100_000, test_size: int = 10_000, seed: int = 0) -> Dataset:
    """Eight Gaussians of std 0.5/1.414 on a ring of radius 4/1.414.

    Reference: Grathwohl et al., FFJORD, 2019 (toy data).

    Args:
        train_size: Number of training samples.
        test_size: Number of test samples.
        seed: Of the generator.
    """
    std = 0.5 / 1.414  # 1.414, not the root of 2: so the reference has it
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    centres = 4 / 1.414 * torch.stack([angle.cos(), angle.sin()], 1)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(8, (n,), generator=generator)
        return centres[which] + std * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def log_density(x: Tensor) -> Tensor:
        distance = torch.cdist(
            x.double(), centres.to(x.device), compute_mode="donot_use_mm_for_euclid_dist"
        )
        kernel = -0.5 * (distance / std).square() - math.log(2 * math.pi * std**2)
        return (kernel.logsumexp(1) - math.log(8)).to(x.dtype)

    return planar("eight_gaussians", draw, log_density, 2.83188, train_size, test_size, seed)


def checkerboard(train_size: int = 100_000, test_size: int = 10_000, seed: int = 0) -> Dataset:
    """Uniform on the eight black squares, of side 2, of a checkerboard on [-4, 4]².

    Reference: Grathwohl et al., FFJORD, 2019 (toy data).

    Args:
        train_size: Number of training samples.
        test_size: Number of test samples.
        seed: Of the generator.
    """
    entropy = math.log(32)  # the area of the black squares

    def draw(n: int, generator: torch.Generator) -> Tensor:
        column = torch.randint(4, (n,), generator=generator)
        row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
        # Midpoints of 2^20 steps are exact in float32; a uniform number could round onto an edge.
        inside = (torch.randint(2**20, (n, 2), generator=generator).double() + 0.5) / 2**20
        return 2 * (torch.stack([column, row], 1) + inside) - 4

    def log_density(x: Tensor) -> Tensor:
        black = (torch.floor(x / 2).sum(1) % 2 == 0) & (x.abs() < 4).all(1)
        return x.new_full((len(x),), -math.inf).masked_fill(black, -entropy)

    return planar("checkerboard", draw, log_density, entropy, train_size, test_size, seed)


def rings(train_size: int = 100_000, test_size: int = 10_000, seed: int = 0) -> Dataset:
    r"""Four rings of radius 3, 2.25, 1.5, 0.75 and equal weight, with Gaussian noise of std 0.08.

    A ring of radius R blurred by s has the density
    :math:`e^{-(r^2 + R^2) / 2 s^2}\, I_0(r R / s^2) / (2 \pi s^2)` at distance r.

    Reference: Grathwohl et al., FFJORD, 2019 (toy data).

    Args:
        train_size: Number of training samples.
        test_size: Number of test samples.
        seed: Of the generator.
    """
    std = 0.08
    radii = torch.tensor([3.0, 2.25, 1.5, 0.75], dtype=torch.float64)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        radius = radii[torch.randint(4, (n,), generator=generator)]
        angle = 2 * math.pi * uniform(n, generator)
        circle = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        return circle + std * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def log_density(x: Tensor) -> Tensor:
        r, ring = x.double().norm(dim=1, keepdim=True), radii.to(x.device)  # [B, 1], [4]
        bessel = torch.special.i0e(
            r * ring / std**2
        ).log()  # i0e = e^-z I_0(z): I_0 itself overflows
        kernel = bessel - 0.5 * ((r - ring) / std).square() - math.log(2 * math.pi * std**2)
        return (kernel.logsumexp(1) - math.log(4)).to(x.dtype)

    return planar("rings", draw, log_density, 2.6231, train_size, test_size, seed)
