"""A T-step model (DDPM's betas, NCSN's sigmas) as a continuous process seen at T levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sde_lib import validation
from sde_lib.processes import MarginalSDE


@dataclass(frozen=True)
class DiscreteSDE(MarginalSDE):
    r"""T noise levels joined to one process by monotone cubic interpolation of the log SNR.

    Level i = 1..T sits at time i / T, so t_min = 1 / T and t_max = 1. At those times alpha and
    sigma are those of the discrete model to machine precision; between them the log SNR is a
    monotone
    C¹ cubic (Fritsch and Butland, 1984), so that every continuous sampler and the likelihood
    apply. Build it with :meth:`from_betas`, :meth:`linear_betas` or :meth:`from_sigmas`.

    Attributes:
        num_levels: T.
    """

    alpha_of: Callable[[Tensor], Tensor] = field(repr=False)
    sigma_of: Callable[[Tensor], Tensor] = field(repr=False)
    num_levels: int = 0
    log_snr_of: MonotoneCubic | None = field(default=None, repr=False)

    def log_snr(self, t: Tensor) -> Tensor:
        """The interpolated log SNR at ``t``."""
        return self.log_snr_of(t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of :meth:`log_snr`."""
        return self._clamp(self.log_snr_of.inverse(log_snr.double())).to(log_snr.dtype)

    @classmethod
    def from_betas(cls, betas: Tensor) -> DiscreteSDE:
        r"""DDPM: :math:`\alpha_i^2 = \prod_{j \le i} (1 - \beta_j)`, :math:`\alpha^2 + \sigma^2 =
        1`.

        Args:
            betas: Variances of the noise added in step 1..T, each in (0, 1), [T].
        """
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 3 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                "DiscreteSDE.from_betas needs at least three betas, each in (0, 1); "
                f"got shape {tuple(betas.shape)}, smallest {betas.min():g}, largest "
                f"{betas.max():g}."
            )
        log_alpha2 = torch.cumsum(torch.log1p(-betas), 0)
        log_snr = MonotoneCubic.through(log_alpha2 - torch.log(-torch.expm1(log_alpha2)))
        return cls(
            log_snr_of=log_snr,
            alpha_of=lambda t: torch.exp(0.5 * F.logsigmoid(log_snr(t))),
            sigma_of=lambda t: torch.exp(0.5 * F.logsigmoid(-log_snr(t))),
            t_min=1 / len(betas),
            t_max=1.0,
            num_levels=len(betas),
        )

    @classmethod
    def linear_betas(
        cls, beta_1: float = 1e-4, beta_T: float = 0.02, num_levels: int = 1000
    ) -> DiscreteSDE:
        """The linear schedule of Ho et al., Denoising Diffusion Probabilistic Models, 2020.

        Args:
            beta_1: Variance of the noise added in the first step.
            beta_T: Variance of the noise added in the last step.
            num_levels: T, >= 3.
        """
        validation.real("DiscreteSDE", "beta_1", beta_1, above=0, below=1)
        validation.real("DiscreteSDE", "beta_T", beta_T, above=0, below=1)
        num_levels = validation.count("DiscreteSDE", "num_levels", num_levels, at_least=3)
        return cls.from_betas(torch.linspace(beta_1, beta_T, num_levels, dtype=torch.float64))

    @classmethod
    def from_sigmas(cls, sigmas: Tensor) -> DiscreteSDE:
        """NCSN: alpha = 1 and T noise scales, given in either order.

        Args:
            sigmas: Noise scales, all different and > 0, [T].
        """
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64).sort().values
        if (
            sigmas.ndim != 1
            or len(sigmas) < 3
            or not bool((sigmas > 0).all() and (sigmas.diff() > 0).all())
        ):
            raise ValueError(
                "DiscreteSDE.from_sigmas needs at least three different sigmas, each > 0; "
                f"got shape {tuple(sigmas.shape)}, smallest {sigmas.min():g}."
            )
        log_snr = MonotoneCubic.through(-2 * sigmas.log())
        return cls(
            log_snr_of=log_snr,
            alpha_of=torch.ones_like,
            sigma_of=lambda t: torch.exp(-0.5 * log_snr(t)),
            t_min=1 / len(sigmas),
            t_max=1.0,
            num_levels=len(sigmas),
        )

    @classmethod
    def geometric_sigmas(
        cls, sigma_min: float = 0.01, sigma_max: float = 50.0, num_levels: int = 232
    ) -> DiscreteSDE:
        """The geometric schedule of Song and Ermon, 2020 (232 levels from 50 to 0.01 for
        CIFAR-10).

        Args:
            sigma_min: Smallest noise scale, > 0.
            sigma_max: Largest noise scale.
            num_levels: T, >= 3.
        """
        validation.real("DiscreteSDE", "sigma_min", sigma_min, above=0)
        validation.real("DiscreteSDE", "sigma_max", sigma_max, above=sigma_min)
        num_levels = validation.count("DiscreteSDE", "num_levels", num_levels, at_least=3)
        exponents = torch.linspace(0, 1, num_levels, dtype=torch.float64)
        return cls.from_sigmas(sigma_min * (sigma_max / sigma_min) ** exponents)

    def times_of(self, levels: Tensor) -> Tensor:
        """The times i / T of integer ``levels`` in 1..T, in float64."""
        return levels.double() / self.num_levels


