"""What training minimises, one idea a file."""

from score_models.objectives.bound import VariationalBound
from score_models.objectives.by_parts import ExplicitScoreMatching, SlicedScoreMatching
from score_models.objectives.denoising import DenoisingScoreMatching, score_matching_loss
from score_models.objectives.hybrid import Hybrid
from score_models.objectives.step_variance import FixedVariance, LearnedVariance
from score_models.objectives.weights import (
    EDMWeight,
    MinSNR,
    maximum_likelihood,
    noise_regression,
    truncated_snr,
    velocity,
)

__all__ = [
    "DenoisingScoreMatching",
    "EDMWeight",
    "ExplicitScoreMatching",
    "FixedVariance",
    "Hybrid",
    "LearnedVariance",
    "MinSNR",
    "SlicedScoreMatching",
    "VariationalBound",
    "maximum_likelihood",
    "noise_regression",
    "score_matching_loss",
    "truncated_snr",
    "velocity",
]
