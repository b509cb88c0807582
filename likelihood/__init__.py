"""Exact log-likelihood, its bounds, their errors, and the units they are reported in."""

from likelihood.basis import Basis, Cosine, Pixel, Principal
from likelihood.bits import bits_per_dim
from likelihood.bounds import (
    calibrate_variance,
    continuous_bound,
    discrete_bound,
    discrete_bounds,
)
from likelihood.budget import plan
from likelihood.checks import check_likelihood
from likelihood.comparison import ordered, rate_distortion
from likelihood.decoders import BinDecoder, DensityDecoder
from likelihood.dequantize import (
    Dequantization,
    TruncatedNormalDequantization,
    UniformDequantization,
)
from likelihood.divergence import Divergence, Exact, Hutchinson, suited
from likelihood.importance import importance_weighted
from likelihood.latents import RoundTrip, decode, encode, interpolate, round_trip
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
    "RoundTrip",
    "Solver",
    "Standardization",
    "TruncatedNormalDequantization",
    "UniformDequantization",
    "VariationalDequantization",
    "bits_per_dim",
    "calibrate_variance",
    "check_likelihood",
    "continuous_bound",
    "decode",
    "discrete_bound",
    "discrete_bounds",
    "encode",
    "fit_dequantization",
    "importance_weighted",
    "interpolate",
    "log_likelihood",
    "one_sample_bound",
    "ordered",
    "plan",
    "rate_distortion",
    "round_trip",
    "suited",
]
