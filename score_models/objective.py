"""Weighted denoising score matching, with all randomness as an argument."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from score_models.model import ScoreModel
from score_models.times import TimeSampler, UniformTimes
from sde_lib import validation
from sde_lib.noise import Generator, randn
from sde_lib.sde import SDE, Level, expand_like

Weight = Callable[[Level], Tensor]


def noise_regression(level: Level) -> Tensor:
    r""":math:`\lambda = \sigma^2`: plain squared error of the noise (Ho et al. 2020, L_simple)."""
    return level.sigma**2


def maximum_likelihood(level: Level) -> Tensor:
    r""":math:`\lambda = g^2`: the loss bounds the KL divergence (Song et al. 2021b, theorem 1)."""
    return level.diffusion**2


def velocity(level: Level) -> Tensor:
    r""":math:`\lambda = \sigma^2 (1 + \rho^2)`: the squared error of v (Salimans and Ho 2022)."""
    return level.sigma**2 * (1 + level.noise_ratio**2)


@dataclass(frozen=True)
class EDMWeight:
    r""":math:`\lambda = \sigma^2 (\rho^2 + s^2) / s^2`: unit loss at every level at the start
    (Karras et al. 2022).

    Stated for the denoised estimate it is their :math:`(\rho^2 + s^2) / (\rho s)^2`.

    Args:
        data_std: s, the standard deviation of the data, > 0.
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        validation.real("EDMWeight", "data_std", self.data_std, above=0)

    def __call__(self, level: Level) -> Tensor:
        return level.sigma**2 * (level.noise_ratio**2 + self.data_std**2) / self.data_std**2


def score_matching_loss(
    model: ScoreModel,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    weight: Weight,
    cond: Tensor | None = None,
) -> Tensor:
    r"""Per-sample :math:`\lambda(t)\, \|s(x_t, t) + \varepsilon/\sigma\|^2 / D`, shape [B].

    Args:
        model: The score model.
        x0: Data in model units, [B, ...].
        t: Times, [B].
        noise: Standard normal, [B, ...].
        weight: lambda, a function of the level that multiplies the squared *score* error.
        cond: Conditioning passed to the network.
    """
    level = model.sde.level(t.double())
    alpha, sigma = (expand_like(c.to(x0.dtype), x0) for c in (level.alpha, level.sigma))
    error = (
        model(alpha * x0 + sigma * noise, t, cond) - noise
    )  # sigma times the score error, of order one
    relative = (weight(level) / level.sigma**2).to(x0.dtype)
    return relative * error.square().flatten(1).mean(1)


class Objective(ABC):
    """What training minimises, in two halves: the randomness of a batch, and its loss.

    Whoever trains may draw ahead, in another thread or process, for some rows of a batch or for
    all of them. An objective with weights or a state of its own is a ``torch.nn.Module`` too; they
    are trained and stored with the model.
    """

    @abstractmethod
    def draw(self, sde: SDE, shape: Sequence[int], generator: Generator) -> dict[str, Tensor]:
        """Everything random about the loss of a batch of ``shape`` [B, ...]: tensors [B, ...] on
        the CPU. The model is not asked."""

    @abstractmethod
    def loss(
        self,
        model: ScoreModel,
        x0: Tensor,
        draws: Mapping[str, Tensor],
        cond: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample [B]; does not wait for the device.

        Args:
            model: The score model.
            x0: Data in model units, [B, ...].
            draws: What :meth:`draw` gave, on the device of ``x0``.
            cond: Conditioning passed to the network.
        """

    def observe(self, draws: Mapping[str, Tensor], losses: Tensor) -> None:  # noqa: B027
        """Hear of the losses of a whole batch, after its update."""

    def __call__(
        self,
        model: ScoreModel,
        x0: Tensor,
        generator: Generator = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Per-sample loss [B] at fresh randomness."""
        draws = self.draw(model.sde, x0.shape, generator)
        return self.loss(model, x0, {k: v.to(x0.device) for k, v in draws.items()}, cond)


@dataclass(frozen=True)
class DenoisingScoreMatching(Objective):
    """A weighting and a way to draw times.

    The mean over a batch estimates the integral of the weighted loss over t in [t_min, t_max],
    divided by t_max - t_min, whichever way the times are drawn, if they state their importance;
    ``LogNormalSigma`` without ``reweight`` makes its distribution part of the weighting.

    Args:
        weight: lambda, a function of the level.
        times: How times are drawn.
    """

    weight: Weight = noise_regression
    times: TimeSampler = UniformTimes()

    def draw(self, sde: SDE, shape: Sequence[int], generator: Generator) -> dict[str, Tensor]:
        """Times and importances [B], noise [B, ...]."""
        t, importance = self.times(sde, shape[0], generator)
        noise = randn(shape, generator)
        return {"t": t, "importance": importance.to(noise), "noise": noise}

    def loss(
        self,
        model: ScoreModel,
        x0: Tensor,
        draws: Mapping[str, Tensor],
        cond: Tensor | None = None,
    ) -> Tensor:
        """Weighted squared error of the score, see :func:`score_matching_loss`."""
        noise = draws["noise"].to(x0.dtype)
        loss = score_matching_loss(model, x0, draws["t"], noise, self.weight, cond)
        return draws["importance"].to(loss) * loss
