"""Randomness as a function of (seed, purpose, index): nothing to store, nothing to restore."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from sde_lib import BrownianPaths, PerSample


def stream(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator that is a function of (seed, purpose, index)."""
    return torch.Generator().manual_seed(hashed(seed, purpose, index))


def sample_streams(
    seed: int, purpose: str, indices: Iterable[int], device: torch.device | str = "cpu"
) -> PerSample:
    """One stream a sample: sample i depends on (seed, purpose, i), whatever batch it sits in."""
    return PerSample([hashed(seed, purpose, i) for i in indices], device)


def sample_paths(
    seed: int,
    purpose: str,
    indices: Iterable[int],
    device: torch.device | str = "cpu",
    *,
    temperature: float = 1.0,
) -> BrownianPaths:
    """The same streams for samplers: whatever its steps, sample i follows one Brownian path."""
    seeds = [hashed(seed, purpose, i) for i in indices]
    return BrownianPaths(seeds, device, temperature=temperature)


def hashed(seed: int, purpose: str, index: int) -> int:
    """63 bits; a seed of any size gives streams of its own."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
