"""How many nodes and probes a wanted standard error takes, at the least cost."""

from __future__ import annotations

import torch
from torch import Tensor

from likelihood.divergence import Divergence, Exact, Hutchinson
from likelihood.pilot import Pilot
from likelihood.solvers import FixedGrid
from sde_lib import validation
from sde_lib.reverse import ProbabilityFlow

SMALL = 16  # dimensions up to which the exact trace costs less than its noise is worth
NODES = (32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)
PROBES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
FORWARD, BACKWARD = 1.2, 1.1  # of a node with a graph and of a probe, in bare forward passes


def suited(shape: tuple[int, ...]) -> Divergence:
    """The exact trace up to 16 dimensions, else two Rademacher probes."""
    return Exact() if torch.Size(shape).numel() <= SMALL else Hutchinson()


def plan(
    flow: ProbabilityFlow,
    like: Tensor,
    standard_error: float,
    *,
    divergence: Divergence | None = None,
) -> tuple[FixedGrid, Divergence]:
    """The cheapest nodes and probes that leave a sample the wanted standard error of its probes.

    A pilot of a few samples of the model says how noisy probes are along the path. Samples differ:
    each result carries its own standard error, and this is the root of their mean square.

    Args:
        flow: What will be evaluated.
        like: A batch [B, ...] of the shape, dtype and device of the samples; values do not matter.
        standard_error: Wanted, in nats, > 0.
        divergence: Its kind and basis; :func:`suited` to the shape if not given.

    Raises:
        ValueError: If 512 nodes of 32 probes do not reach it; says what they reach.
    """
    validation.real("plan", "standard_error", standard_error, above=0)
    divergence = divergence or suited(tuple(like.shape[1:]))
    pilot = Pilot.of(flow, like, divergence)
    if not divergence.random:
        return FixedGrid(), divergence
    tried = []
    for count in NODES:
        solver = FixedGrid(count)
        single = pilot.predicted_variance(pilot.nodes(count), solver.chosen_order + 1)
        tried += [(count * (FORWARD + BACKWARD * k), single / k, solver, k) for k in PROBES]
    enough = [choice for choice in tried if choice[1] <= standard_error**2]
    if not enough:
        best = min(choice[1] for choice in tried) ** 0.5
        raise ValueError(
            f"a standard error of {standard_error:.3g} nats is out of reach: {NODES[-1]} nodes of "
            f"{PROBES[-1]} probes leave {best:.3g} here; ask for more, or use the exact trace."
        )
    _, _, solver, num_probes = min(enough, key=lambda choice: choice[0])
    return solver, divergence.with_probes(num_probes)
