"""Exact log-likelihood, its bounds, their errors, and the units they are reported in."""

from likelihood.basis import Basis, Cosine, Pixel, Principal
from likelihood.bits import bits_per_dim
from likelihood.bounds import (
    BinDecoder,
    DensityDecoder,
    calibrate_variance,
    continuous_bound,
    discrete_bound,
    ordered,
    rate_distortion,
)
from likelihood.budget import plan, suited
from likelihood.dequantize import (
    Dequantization,
    TruncatedNormalDequantization,
    UniformDequantization,
)
from likelihood.divergence import Divergence, Exact, Hutchinson
from likelihood.importance import importance_weighted
from likelihood.ode import log_likelihood
from likelihood.pilot import Pilot
from likelihood.result import LogLikelihood
from likelihood.solvers import Adaptive, FixedGrid, Solver
from likelihood.standardize import Standardization
from likelihood.variational import (
    DequantizationFlow,
    VariationalDequantization,
    fit_dequantization,
    one_sample_bound,
)

__all__ = [
    "Adaptive",
    "Basis",
    "BinDecoder",
    "Cosine",
    "DensityDecoder",
    "Dequantization",
    "DequantizationFlow",
    "Divergence",
    "Exact",
    "FixedGrid",
    "Hutchinson",
    "LogLikelihood",
    "Pilot",
    "Pixel",
    "Principal",
    "Solver",
    "Standardization",
    "TruncatedNormalDequantization",
    "UniformDequantization",
    "VariationalDequantization",
    "bits_per_dim",
    "calibrate_variance",
    "continuous_bound",
    "discrete_bound",
    "fit_dequantization",
    "importance_weighted",
    "log_likelihood",
    "one_sample_bound",
    "ordered",
    "plan",
    "rate_distortion",
    "suited",
]
