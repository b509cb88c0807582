"""What likelihoods are measured on: mixtures whose density is known, and trained networks."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiment.checkpoint import load_checkpoint, load_weights, stored_config
from experiment.config import check_targets
from likelihood import FixedGrid, Hutchinson, Pilot, log_likelihood
from likelihood.basis import cosines
from score_models import ScoreModel
from sde_lib import SDE, VPSDE, PerSample, ProbabilityFlow, probability_flow
from sde_lib.noise import randn
from sde_lib.oracles import GaussianMixture, Oracle

Turn = Callable[[Tensor, bool], Tensor]


class TurnedMixture(GaussianMixture):
    """Mixture of K Gaussians, each uncorrelated along axes of its own.

    ``turn`` takes K deviations [n, K, D] to coordinates along these axes, or back; standard
    deviations [K, D] are along them.
    """

    def __init__(self, means: Tensor, stds: Tensor, turn: Turn) -> None:
        super().__init__(means, stds.reshape(means.shape))
        self.turn = turn

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        alpha, sigma = alpha.unsqueeze(-1), sigma.unsqueeze(-1)
        deviation = self.turn(x.reshape(len(x), 1, -1) - alpha * self.means.to(x), False)
        variance = alpha**2 * self.variances.to(x) + sigma**2
        exponent = deviation.square() / variance + torch.log(2 * math.pi * variance)
        return self.log_weights.to(x) - 0.5 * exponent.sum(-1), deviation, variance

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        log_joint, deviation, variance = self._components(x, alpha, sigma)
        pull = log_joint.softmax(1).unsqueeze(-1) * self.turn(deviation / variance, True)
        return -pull.sum(1).reshape(x.shape)

    def noise_variance(self, sde: SDE) -> Callable[[Tensor, Tensor], Tensor]:
        raise ValueError("the variances of a TurnedMixture are along its axes, not coordinates.")

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        noise = randn((n, 1, self.means.shape[1]), generator, dtype=torch.float64)
        of_each = self.means + self.turn(self.variances.sqrt() * noise, True)
        component = torch.randint(len(self.means), (n,), generator=generator)
        return of_each[torch.arange(n), component].reshape(n, *self.shape)


def rotations(count: int, dims: int, block: int, generator: torch.Generator) -> Turn:
    """Random ones for each component, in blocks of the dimensions."""
    shape = (count, dims // block, block, block)
    axes = torch.linalg.qr(randn(shape, generator, dtype=torch.float64)).Q

    def turn(x: Tensor, back: bool) -> Tensor:
        matrices = (axes if back else axes.mT).to(x)
        return torch.einsum("kgij,nkgj->nkgi", matrices, x.unflatten(-1, shape[1:3])).flatten(-2)

    return turn


def spectrum(side: int) -> Turn:
    """The DCT of square images: the same axes for all."""

    def turn(x: Tensor, back: bool) -> Tensor:
        matrix = (cosines(side).mT if back else cosines(side)).to(x)
        return (matrix @ x.unflatten(-1, (-1, side, side)) @ matrix.mT).flatten(-3)

    return turn


def modes() -> Oracle:
    """25 modes on a slanted lattice: along the axes, a product, one probe would be exact."""
    ticks = torch.linspace(-2, 2, 5, dtype=torch.float64) / math.sqrt(2)
    slant = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    return GaussianMixture(torch.cartesian_prod(ticks, ticks) @ slant.double(), 0.05)


def vectors() -> Oracle:
    """16 components with standard deviations from 0.03 to 0.6."""
    generator = torch.Generator().manual_seed(1)
    means = 0.8 * randn((16, 32), generator, dtype=torch.float64)
    stds = torch.linspace(math.log(0.03), math.log(0.6), 32).exp().expand(16, 32)
    return TurnedMixture(means, stds, rotations(16, 32, 32, generator))


def images(side: int, channels: int, *, rotated: bool) -> Oracle:
    """Ten components with power-law spectra, in the DCT or in axes of no order."""
    generator, ticks = torch.Generator().manual_seed(2), torch.arange(side, dtype=torch.float64)
    falling = (torch.hypot(ticks[:, None], ticks) + 1) ** -1.5
    falling = 0.3 * falling / falling.square().mean().sqrt()
    shape, dims = (10, channels, side, side), channels * side * side
    means = falling * randn(shape, generator, dtype=torch.float64)
    means = spectrum(side)(means.flatten(1), True).reshape(shape)
    stds = 0.7 * falling * torch.exp(0.3 * randn(shape, generator, dtype=torch.float64)) + 0.005
    if not rotated:
        return TurnedMixture(means, stds, spectrum(side))
    shuffled = stds.flatten(1)[:, torch.randperm(dims, generator=generator)]
    return TurnedMixture(means, shuffled, rotations(10, dims, 16, generator))


MIXTURES = {  # and how many samples
    "mixture2": (modes, 256),
    "mixture32": (vectors, 64),
    "image784": (lambda: images(28, 1, rotated=False), 32),
    "rotated784": (lambda: images(28, 1, rotated=True), 32),
    "image3072": (lambda: images(32, 3, rotated=False), 16),
    "rotated3072": (lambda: images(32, 3, rotated=True), 16),
}
NETWORKS = {"digits": 16, "mnist": 6}


@dataclass(frozen=True)
class Target:
    """A flow in float32 and float64, samples x [B, ...] of it at t_min, their log-density there
    and its standard error, [B] float64, 0 for a closed form."""

    name: str
    flow: ProbabilityFlow
    precise: ProbabilityFlow
    x: Tensor
    truth: Tensor
    truth_error: Tensor


def mixture(name: str, samples: int | None) -> Target:
    """A closed form; its prior is the exact one, so that solver and probe alone can err."""
    make, usual = MIXTURES[name]
    data, sde, generator = make(), VPSDE(), torch.Generator().manual_seed(3)
    x = data.sample(samples or usual, generator=generator, sde=sde, t=sde.t_min).float()
    truth = data.log_prob(x.double(), sde, sde.t_min)
    flow = probability_flow(
        sde, data.score(sde), log_prior=lambda x: data.log_prob(x.double(), sde, sde.t_max)
    )
    return Target(name, flow, replace(flow), x, truth, torch.zeros_like(truth))


def network(name: str, checkpoint: Path, samples: int | None) -> Target:
    """A trained network on its test set; the truth is a finer grid with many more probes."""
    from run import instantiate

    state = load_checkpoint(checkpoint)
    config = stored_config(checkpoint, state)
    parts = {part: config[part] for part in ("network", "sde", "parameterization", "data")}
    check_targets(parts, f"checkpoint {checkpoint}")
    *of_model, data = (instantiate(part) for part in parts.values())
    model = ScoreModel(*of_model)
    load_weights(model, state["ema"], checkpoint)
    model.eval().requires_grad_(False)
    x = data.units.encode(data.test[: samples or NETWORKS[name]], torch.Generator().manual_seed(3))
    flow = probability_flow(model.sde, model.score)
    precise = probability_flow(model.sde, copy.deepcopy(model).double().score)
    fine = log_likelihood(
        flow,
        x,
        solver=FixedGrid(192),
        divergence=replace(Pilot.of(flow, x, Hutchinson()).divergence, num_probes=4, tiles=8),
        generator=PerSample(range(10**6, 10**6 + len(x))),  # those to be judged take the first
    )
    print(f"\n{checkpoint}: solver error of the reference {fine.solver_error.max():.2g}")
    return Target(name, flow, precise, x, fine.log_prob.double(), fine.standard_error.double())
