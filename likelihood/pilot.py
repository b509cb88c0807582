"""A cheap look at a flow, once, that says where the nodes of a likelihood belong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from likelihood.basis import Basis
from likelihood.divergence import LEAST, Divergence, Probes
from sde_lib.adams import Adams
from sde_lib.grids import interpolated
from sde_lib.memory import in_halves
from sde_lib.noise import PerSample
from sde_lib.reverse import ProbabilityFlow

SAMPLES, NODES, SEED = 16, 33, 0
RESOLVED = 0.5  # dimensions that must have opened at the fine end,
OPEN = 0.2  # and be open still at the other: two modes alone keep half of one open, on average
THINNING = 0.3  # nodes get sparse like exp(-0.3 |u - edge|) outside the range of the data
FLOOR = 0.02


@dataclass(frozen=True)
class Pilot:
    r"""What a likelihood needs to know of a flow: its trace and the noise of it, by noise level.

    The trace :math:`T(u) = \mathrm{tr}\,\partial(\varrho\hat\varepsilon)/\partial y` rises from
    0, where the noise is finer than anything in the data, to D, where it hides them all; what lies
    between is the data's range of scales, and there the nodes belong.

    Args:
        clock: u = log(sigma/alpha), increasing, [M].
        trace: Mean of T over pilot samples, [M].
        variance: Mean variance of a single probe's estimate of T, [M].
        dims: D.
        divergence: The estimator, in the basis in which its variance was least.
        nfe: Forward passes that it took, of one sample each.
    """

    clock: Tensor
    trace: Tensor
    variance: Tensor
    dims: int
    divergence: Divergence
    nfe: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, flow: ProbabilityFlow, like: Tensor, divergence: Divergence, *, samples: int = SAMPLES
    ) -> Pilot:
        """Draw a few samples of the model, roughly, and watch the trace along their paths.
        Where the score function has conditions, they are its ``others``.

        Depends on the flow and on shape, dtype and device of ``like`` alone: not on its values,
        so that no sample sees the others. Remembered by the flow, and the same for any number of
        probes; in halves where memory runs out.
        """
        shape = tuple(like.shape[1:])
        two = divergence.with_probes(2)  # for the spread
        key = ("pilot", flow.t_start, shape, like.dtype, str(like.device), two, samples)
        if key not in flow.memory:
            flow.memory[key] = cls._of(flow, like, two, samples)
        found, basis = flow.memory[key]
        return replace(found, divergence=divergence.in_basis(basis))

    @classmethod
    def _of(
        cls, flow: ProbabilityFlow, like: Tensor, divergence: Divergence, samples: int
    ) -> tuple[Pilot, Basis]:
        shape = tuple(like.shape[1:])
        start, end = flow.clock_range()
        clock = torch.linspace(end, start, NODES, dtype=torch.float64)
        bases = divergence.bases(shape)
        others = flow.for_others(samples)
        parts = in_halves(
            lambda rows: _watched(others.for_rows(rows), like, divergence, clock, rows),
            range(samples),
        )
        traces = torch.cat(parts, dim=-1).flip(1).cpu()  # [bases, M, k, samples]
        single = traces.shape[2] == 1  # an exact trace
        variance = torch.zeros(traces.shape[:2]) if single else traces.var(2).nanmean(2)
        best = int(variance.sqrt().sum(1).argmin())
        found = cls(
            clock=clock.flip(0),
            trace=traces.nanmean((2, 3))[best],  # one bad sample spoils no grid
            variance=variance[best].double(),
            dims=torch.Size(shape).numel(),
            divergence=divergence,
            nfe=NODES * samples,
        )
        return found, bases[best]

    def nodes(self, count: int) -> Tensor:
        """Where to evaluate, [count] increasing, float64: both ends and as dense as needed."""
        fine = torch.linspace(float(self.clock[0]), float(self.clock[-1]), 2001).double()
        density = self.density(fine)
        mass = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, fine)])
        nodes = interpolated(torch.linspace(0, 1, count).double() * mass[-1], mass, fine)
        nodes[0], nodes[-1] = self.clock[0], self.clock[-1]
        return nodes

    def probes_at(self, nodes: Tensor, weights: Tensor, mean: int) -> list[int]:
        r"""How many probes belong to each of ``nodes`` [N], ``mean`` on average.

        The variance :math:`\sum_i w_i^2 v_i / k_i` is least for k in proportion to
        :math:`|w_i| \sqrt{v_i}` (Neyman 1934); none gets fewer than two.
        """
        spread = self.variance.clamp(min=0).sqrt()
        padded = torch.cat([spread[:1], spread, spread[-1:]])
        smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3  # of 16 samples' noise
        size = weights.abs() * interpolated(nodes, self.clock, smooth)
        total = len(nodes) * mean
        if not bool(size.sum() > 0):
            return [mean] * len(nodes)
        low, high = torch.zeros(()).double(), total / size[size > 0].min()
        for _ in range(200):  # k = max(2, c size) adds up to the total for one c
            middle = (low * high).sqrt() if low > 0 else 0.5 * high
            enough = bool((middle * size).clamp(min=LEAST).sum() >= total)
            low, high = (low, middle) if enough else (middle, high)
        wanted = (low * size).clamp(min=LEAST)
        counts = wanted.floor()
        missing = total - int(counts.sum())
        counts[(wanted - counts).argsort(descending=True)[:missing]] += 1
        return [int(count) for count in counts]

    def scales(self) -> tuple[float, float]:
        """The range of log rho in which the data have structure: T from 0.5 to D - 0.2."""
        edges = (
            _crossing(self.clock, self.trace, RESOLVED),
            -_crossing(-self.clock.flip(0), (self.dims - self.trace).flip(0), OPEN),
        )
        return min(edges), max(edges)

    def density(self, clock: Tensor) -> Tensor:
        """Nodes per unit of the clock at ``clock`` [N], up to a factor."""
        low, high = self.scales()
        outside = (low - clock).clamp(min=0) + (clock - high).clamp(min=0)
        return torch.exp(-THINNING * outside) + FLOOR


def _watched(
    flow: ProbabilityFlow, like: Tensor, divergence: Divergence, clock: Tensor, rows: range
) -> Tensor:
    """Estimates of the trace in every basis along the falling ``clock`` [M], for pilot samples
    ``rows``, [bases, M, k, rows]."""
    shape, generator = tuple(like.shape[1:]), PerSample([SEED + row for row in rows])
    x = flow.sde.prior_sample((len(rows), *shape), generator=generator, dtype=torch.float64)
    levels = flow.level_at(clock.to(like.device)).rows()
    variants = [divergence.in_basis(basis) for basis in divergence.bases(shape)]
    template = torch.zeros(len(rows), *shape, dtype=like.dtype)
    sources = [variant.probes(template, generator) for variant in variants]
    seen: list[Tensor] = []

    def rate(i: int, z: Tensor) -> Tensor:
        level, z = levels[i], z.to(like.dtype)
        draws = [_two_or_more(source).to(z.device) for source in sources]
        value, traces = divergence(lambda z: flow.noise_part(z, level), z, torch.cat(draws, dim=0))
        seen.append(traces.double().reshape(len(variants), -1, len(rows)))
        return value.double() - flow.noise_share(level).square() * z

    Adams(clock, order=2).solve(rate, x.to(like.device) / flow.scale(levels[0]))
    return torch.stack(seen, dim=1)


def _two_or_more(source: Probes) -> Tensor:
    """At least two probes, [k, B, ...]: one alone has no spread."""
    first = source()
    return first if len(first) > 1 or first.numel() == 0 else torch.cat([first, source()])


def _crossing(clock: Tensor, values: Tensor, level: float) -> float:
    """Where ``values`` at increasing ``clock`` first pass ``level``; an end if they never do."""
    above = (values >= level).nonzero()
    if len(above) == 0:
        return float(clock[-1])
    i = int(above[0])
    if i == 0:
        return float(clock[0])
    share = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(clock[i - 1] + share * (clock[i] - clock[i - 1]))
