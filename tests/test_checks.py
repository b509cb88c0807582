"""The conformance checks: a class that breaks its contract is told which part, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from sde_lib import SDE, VESDE, VPSDE
from sde_lib.checks import ConformanceError, check_sampler, check_sde
from sde_lib.reverse import Score
from sde_lib.samplers import DDIM, Ancestral, Heun, Sampler
from sde_lib.samplers.base import Noise
from sde_lib.sde import Level


@dataclass(frozen=True)
class SquaredDiffusion(VPSDE):
    """Returns g² for g."""

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t)


@dataclass(frozen=True)
class RisingSignal(VPSDE):
    """The drift with the wrong sign."""

    def drift_rate(self, t: Tensor) -> Tensor:
        return 0.5 * self.beta(t)


@dataclass(frozen=True)
class WrongInverse(VPSDE):
    """Forgets the factor 2 between log SNR and log(alpha / sigma)."""

    def time_at(self, log_snr: Tensor) -> Tensor:
        return super().time_at(2 * log_snr)


@dataclass(frozen=True)
class Cancelling(VPSDE):
    """1 - exp(-B) without expm1."""

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - torch.exp(-self.integrated_beta(t)))


@dataclass(frozen=True)
class WeakNoise(VESDE):
    """A prior that the data still shows through."""

    sigma_max: float = 1.0


@dataclass(frozen=True)
class Tabulated(VESDE):
    """A signal that fades without autograd seeing it, and a drift that ignores it too."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.3 * t.detach())

    def time_at(self, log_snr: Tensor) -> Tensor:
        return SDE.time_at(self, log_snr)


@dataclass(frozen=True)
class DoublePrecision(VPSDE):
    """Answers in float64 whatever it is asked in."""

    def alpha(self, t: Tensor) -> Tensor:
        return super().alpha(t.double())


@dataclass(frozen=True)
class OtherDrift(VPSDE):
    """Overrides drift and forgets the rate."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return -super().drift(x, t)


@dataclass(frozen=True)
class OtherMarginal(VPSDE):
    """States the variance where the standard deviation belongs."""

    def marginal(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().marginal(x0, t)
        return mean, std**2


@dataclass(frozen=True)
class HalfLogSNR(VPSDE):
    """log(alpha / sigma) where log(alpha² / sigma²) belongs."""

    def log_snr(self, t: Tensor) -> Tensor:
        return 0.5 * super().log_snr(t)


@dataclass(frozen=True)
class Returning(VESDE):
    """Noise that falls again towards the end."""

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(t) * torch.exp(-20 * (t - 0.8).clamp(min=0))


@dataclass(frozen=True)
class OtherPrior(VESDE):
    """A log-density that is off by a constant."""

    def prior_log_prob(self, x: Tensor) -> Tensor:
        return super().prior_log_prob(x) - 1.0


@dataclass(frozen=True)
class SilentStart(VPSDE):
    """Noise that starts late."""

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(t) * (t > 0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SquaredDiffusion, r"diffusion g \(not g²\) disagrees .* at t=1: got 20, should be 4.47"),
        (RisingSignal, r"drift_rate f disagrees with .* at t=1: got 10, should be -10; off by 20"),
        (WrongInverse, "time_at does not invert log_snr in torch.float64"),
        (Cancelling, "sigma in float32 strays from float64, so it cancels"),
        (WeakNoise, "prior .* misses the marginal at t_max=1 .* by 0.153 nats per dimension"),
        (Tabulated, "the mean that f carries from t_min, exp of the integral of f, misses alpha"),
        (DoublePrecision, "alpha should keep the shape .* and the torch.float32 .* torch.float64"),
        (OtherDrift, r"drift\(x, t\) is not f\(t\) x"),
        (OtherMarginal, r"the std of marginal\(x0, t\) is not sigma\(t\)"),
        (HalfLogSNR, "log_snr is not log"),
        (Returning, "the log SNR should fall strictly with t; it goes from"),
        (OtherPrior, "prior_log_prob is not the log-density"),
        (SilentStart, "sigma should be finite and > 0 .*; at t=1e-05 it is 0"),
    ],
)
def test_a_wrong_process_is_refused_with_the_right_sentence(
    wrong: type[SDE], message: str
) -> None:
    with pytest.raises(ConformanceError, match=f"^{wrong.__name__}: .*{message}"):
        check_sde(wrong())


@dataclass(frozen=True)
class DoubledNoise(Ancestral):
    """Twice the fresh noise."""

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        return super().step(score, x, now, nxt, lambda: 2 * noise())


@dataclass(frozen=True)
class Unseeded(Ancestral):
    """Takes noise from elsewhere."""

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        return super().step(score, x, now, nxt, lambda: torch.randn_like(x))


@dataclass(frozen=True)
class Social(DDIM):
    """Looks at the batch mean."""

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        return super().step(score, x + 0.01 * x.mean(0), now, nxt, noise)


@dataclass(frozen=True)
class Boastful(DDIM):
    """A first-order method that claims the second."""

    order: ClassVar[int] = 2


@dataclass(frozen=True)
class Biased(Heun):
    """Converges, at second order, to a mean that is wrong."""

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        return super().step(lambda x, t: score(x, t) + 0.5, x, now, nxt, noise)


@dataclass(frozen=True)
class Destructive(DDIM):
    """Works in the caller's memory."""

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        return x.copy_(super().step(score, x, now, nxt, noise))


@dataclass(frozen=True)
class Widening(DDIM):
    """Answers in float64."""

    def step(self, score: Score, x: Tensor, now: Level, nxt: Level, noise: Noise) -> Tensor:
        return super().step(score, x, now, nxt, noise).double()


class Exploding(Sampler):
    """Divides by the steps that are left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, score: Score, sde: SDE, x: Tensor, *, generator: object = None) -> Tensor:
        return x / (self.steps - 1)

    def trajectory(  # noqa: ANN201
        self, score: Score, sde: SDE, x: Tensor, *, generator: object = None
    ):
        yield sde.t_min, self(score, sde, x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            DoubledNoise,
            "the variance of 16000 samples, in units of the data's, is .*, should be 1; off by",
        ),
        (
            Unseeded,
            "the same generator seed should give the same bits; .* Draw all noise from noise",
        ),
        (Social, "sample i should depend on seed i alone; in a batch of 7 it differs by"),
        (Boastful, "the error to the exact flow falls at order 0.9.* steps, should be 2 to 0.2"),
        (Biased, "the mean of 16000 samples, in units of the data's, is .*, should be 0; off by"),
        (Destructive, "the input should not be modified"),
        (
            Widening,
            "the result should have the shape and dtype of the input; got .* torch.float64",
        ),
        (Exploding, "the result should be finite; it holds NaN or infinity"),
    ],
)
def test_a_wrong_sampler_is_refused_with_the_right_sentence(
    wrong: type[Sampler], message: str
) -> None:
    with pytest.raises(ConformanceError, match=message):
        check_sampler(wrong)


def test_check_sampler_wants_something_that_makes_samplers() -> None:
    with pytest.raises(ValueError, match="a function that makes a sampler of a number of steps"):
        check_sampler(DDIM(3))
