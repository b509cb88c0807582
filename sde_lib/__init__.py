"""Continuous-time diffusion processes and everything that moves a sample through time."""

from sde_lib.batch_rows import BatchRows
from sde_lib.brownian import BrownianPaths
from sde_lib.counting import Counted
from sde_lib.discrete import DiscreteSDE
from sde_lib.noise import PerSample
from sde_lib.processes import EDMSDE, VESDE, VPSDE, CosineSDE, MarginalSDE, SubVPSDE
from sde_lib.reverse import ProbabilityFlow, probability_flow, reverse
from sde_lib.sde import SDE, Level, expand_like

__all__ = [
    "SDE",
    "VESDE",
    "VPSDE",
    "BatchRows",
    "BrownianPaths",
    "CosineSDE",
    "Counted",
    "DiscreteSDE",
    "EDMSDE",
    "Level",
    "MarginalSDE",
    "PerSample",
    "ProbabilityFlow",
    "SubVPSDE",
    "expand_like",
    "probability_flow",
    "reverse",
]
