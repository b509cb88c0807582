"""Bits per dimension of K-level data from a density in nats; derived in docs/bits-per-dim.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sde_lib import validation


def bits_per_dim(
    log_prob: Tensor,
    num_dims: int,
    levels: int | None = 256,
    *,
    bin_width: float | Tensor | None = None,
) -> Tensor:
    r"""Bits per dimension of the *discrete* data behind a dequantized density.

    With :math:`x = a + w (v + u)`, levels v in 0..K-1, u uniform in [0, 1) and bins of width w in
    the units of x, the density of v + u is :math:`w^D p(x)`, so that

    .. math::  \mathrm{bits/dim} = -\frac{\log p(x) + \sum_d \log w_d}{D \ln 2}

    is an upper bound on :math:`-\log_2 P(v) / D`. The shift a does not matter.

    Args:
        log_prob: Log-density at the dequantized data, nats, [...].
        num_dims: D.
        levels: K, at least 2; ``None`` says that the data are continuous, which is refused.
        bin_width: w, a number or a tensor that broadcasts to D numbers; 2 / K, data in [-1, 1], if
            not given.

    Returns:
        Bits per dimension, in the shape of ``log_prob``.

    Raises:
        ValueError: For continuous data, whose bits/dim depend on the unit of measurement, and for
            levels < 2 or bins of no width.
    """
    if levels is None:
        raise ValueError(
            "bits/dim needs K-level data: a density of continuous data changes with "
            "the unit it is measured in; "
            "got levels=None. Report nats (log_prob), or say how many levels the data have."
        )
    num_dims = validation.count("bits/dim", "num_dims", num_dims)
    if levels != int(levels) or levels < 2:
        raise ValueError(f"bits/dim needs a whole number of levels >= 2; got levels={levels!r}.")
    width = torch.as_tensor(2 / levels if bin_width is None else bin_width, dtype=torch.float64)
    if not bool((width > 0).all()) or num_dims % width.numel() != 0:
        raise ValueError(
            f"bits/dim needs one bin width > 0, or one for each of the {num_dims} dimensions; "
            f"got {width.numel()} widths, the smallest {float(width.min()):g}."
        )
    log_volume = float(width.log().mean()) * num_dims
    return -(log_prob + log_volume) / (num_dims * math.log(2))
