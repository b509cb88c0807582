"""Samplers: each one short step over two levels, or one adapter to a solver library."""

from sde_lib.samplers.adaptive import AdaptiveODE
from sde_lib.samplers.base import FixedStepSampler, Sampler, SamplingError
from sde_lib.samplers.heun import Heun
from sde_lib.samplers.langevin import AnnealedLangevin, LangevinCorrector, PredictorCorrector
from sde_lib.samplers.predictors import DDIM, Ancestral, EulerMaruyama, ReverseDiffusion
from sde_lib.samplers.torchsde_adapter import TorchSDE

__all__ = [
    "DDIM",
    "AdaptiveODE",
    "Ancestral",
    "AnnealedLangevin",
    "EulerMaruyama",
    "FixedStepSampler",
    "Heun",
    "LangevinCorrector",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "SamplingError",
    "TorchSDE",
]
