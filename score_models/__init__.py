"""What turns a network into a score, and the loss that trains it."""

from score_models.acceleration import Autocast, faster
from score_models.conditioning import Classes, Conditioning, Vector
from score_models.guidance import classifier_free, conditioned
from score_models.model import ScoreModel
from score_models.objective import (
    EDMWeight,
    Objective,
    maximum_likelihood,
    noise_regression,
    score_matching_loss,
    velocity,
)
from score_models.parameterization import EDM, Data, Noise, Parameterization, Score, Velocity
from score_models.times import ImportanceTimes, LogNormalSigma, TimeSampler, UniformTimes
from score_models.variance_head import VarianceHead

__all__ = [
    "EDM",
    "Autocast",
    "Classes",
    "Conditioning",
    "Data",
    "EDMWeight",
    "ImportanceTimes",
    "LogNormalSigma",
    "Noise",
    "Objective",
    "Parameterization",
    "Score",
    "ScoreModel",
    "TimeSampler",
    "UniformTimes",
    "VarianceHead",
    "Vector",
    "Velocity",
    "classifier_free",
    "conditioned",
    "faster",
    "maximum_likelihood",
    "noise_regression",
    "score_matching_loss",
    "velocity",
]
