"""What turns a network into a score, and the losses that train it."""

from score_models.acceleration import Autocast, faster
from score_models.conditioning import Classes, Conditioning, Vector
from score_models.guidance import classifier_free, conditioned
from score_models.level_times import LossAwareLevels, UniformLevels
from score_models.model import ScoreModel
from score_models.objective import Objective
from score_models.objectives import (
    DenoisingScoreMatching,
    EDMWeight,
    ExplicitScoreMatching,
    FixedVariance,
    Hybrid,
    LearnedVariance,
    MinSNR,
    SlicedScoreMatching,
    VariationalBound,
    maximum_likelihood,
    noise_regression,
    score_matching_loss,
    truncated_snr,
    velocity,
)
from score_models.parameterization import EDM, Data, Noise, Parameterization, Score, Velocity
from score_models.times import (
    ImportanceTimes,
    LogNormalSigma,
    OneLevel,
    TimeSampler,
    UniformTimes,
)
from score_models.variance_head import VarianceHead

__all__ = [
    "EDM",
    "Autocast",
    "Classes",
    "Conditioning",
    "Data",
    "DenoisingScoreMatching",
    "EDMWeight",
    "ExplicitScoreMatching",
    "FixedVariance",
    "Hybrid",
    "ImportanceTimes",
    "LearnedVariance",
    "LogNormalSigma",
    "LossAwareLevels",
    "MinSNR",
    "Noise",
    "Objective",
    "OneLevel",
    "Parameterization",
    "Score",
    "ScoreModel",
    "SlicedScoreMatching",
    "TimeSampler",
    "UniformLevels",
    "UniformTimes",
    "VarianceHead",
    "Vector",
    "VariationalBound",
    "Velocity",
    "classifier_free",
    "conditioned",
    "faster",
    "maximum_likelihood",
    "noise_regression",
    "score_matching_loss",
    "truncated_snr",
    "velocity",
]
