"""The reverse SDE with steps fitted to each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sde_lib import validation
from sde_lib.noise import Generator
from sde_lib.samplers.exponential import PREDICTIONS, Prediction
from sde_lib.samplers.per_sample import Pair, PerSampleSampler, Through
from sde_lib.samplers.step_noise import KeptNoise, StepNoise

EULER_AND_HEUN = Pair(shares=(1.0,), low=Through((0,)), high=Through((1, 0)))


@dataclass(frozen=True)
class AdaptiveSDE(PerSampleSampler):
    r"""The reverse SDE to a tolerance, each sample at its pace.

    A step by Euler-Maruyama is compared with one by the stochastic improved Euler method on the
    same noise, which is kept. What they approximate is v alone, frozen or along a line from one
    end of the step to the other; what is linear, and the noise, they solve exactly, see
    :class:`sde_lib.samplers.exponential.VPrediction`. The published pair works on x and the
    score. A round costs two evaluations, one for samples that try a step again.

    The noise of a step that is refused is not drawn anew, which would prefer easy noise, but
    split, see :class:`sde_lib.samplers.step_noise.KeptNoise`: where a step is refused, the next
    ones end where it would have ended. The published solver draws anew.

    Score functions are given times t of shape [B].

    Reference: Jolicoeur-Martineau et al., Gotta Go Fast When Generating Data with Score-Based
    Models, 2021, algorithm 1.

    Args:
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step, on the state scaled to order one; 0.0078 is 2/256, a
            grey level of images in [-1, 1].
        eta: Amount of fresh noise, > 0; for 0 use DPMSolverAdaptive.
        first_step: The first step to try, in log(sigma/alpha).
        longest_step: No step is longer; >= first_step.
        denoise: Whether the end is E[x_0 | x] at t_min or x at t_min.
        compact: Whether samples that have arrived leave the batch; false where the score function
            holds something for each row, such as labels.
        max_evaluations: Evaluations of a batch after which to give up.
    """

    rtol: float = 0.02
    atol: float = 0.0078
    eta: float = 1.0
    first_step: float = 0.1
    longest_step: float = 1.0
    denoise: bool = True
    compact: bool = True
    max_evaluations: int = 10_000
    stochastic: ClassVar[bool] = True
    exponent: ClassVar[float] = 0.9  # as published, between that of a strong order of 1/2 and 1
    # noise may cancel the error of one step; unbounded, the next would be far too long, and in one
    # dimension the variance was 5 % too large at every tolerance
    growth: ClassVar[float] = 2.0
    pair: ClassVar[Pair] = EULER_AND_HEUN
    integrated: ClassVar[Prediction] = PREDICTIONS["v"]

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.real("AdaptiveSDE", "eta", self.eta, above=0)

    def noise(self, x: Tensor, generator: Generator) -> StepNoise:
        """Noise that survives a refused step."""
        return KeptNoise(x, self.eta, generator)
