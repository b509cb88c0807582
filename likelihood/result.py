"""What a likelihood found, and how far each part of it can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import validation


@dataclass(frozen=True)
class LogLikelihood:
    r"""Log-densities, their error budget, and what they cost.

    ``log_prob`` is the density of the model at t_min under the prior of the process. Two errors
    belong to how it was computed, ``standard_error`` and ``solver_error``; two differences belong
    to what was asked: ``truncation`` leads from t_min to t = 0, ``prior_mismatch`` from the prior
    to the noised data that the score function itself believes in at t_max.

    Attributes:
        log_prob: Log-density in nats, in the units of x, [B].
        standard_error: Of ``log_prob``, from the spread of the probes, nats, [B]; zero with the
            exact trace, NaN where a single probe kept along the path cannot say.
        latent: Where each sample ends at t_max, [B, ...].
        nfe: Forward passes of the score function over the batch; one of them looks at the origin
            where the score function has conditions by row.
        passes: Backward passes (vector-Jacobian products) over the batch.
        solver_error: Size of the integration error, nats, [B], from half of the nodes or ten
            times the tolerance; on a fixed grid with probes, what of it stands out from their
            noise. NaN where nobody looked: ``halve=False``, ``compare=False``.
        truncation: About log p at t = 0 minus log p at t_min, nats, [B], to first order in sigma².
        prior_mismatch: About log p minus the log-prior at the latent, nats, [B], to second order
            in alpha/sigma at t_max.
        clock: u = log(sigma/alpha) at the nodes, increasing, [N]; empty with an adaptive solver.
        trace: Estimates at the nodes, averaged over probes, [N, B]; their integral over u is the
            volume change of the path.
        freedom: Degrees of freedom behind ``standard_error``, [B].
        pilot_nfe: Forward passes, of one sample each, that looking for the nodes and at the
            origin took: once for a flow, so 0 or 1 for its later batches.
        seconds: Wall time.
    """

    log_prob: Tensor
    standard_error: Tensor
    latent: Tensor
    nfe: int
    passes: int
    solver_error: Tensor
    truncation: Tensor
    prior_mismatch: Tensor
    clock: Tensor
    trace: Tensor
    freedom: Tensor
    pilot_nfe: int
    seconds: float

    def __repr__(self) -> str:
        """The first samples with their errors; not all the numbers."""
        shown = [
            f"{value:.5g} ± {error:.2g}"
            for value, error in zip(
                self.log_prob[:4].tolist(), self.total_error[:4].tolist(), strict=True
            )
        ]
        more = ", ..." * (len(self.log_prob) > 4)
        return (
            f"LogLikelihood({', '.join(shown)}{more} nats; {len(self.log_prob)} samples, "
            f"nfe={self.nfe}, {self.seconds:.3g} s)"
        )

    @property
    def total_error(self) -> Tensor:
        """Probe and solver error together, nats, [B]; NaN where one of them is not known."""
        return torch.hypot(self.standard_error, self.solver_error)

    def interval(self, level: float = 0.95, *, solver: bool = True) -> tuple[Tensor, Tensor]:
        """Where log p lies with probability ``level``, the lower and the upper end, [B] each.

        Student's t with the degrees of freedom of the standard error, and two sizes of the solver
        error, which is no random number: with the exact trace this is a bound that holds for at
        least that part of the samples, mostly with room to spare. NaN where nobody looked at one
        of the two errors.

        Args:
            level: Of the interval, in (0, 1).
            solver: Whether the solver error is in it; without it the interval is that of the
                probes around what infinitely many of them would give on the same nodes.
        """
        half = student_quantile(level, self.freedom) * self.standard_error
        if solver:
            half = torch.hypot(half, 2 * self.solver_error)
        return self.log_prob - half, self.log_prob + half

    def information(self) -> Tensor:
        r"""Nats per unit of u that telling the data from finer and finer noise takes, [N, B].

        :math:`D - T(u) = \mathrm{tr}\,\mathrm{Cov}(x_0 | x_u) / \varrho^2` for the exact score:
        the MMSE over the noise variance, which is the rate of mutual information (Guo, Shamai,
        Verdu 2005). Its integral from the noise end down to u is what has been told by then.
        """
        return self.latent[0].numel() - self.trace


def student_quantile(level: float, freedom: Tensor) -> Tensor:
    r"""The t within which Student's distribution has probability ``level``, [B].

    With :math:`t = \sqrt\nu \tan\theta` the density is :math:`\cos^{\nu - 1}\theta`, which is
    integrated numerically; above 500 degrees of freedom it is taken as with 500.
    """
    validation.real("interval", "level", level, above=0, below=1)
    nu = freedom.double().clamp(1, 500)[:, None]
    # finer near 0, where the density is when there are many degrees of freedom
    theta = torch.linspace(0, 1, 2001, dtype=torch.float64, device=nu.device) ** 2 * math.pi / 2
    mass = torch.cumulative_trapezoid(theta.cos().clamp(min=0) ** (nu - 1), theta, dim=1)
    mass = mass / mass[:, -1:]
    cell = ((mass < level).sum(1) - 1).clamp(0, mass.shape[1] - 2)
    low, high = mass.gather(1, cell[:, None])[:, 0], mass.gather(1, cell[:, None] + 1)[:, 0]
    share = (level - low) / (high - low)
    angle = theta[cell + 1] + share * (theta[cell + 2] - theta[cell + 1])
    return (nu[:, 0].sqrt() * angle.tan()).to(freedom.dtype)
