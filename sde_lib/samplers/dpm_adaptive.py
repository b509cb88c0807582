"""DPM-Solver with steps fitted to each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sde_lib import validation
from sde_lib.samplers.exponential import PREDICTIONS, Prediction
from sde_lib.samplers.per_sample import Pair, PerSampleSampler, Through

PAIRS = {
    12: Pair(shares=(1 / 2,), low=Through((0,)), high=Through((1, 0), midpoint=True)),
    23: Pair(shares=(1 / 3, 2 / 3), low=Through((1, 0), midpoint=True), high=Through((2, 0))),
}


@dataclass(frozen=True)
class DPMSolverAdaptive(PerSampleSampler):
    """The probability flow by pairs of DPM-Solver steps, to a tolerance, each sample at its pace.

    Order 12 compares DDIM with DPM-Solver-2, order 23 DPM-Solver-2 with DPM-Solver-3, and goes on
    with the better one. A round costs two or three evaluations of the samples still under way,
    for those that try a step again one less. The published solver takes the step that the worst
    sample of a batch asks for; here each has its own, see :class:`PerSampleSampler`. For one
    sample of a variance-preserving process the two agree, but for the bounds on steps.

    Score functions are given times t of shape [B].

    Reference: Lu et al., DPM-Solver, 2022, appendix C.

    Args:
        order: 12 or 23.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step, on the state scaled to order one; 0.0078 is 2/256, a
            grey level of images in [-1, 1].
        first_step: The first step to try, in log(sigma/alpha).
        prediction: What is integrated: noise, as published, data or v.
        longest_step: No step is longer; >= first_step.
        denoise: Whether the end is E[x_0 | x] at t_min or x at t_min.
        compact: Whether samples that have arrived leave the batch; false where the score function
            holds something for each row, such as labels.
        max_evaluations: Evaluations of a batch after which to give up.
    """

    order: int = 23
    rtol: float = 0.05
    atol: float = 0.0078
    first_step: float = 0.05
    longest_step: float = 1.0
    prediction: str = "noise"
    denoise: bool = True
    compact: bool = True
    max_evaluations: int = 10_000
    stochastic: ClassVar[bool] = False
    eta: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in PAIRS:
            raise ValueError(
                "DPMSolverAdaptive has order=12 and order=23, which compare a step with one of "
                f"the next order; got order={self.order!r}."
            )
        validation.choice("DPMSolverAdaptive", "prediction", self.prediction, PREDICTIONS)

    @property
    def pair(self) -> Pair:
        """The two solutions of a step."""
        return PAIRS[self.order]

    @property
    def exponent(self) -> float:
        """One over the order of the error of a step: 2 or 3."""
        return 1 / (1 + len(self.pair.shares))

    @property
    def integrated(self) -> Prediction:
        """The prediction by name."""
        return PREDICTIONS[self.prediction]
