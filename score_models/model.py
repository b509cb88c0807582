"""A network, a process and a parameterization make a score model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from score_models.parameterization import Parameterization
from sde_lib.sde import SDE, Level, expand_like


class ScoreModel(nn.Module):
    """Score of the noised data, from a network that estimates something else.

    Scalars are computed in float64 and reach the network as log(sigma / alpha) in the dtype of x.

    Args:
        network: Module (x [B, ...], noise_level [B], cond) -> [B, ...].
        sde: The forward process.
        parameterization: What the network's output means.
    """

    def __init__(self, network: nn.Module, sde: SDE, parameterization: Parameterization) -> None:
        super().__init__()
        self.network = network
        self.sde = sde
        self.parameterization = parameterization

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Noise estimate E[eps | x_t], see :meth:`noise`."""
        return self.noise(x, t, cond)

    def noise(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Noise estimate E[eps | x_t] at ``x`` [B, ...] and ``t`` [] or [B]."""
        y, rho, raw = self._evaluate(x, t, cond)
        p = self.parameterization
        # (y - x0_hat) / rho with its scalars in float64: the difference itself would cancel at
        # small rho
        from_input = expand_like(((1 - p.skip(rho)) / rho).to(x.dtype), x)
        from_output = expand_like((p.out(rho) / rho).to(x.dtype), x)
        return from_input * y - from_output * raw

    def denoised(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Denoised estimate E[x_0 | x_t] at ``x`` [B, ...] and ``t`` [] or [B]."""
        y, rho, raw = self._evaluate(x, t, cond)
        p = self.parameterization
        skip, out = (expand_like(c.to(x.dtype), x) for c in (p.skip(rho), p.out(rho)))
        return skip * y + out * raw

    def score(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Score of the noised data at ``x`` [B, ...] and ``t`` [] or [B]."""
        noise = self.noise(x, t, cond)
        return -noise / expand_like(self._level(x, t).sigma.to(x.dtype), x)

    def _level(self, x: Tensor, t: Tensor) -> Level:
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        return self.sde.level(t.expand(len(x)) if t.ndim == 0 else t)

    def _evaluate(
        self, x: Tensor, t: Tensor, cond: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y = x / alpha, the noise ratio (float64, [B]), and what the network makes of them."""
        level = self._level(x, t)
        rho = level.noise_ratio
        y = x / expand_like(level.alpha.to(x.dtype), x)
        scaled = expand_like(self.parameterization.input(rho).to(x.dtype), x) * y
        raw = self.network(scaled, rho.log().to(x.dtype), cond)
        if raw.shape != x.shape:
            raise ValueError(
                f"{type(self.network).__name__} must return the shape of its input; "
                f"got {tuple(raw.shape)} for {tuple(x.shape)}."
            )
        return y, rho, raw