@dataclass(frozen=True, eq=False)
class MonotoneCubic:
    """A monotone C¹ cubic through T values at the times 1/T, 2/T, ..., 1.

    Reference: Fritsch and Butland, A method for constructing local monotone piecewise cubic
    interpolants, 1984: harmonic means of the neighbouring slopes keep each piece monotone.
    """

    values: Tensor
    slopes: Tensor

    @classmethod
    def through(cls, values: Tensor) -> MonotoneCubic:
        """The interpolant of strictly monotone ``values`` [T], T >= 3."""
        secants = values.diff()
        inner = 2 * secants[1:] * secants[:-1] / (secants[1:] + secants[:-1])
        return cls(values, torch.cat([secants[:1], inner, secants[-1:]]))

    @lru_cache(maxsize=8)  # noqa: B019  (a process lives as long as its run)
    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Values and slopes on ``device``, copied there once."""
        return self.values.to(device), self.slopes.to(device)

    def __call__(self, t: Tensor) -> Tensor:
        """The interpolant at ``t`` [...], in its dtype; linear beyond the ends."""
        position = t.double() * len(self.values) - 1  # in units of levels, 0 at the first
        index = position.detach().floor().clamp(0, len(self.values) - 2).long()
        w = position - index
        v, m = self.on(t.device)
        v0, v1, m0, m1 = v[index], v[index + 1], m[index], m[index + 1]
        w_in = w.clamp(0, 1)
        cubic = (
            v0
            + w_in * m0
            + w_in**2 * (3 * (v1 - v0) - 2 * m0 - m1)
            + w_in**3 * (m0 + m1 - 2 * (v1 - v0))
        )
        outside = torch.where(w < 0, w * m0, torch.where(w > 1, (w - 1) * m1, torch.zeros_like(w)))
        return (cubic + outside).to(t.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """The time at which a falling interpolant is ``y`` [...], float64; kept in range."""
        v, m = self.on(y.device)
        index = (torch.searchsorted(-v, -y.contiguous()) - 1).clamp(0, len(v) - 2)
        v0, m0, m1, rise = v[index], m[index], m[index + 1], v[index + 1] - v[index]
        square, cube = 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise
        low, high = torch.zeros_like(y), torch.ones_like(y)
        for _ in range(54):  # halves a step of the grid down to the last bit of float64
            w = (low + high) / 2
            above = v0 + w * (m0 + w * (square + w * cube)) > y
            low, high = torch.where(above, w, low), torch.where(above, high, w)
        return (index + 1 + (low + high) / 2) / len(v)
