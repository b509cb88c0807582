"""How many nodes and probes a wanted standard error takes, at the least cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from likelihood.divergence import Divergence, Exact, suited
from likelihood.latents import decode
from likelihood.ode import log_likelihood
from likelihood.result import LogLikelihood
from likelihood.solvers import FixedGrid
from sde_lib import validation
from sde_lib.memory import in_halves
from sde_lib.noise import PerSample
from sde_lib.reverse import ProbabilityFlow

NODES = (32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)
PROBES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
FORWARD, BACKWARD = 1.2, 1.1  # of a node with a graph and of a probe, in bare forward passes
SAMPLES, SEED = 32, 10**6  # of the trial
MOST = 0.9  # part of them that the solver error must be small for


def plan(
    flow: ProbabilityFlow,
    like: Tensor,
    standard_error: float,
    *,
    divergence: Divergence | None = None,
) -> tuple[FixedGrid, Divergence]:
    r"""The cheapest nodes and probes for a wanted error of a sample.

    Tried on 32 samples of the model itself. Nodes are added until nine in ten of them have a
    solver error below half of what is wanted: with the same probes kept along the path it is
    measured apart from their noise. Then probes and nodes are added to where the root mean square
    of the standard errors falls below the rest, :math:`\sqrt{3/4}` of what is wanted: the
    variance is that of the trial times its nodes and probes, over those that are planned. Where
    so many probes would cost more than the exact trace, it is the exact trace.

    Samples differ, and a few have several times the error: each result carries its own. The trial
    costs about as much as the likelihood of one to two hundred samples.

    Args:
        flow: What will be evaluated.
        like: A batch [B, ...], B >= 1, of the shape, dtype and device of the samples; values do
            not matter.
        standard_error: Wanted of a sample, probes and solver together, in nats, > 0.
        divergence: Its kind and basis; :func:`likelihood.suited` to the shape if not given.

    Raises:
        ValueError: If 512 nodes of 32 probes do not reach it; says what they reach.
        SamplingError: If the score is not finite on samples of the model.
    """
    validation.real("plan", "standard_error", standard_error, above=0)
    divergence = divergence or suited(tuple(like.shape[1:]))
    flow = flow.for_others(SAMPLES)
    x = _own_samples(flow, like)
    start = _enough_nodes(flow, x, divergence.with_probes(1), standard_error / 2)
    if not divergence.random:
        return FixedGrid(NODES[start]), divergence
    trial = FixedGrid(NODES[start], halve=False)

    def single(num_probes: int) -> float:
        """Mean variance that one probe in all would have."""
        some = divergence.with_probes(num_probes)
        error = _tried(flow, x, trial, some, lambda found: found.standard_error)
        return float(error.square().mean()) * num_probes * trial.nodes

    even, allotted = single(2), single(4)  # two to every node; four on average
    wanted = 0.75 * standard_error**2
    each = BACKWARD * divergence.with_probes(1).passes(x)
    tried = [(n * (FORWARD + each * k), n, k) for n in NODES[start:] for k in PROBES]
    enough = [
        (cost, n, k) for cost, n, k in tried if (even if k == 2 else allotted) / (n * k) <= wanted
    ]
    exact = trial.nodes * (FORWARD + BACKWARD * x[0].numel())
    if exact <= min(cost for cost, _, _ in enough or tried[-1:]):
        return FixedGrid(trial.nodes), Exact()
    if not enough:
        raise ValueError(_out_of_reach(standard_error, (allotted / NODES[-1] / PROBES[-1]) ** 0.5))
    _, nodes, num_probes = min(enough)
    return FixedGrid(nodes), divergence.with_probes(num_probes)


def _enough_nodes(flow: ProbabilityFlow, x: Tensor, divergence: Divergence, wanted: float) -> int:
    """Index in ``NODES`` of the first whose solver error is small enough for ``x``."""
    error = 0.0
    for i, nodes in enumerate(NODES):
        kept = FixedGrid(nodes, fresh=False)
        found = _tried(flow, x, kept, divergence, lambda found: found.solver_error)
        error = float(found.quantile(MOST))
        if error <= wanted:
            return i
    raise ValueError(_out_of_reach(2 * wanted, 2 * error))


def _own_samples(flow: ProbabilityFlow, like: Tensor) -> Tensor:
    """Samples of the model itself, [SAMPLES, ...]; in halves where memory runs out."""

    def drawn(rows: range) -> Tensor:
        shape = (len(rows), *like.shape[1:])
        prior = flow.sde.prior_sample(shape, generator=_streams(1, rows), dtype=torch.float64)
        return decode(flow.for_rows(rows), prior.to(like))

    return torch.cat(in_halves(drawn, range(SAMPLES)))


def _tried(
    flow: ProbabilityFlow,
    x: Tensor,
    solver: FixedGrid,
    divergence: Divergence,
    pick: Callable[[LogLikelihood], Tensor],
) -> Tensor:
    """What is picked of the likelihood of each sample, [SAMPLES] float64; in halves as above."""

    def solved(rows: range) -> Tensor:
        some, own = x[rows.start : rows.stop], flow.for_rows(rows)
        streams = _streams(2, rows)
        found = log_likelihood(own, some, solver=solver, divergence=divergence, generator=streams)
        return pick(found).double()

    return torch.cat(in_halves(solved, range(SAMPLES)))


def _streams(purpose: int, rows: range) -> PerSample:
    return PerSample([SEED * purpose + row for row in rows])


def _out_of_reach(wanted: float, best: float) -> str:
    return (
        f"a standard error of {wanted:.3g} nats is out of reach: {NODES[-1]} nodes of "
        f"{PROBES[-1]} probes leave {best:.3g} here; ask for more, or use the exact trace."
    )
