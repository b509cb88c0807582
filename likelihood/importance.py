"""Several dequantizations of one sample, averaged where it counts: inside the logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImportanceWeighted:
    """A bound on log P(v) from K draws, and how far it can be trusted.

    Attributes:
        log_prob: Log of the mean weight, nats, [B].
        effective_sample_size: From 1 (one draw has all the weight) to K (all alike), [B].
        standard_error: Of ``log_prob``, nats, [B]; NaN for a single draw. Half of its square is
            about how far the bound still lies below log P(v).
    """

    log_prob: Tensor
    effective_sample_size: Tensor
    standard_error: Tensor


def importance_weighted(log_weights: Tensor) -> ImportanceWeighted:
    r"""The bound of K draws :math:`x_k \sim q(x | v)`, which rises to log P(v) with K.

    .. math::  \log \hat P = \log \frac1K \sum_k w_k, \qquad w_k = \frac{p(x_k)}{q(x_k | v)},
               \qquad \mathrm{ESS} = \frac{(\sum_k w_k)^2}{\sum_k w_k^2}

    The standard error is that of the mean weight over the mean weight (delta method),
    :math:`\sqrt{(K / \mathrm{ESS} - 1) / (K - 1)}`; below an ESS of about ten it says little.

    Each log w_k must be exact: an error of log p(x_k) that is drawn anew for each k raises the
    result, see :func:`noise_bias`. Take the exact trace, or the same probes for all K.

    Reference: Burda et al., Importance Weighted Autoencoders, 2016, theorem 1.

    Args:
        log_weights: log p(x_k) - log q(x_k | v), nats, [K, B]; what ``Dequantized.bound`` gives.

    Raises:
        ValueError: If they are not finite floating-point numbers [K, B].
    """
    _check("importance_weighted", "log_weights", log_weights)
    log_weights = log_weights.double()
    draws, log_sum = len(log_weights), log_weights.logsumexp(0)
    size = (1 / log_weights.softmax(0).square().sum(0)).clamp(1, draws)
    spread = (draws / size - 1) / (draws - 1) if draws > 1 else torch.full_like(size, math.nan)
    return ImportanceWeighted(log_sum - math.log(draws), size, spread.sqrt())


def noise_bias(log_prob_error: Tensor, log_weights: Tensor | None = None) -> Tensor:
    r"""By how much independent noise in each log p raises :func:`importance_weighted`, nats, [B].

    Let log w_k carry noise n_k of mean zero and variance s_k², independent of the others, and let
    :math:`r_k = w_k / \sum_j w_j`. To second order in the noise,

    .. math::  \log \sum_k w_k e^{n_k} = \log \sum_k w_k + \sum_k r_k n_k
               + \tfrac12 \Big[ \sum_k r_k n_k^2 - \big(\sum_k r_k n_k\big)^2 \Big]

    whose mean exceeds the first term by :math:`\tfrac12 \sum_k r_k (1 - r_k)\, s_k^2`: with equal
    weights :math:`\tfrac12 (1 - 1/K)\, s^2`, with one draw nothing. Such a value is no bound any
    more. Subtract the bias where it is small against one nat, and refuse the value where not: for
    normal noise it never exceeds :math:`s^2 / 2`, but the expansion ends.

    There is none with the exact trace. With the same probes for all K the noise is shared, as far
    as it does not depend on x_k: it shifts log w_k all alike, and what is shared has mean zero.

    Args:
        log_prob_error: s_k, standard deviation of the noise of log p(x_k), nats, [K, B].
        log_weights: As of :func:`importance_weighted`, [K, B]; taken as equal if not given.

    Raises:
        ValueError: If an error is negative or not finite (a single probe does not know its own
            error), or the shapes differ.
    """
    _check("noise_bias", "log_prob_error", log_prob_error)
    if bool((log_prob_error < 0).any()):
        raise ValueError(
            "noise_bias needs standard deviations >= 0 as log_prob_error; got "
            f"{log_prob_error.min().item():g}. Pass standard_error of the likelihood."
        )
    log_weights = torch.zeros_like(log_prob_error) if log_weights is None else log_weights
    _check("noise_bias", "log_weights", log_weights)
    if log_weights.shape != log_prob_error.shape:
        raise ValueError(
            "noise_bias needs one error for each weight; got log_prob_error of shape "
            f"{tuple(log_prob_error.shape)}, log_weights of shape {tuple(log_weights.shape)}."
        )
    share = log_weights.double().softmax(0)
    return 0.5 * (share * (1 - share) * log_prob_error.double().square()).sum(0)


def _check(owner: str, name: str, numbers: Tensor) -> None:
    wanted = numbers.is_floating_point() and numbers.ndim == 2 and numbers.numel() > 0
    if not wanted or not bool(torch.isfinite(numbers).all()):
        raise ValueError(
            f"{owner} needs {name} [K, B], finite floating-point nats of K draws of each sample; "
            f"got {str(numbers.dtype).removeprefix('torch.')} of shape {tuple(numbers.shape)}"
            f"{', with NaN or infinity' if wanted else ''}."
        )
