"""Samplers: each one short step over two levels, or one adapter to a solver library."""

from sde_lib.samplers.adaptive import AdaptiveODE, FixedODE
from sde_lib.samplers.adaptive_sde import AdaptiveSDE
from sde_lib.samplers.base import (
    FixedStepSampler,
    LinearSampler,
    OneStepSampler,
    Plan,
    PlannedSampler,
    Sampler,
    SamplingError,
    check_samples,
)
from sde_lib.samplers.captured import Captured
from sde_lib.samplers.dpm_adaptive import DPMSolverAdaptive
from sde_lib.samplers.dpm_solver import DPMSolver
from sde_lib.samplers.flow_adams import FlowAdams, fitted_grid
from sde_lib.samplers.heun import Heun
from sde_lib.samplers.langevin import (
    AnnealedLangevin,
    Langevin,
    LangevinCorrector,
    NoPredictor,
    PredictorCorrector,
)
from sde_lib.samplers.multistep import DEIS, DPMSolverPP, UniPC
from sde_lib.samplers.predictors import DDIM, Ancestral, EulerMaruyama, ReverseDiffusion
from sde_lib.samplers.torchsde_adapter import TorchSDE

__all__ = [
    "DEIS",
    "DPMSolver",
    "DPMSolverPP",
    "UniPC",
    "FlowAdams",
    "fitted_grid",
    "OneStepSampler",
    "Plan",
    "LinearSampler",
    "check_samples",
    "DDIM",
    "AdaptiveODE",
    "AdaptiveSDE",
    "DPMSolverAdaptive",
    "FixedODE",
    "Ancestral",
    "Captured",
    "AnnealedLangevin",
    "EulerMaruyama",
    "FixedStepSampler",
    "Heun",
    "Langevin",
    "LangevinCorrector",
    "NoPredictor",
    "PlannedSampler",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "SamplingError",
    "TorchSDE",
]
