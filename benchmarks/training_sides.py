"""The sides of benchmarks/training.py: whole training loops, each in a process of its own.

How freed memory is treated, for one, is set for a whole process. A side reads numbers of
iterations from its standard input and answers with the seconds that they took and their losses.
"""

import importlib
import json
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from experiment.averages import Exponential
from experiment.batches import Recipe
from experiment.config import named
from experiment.data import Dataset
from experiment.speed import Speed, keep_freed_memory
from experiment.state import State
from experiment.training import Training, fit
from score_models import (
    EDM,
    DenoisingScoreMatching,
    ScoreModel,
    UniformTimes,
    noise_regression,
    score_matching_loss,
)
from score_models.networks import MLP, UNet
from sde_lib import VPSDE

ROOT = Path(__file__).resolve().parents[1]
EVERY = 50  # iterations between lines of the record, as mode=train has it


@dataclass(frozen=True)
class Case:
    """What one side trains, and how.

    Args:
        side: A name of ``SIDES``.
        network: A name of ``NETWORKS``.
        shape: Of one image.
        size: Arguments of the network.
        batch: Images an iteration.
        precision: Of the network, on our side.
        compiled: Whether it is compiled, on our side.
        plainly: Whether dropout and attention are those that a textbook has.
        seed: Of the weights.
        shared: Whether the plain side is given the batches, noise and times of ours.
        lr: Learning rate.
        threads: Of each side.
        device: Where.
    """

    side: str = "ours"
    network: str = "unet"
    shape: tuple[int, ...] = (1, 28, 28)
    size: dict = field(default_factory=dict)
    batch: int = 64
    precision: str = "float32"
    compiled: bool = False
    plainly: bool = False
    seed: int = 0
    shared: bool = False
    lr: float = 3e-4
    threads: int = 1
    device: str = "cpu"


class DiffusersUNet(nn.Module):
    """The UNet2DModel of diffusers behind our interface."""

    def __init__(self, shape: tuple[int, ...], dropout: float = 0.1, **size) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        channels = shape[0]
        kind = {"in_channels": channels, "out_channels": channels, "sample_size": shape[1]}
        self.unet = UNet2DModel(**kind, dropout=dropout, **size)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.unet(x, noise_level).sample


def preset(shape: tuple[int, ...], name: str) -> nn.Module:
    """A network of conf/network, of its own size."""
    choice = named(ROOT / "conf", "network", name) | {"shape": shape}
    module, _, kind = choice.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), kind)(**choice)


NETWORKS = {"unet": UNet, "mlp": MLP, "diffusers": DiffusersUNet, "preset": preset}


class WrittenOutAttention(nn.Module):
    """Self-attention as it is usually written: einsum over pixels, every weight kept."""

    def __init__(self, lean: nn.Module) -> None:
        super().__init__()
        self.norm, self.qkv, self.leave, self.heads = lean.norm, lean.qkv, lean.leave, lean.heads

    def forward(self, x: Tensor) -> Tensor:
        """Output in the shape of ``x`` [B, C, H, W]."""
        batch, _, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height, width).unbind(1)
        weights = torch.einsum("bnchw,bncij->bnhwij", q, k) * q.shape[2] ** -0.5
        weights = weights.flatten(4).softmax(-1).reshape(weights.shape)
        return x + self.leave(torch.einsum("bnhwij,bncij->bnchw", weights, v).reshape(x.shape))


def written_plainly(network: nn.Module) -> nn.Module:
    """The same weights with torch's dropout and attention by einsum, in place of leaner ones."""
    for module in list(network.modules()):
        for name, part in list(module.named_children()):
            if hasattr(part, "qkv") and hasattr(part, "heads"):
                setattr(module, name, WrittenOutAttention(part))
            elif type(part).__name__ == "Dropout" and hasattr(part, "rate"):
                setattr(module, name, nn.Dropout(part.rate))
    return network


def model_of(case: Case) -> ScoreModel:
    """Weights are a function of the seed; layers that start at zero are given some."""
    torch.manual_seed(case.seed)
    network = NETWORKS[case.network](case.shape, **case.size)
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                weight.normal_(0, 0.02)
    network = written_plainly(network) if case.plainly else network
    return ScoreModel(network, VPSDE(), EDM(0.5)).to(case.device)


