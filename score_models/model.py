"""A network, a process and a parameterization make a score model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from score_models.conditioning import Conditioning
from score_models.features import Features
from score_models.parameterization import Parameterization
from sde_lib.sde import SDE, expand_like


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
        self._features: Features | None = None

    @property
    def cond(self) -> Conditioning | None:
        """What the network is conditioned on, if it says so in an attribute ``cond``."""
        return getattr(self.network, "cond", None)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Noise estimate E[eps | x_t], see :meth:`noise`."""
        return self.noise(x, t, cond)

    def noise(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Noise estimate E[eps | x_t] at ``x`` [B, ...] and ``t`` [] or [B]."""
        return self._noise_and_sigma(x, t, cond)[0]

    def score(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Score of the noised data at ``x`` [B, ...] and ``t`` [] or [B]."""
        noise, sigma = self._noise_and_sigma(x, t, cond)
        return -noise / expand_like(sigma.to(x.dtype), x)

    def denoised(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Denoised estimate E[x_0 | x_t] at ``x`` [B, ...] and ``t`` [] or [B]."""
        y, rho, _, raw = self._evaluate(x, t, cond)
        p = self.parameterization
        skip, out = (expand_like(c.to(x.dtype), x) for c in (p.skip(rho), p.out(rho)))
        return skip * y + out * raw

    def keep_features(self) -> None:
        """From now on keep the features of the latest evaluation, see :meth:`features`.

        Raises:
            ValueError: If the network does not say what its last layer is.
        """
        if self._features is None:
            self._features = Features(self.network)

    @torch.no_grad()
    def features(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """What enters the last layer of the network at ``x`` [B, ...] and ``t`` [] or [B].

        Right after any other method has evaluated the same three tensors, not written to since,
        this costs nothing; else, and always in inference mode, one more pass. Not for gradients:
        what is built on the features leaves the network as it is.

        Raises:
            ValueError: If the network does not say what its last layer is.
        """
        self.keep_features()
        if not self._features.are_of(x, t, cond):
            self._evaluate(x, t, cond)
        return self._features.latest

    @torch.no_grad()
    def features_beside(self, x: Tensor, t: Tensor) -> Tensor:
        """The :meth:`features` at ``x`` and ``t``, under the condition that was given there.

        For a second head that goes with the score right before it, whoever has bound that.

        Raises:
            ValueError: If the model is conditional and its latest evaluation was another one.
        """
        if self.cond is None:
            return self.features(x, t)
        self.keep_features()
        if not self._features.are_of(x, t):
            raise ValueError(
                "the second head of a conditional model takes its condition from the score that "
                "was evaluated right before, of the very same x and t; got others, or tensors of "
                "inference mode, guidance, or a wrapper that copies x. Evaluate the score there "
                "first, under no_grad, or take a variance that needs no head."
            )
        return self._features.latest

    def _noise_and_sigma(self, x: Tensor, t: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        y, rho, sigma, raw = self._evaluate(x, t, cond)
        p = self.parameterization
        # (y - x0_hat) / rho, scalars in float64: the difference itself would cancel at small rho
        from_input = expand_like(((1 - p.skip(rho)) / rho).to(x.dtype), x)
        from_output = expand_like((p.out(rho) / rho).to(x.dtype), x)
        return from_input * y - from_output * raw, sigma

    def _evaluate(
        self, x: Tensor, t: Tensor, cond: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y = x / alpha, rho and sigma (float64, [B]), and what the network makes of them."""
        asked = t
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        t = t.expand(len(x)) if t.ndim == 0 else t
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        rho = sigma / alpha
        y = x / expand_like(alpha.to(x.dtype), x)
        scaled = expand_like(self.parameterization.input(rho).to(x.dtype), x) * y
        if self._features is not None:
            self._features.listen()
        raw = self.network(scaled, rho.log().to(x.dtype), cond)
        if raw.shape != x.shape:
            raise ValueError(
                f"{type(self.network).__name__} must return the shape of its input; "
                f"got {tuple(raw.shape)} for {tuple(x.shape)}."
            )
        if self._features is not None:
            self._features.note(x, asked, cond)
        return y, rho, sigma, raw
