"""Exact log-likelihood, its error, and the units it is reported in."""

from likelihood.bits import bits_per_dim
from likelihood.dequantize import UniformDequantization
from likelihood.divergence import Divergence, Exact, Hutchinson
from likelihood.ode import LogLikelihood, log_likelihood
from likelihood.standardize import Standardization

__all__ = [
    "Divergence",
    "Exact",
    "Hutchinson",
    "LogLikelihood",
    "Standardization",
    "UniformDequantization",
    "bits_per_dim",
    "log_likelihood",
]
