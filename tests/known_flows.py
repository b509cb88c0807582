"""Flows whose density is known, for the tests of likelihoods."""

import math

import torch

from sde_lib import (
    EDMSDE,
    VESDE,
    VPSDE,
    SubVPSDE,
    probability_flow,
)
from sde_lib.oracles import Gaussian, GaussianMixture

PROCESSES = [VPSDE(), SubVPSDE(), VESDE(), EDMSDE()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(dims=24):
    """A mixture of 4 components with standard deviations from 0.05 to 1."""
    means = torch.randn(4, dims, generator=seeded(1))
    stds = torch.exp(torch.linspace(math.log(0.05), 0, dims)).expand(4, dims)
    return GaussianMixture(means, stds)


def correlated(dims=24):
    """A Gaussian far from diagonal: probes in its coordinates say little of the trace."""
    a = torch.randn(dims, dims, generator=seeded(2))
    return Gaussian(torch.zeros(dims), covariance=a @ a.T / dims + 0.01 * torch.eye(dims))


def exact_flow(sde, data):
    return probability_flow(
        sde, data.score(sde), log_prior=lambda x: data.log_prob(x, sde, sde.t_max)
    )


def noised(data, sde, count, seed=0):
    return data.sample(count, generator=seeded(seed), sde=sde, t=sde.t_min)