def pictures(shape: tuple[int, ...], count: int = 512) -> Dataset:
    """Smooth blobs of 256 levels: something to learn, nothing to download."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, shape[0], 4, 4, generator=generator)
    fine = nn.functional.interpolate(coarse, shape[1:], mode="bilinear")
    levels = (fine * 255.99).to(torch.uint8)
    return Dataset("blobs", levels[: -count // 8], levels[-count // 8 :], 256)


def settings_of(case: Case) -> Training:
    """Those of mode=train, at a constant rate, without weight decay: plain Adam has none."""
    constant = {"warmup": 0, "decay": False, "weight_decay": 0.0, "lr": case.lr}
    return Training(steps=1, batch_size=case.batch, log_every=EVERY, **constant)


class Ours:
    """Training as mode=train does it."""

    def __init__(self, case: Case) -> None:
        if case.device == "cpu":
            keep_freed_memory()
        model, self.settings = model_of(case), settings_of(case)
        self.data = pictures(case.shape, max(512, 2 * case.batch))
        self.every = 1 if case.shared else EVERY
        speed = Speed(precision=case.precision, compile=case.compiled)
        objective = DenoisingScoreMatching(noise_regression, UniformTimes())
        profiles, adam = self.settings.profiles, self.settings.adam
        self.state = State(model, objective, profiles, adam, speed=speed)

    def __call__(self, iterations: int) -> list[float]:
        """Train on; the losses that the record gets, the means of as many iterations each."""
        losses, steps = [], self.state.iteration + iterations
        fit(
            self.state,
            self.data,
            replace(self.settings, steps=steps, log_every=self.every),
            seed=0,
            failure_folder=ROOT,
            on_log=lambda values, _: losses.append(values["train/loss"]),
            on_checkpoint=lambda _: None,
            on_evaluate=lambda _: None,
        )
        return losses


class Plain:
    """A plain float32 loop: loops over parameters, the loss looked at each iteration."""

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.settings = case, model_of(case).train(), settings_of(case)
        self.weights, data = list(self.model.parameters()), pictures(case.shape)
        self.average = [weight.detach().clone() for weight in self.weights]
        adam = {k: v for k, v in self.settings.adam.items() if k != "weight_decay"}
        self.optimizer = torch.optim.Adam(self.weights, **adam, foreach=False, fused=False)
        objective = DenoisingScoreMatching(noise_regression, UniformTimes())
        self.recipe = Recipe(data, data.units, objective, self.model.sde, case.batch, 0)
        self.iteration = 0

    def __call__(self, iterations: int) -> list[float]:
        """Train on; the loss of each iteration."""
        return [self.step() for _ in range(iterations)]

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [-1, 1], times and noise."""
        if self.case.shared:
            batch = self.recipe(self.iteration, range(self.case.batch))
            return batch.x0, batch.draws["t"], batch.draws["noise"]
        train, sde = self.recipe.data.train, self.model.sde
        levels = train[torch.randint(len(train), (self.case.batch,))]
        x0 = (levels + torch.rand(levels.shape)) / 128 - 1
        t = sde.t_min + (sde.t_max - sde.t_min) * torch.rand(len(x0))
        return x0, t, torch.randn(x0.shape)

    def step(self) -> float:
        """One iteration."""
        x0, t, noise = (tensor.to(self.case.device) for tensor in self.batch())
        self.optimizer.zero_grad()
        loss = score_matching_loss(self.model, x0, t, noise, noise_regression).mean()
        loss.backward()
        clip_one_by_one(self.weights, self.settings.clip)
        self.optimizer.step()
        average_one_by_one(self.average, self.weights, self.settings.profiles[0], self.iteration)
        self.iteration += 1
        return loss.item()


def clip_one_by_one(weights: list[Tensor], most: float) -> None:
    """Scale the gradient down to the norm ``most``, one parameter at a time."""
    norm = sum(weight.grad.norm() ** 2 for weight in weights) ** 0.5
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)
    for weight in weights:
        weight.grad.mul_(factor)


@torch.no_grad()
def average_one_by_one(
    average: list[Tensor], weights: list[Tensor], profile: Exponential, iteration: int
) -> None:
    """Move each average towards its parameter."""
    kept = profile.kept(iteration)
    for own, weight in zip(average, weights, strict=True):
        own.mul_(kept).add_(weight, alpha=1 - kept)


SIDES = {"ours": Ours, "plain": Plain}


class Side:
    """A side at work in its own process.

    Args:
        case: What it trains.
        stack: Ends the process.
    """

    def __init__(self, case: Case, stack: ExitStack) -> None:
        self.case = case
        command = [sys.executable, "-m", "benchmarks.training_sides", json.dumps(asdict(case))]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.enter_context(self.process)
        stack.callback(self.process.stdin.close)

    def __call__(self, iterations: int) -> dict:
        """Seconds of CPU and by the clock for so many iterations, and their losses."""
        print(iterations, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict:
        """The next line that the side says; the first tells how many weights it has."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side died: {self.case}; its error is above.")
        return json.loads(line)


def serve(case: Case) -> None:
    """Be a side until the standard input ends."""
    torch.set_num_threads(case.threads)
    side = SIDES[case.side](case)
    model = side.model if case.side == "plain" else side.state.model
    print(json.dumps({"weights": sum(p.numel() for p in model.parameters())}), flush=True)
    for line in sys.stdin:
        began, before = time.perf_counter(), cpu_seconds()
        losses = side(int(line))
        spent = {"cpu": cpu_seconds() - before, "clock": time.perf_counter() - began}
        print(json.dumps(spent | {"losses": losses}), flush=True)


def cpu_seconds() -> float:
    """Of this process, what the kernel did for it included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    serve(Case(**given | {"shape": tuple(given["shape"])}))
