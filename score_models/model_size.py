"""What a model takes: weights, their bytes in training, and those a sample adds for a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from score_models.conditioning import Conditioning
from sde_lib import validation


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model while it is trained; printed, they are one line.

    Attributes:
        weights: How many numbers are trained.
        state_bytes: Of parameters, gradients, what the optimiser keeps and the averages.
        sample_bytes: What the forward pass of one sample keeps for the gradient.
        batch_size: Samples whose gradients are taken at once.
    """

    weights: int
    state_bytes: int
    sample_bytes: int
    batch_size: int

    @property
    def total_bytes(self) -> int:
        """Of state and activations; kernels and the framework take some more."""
        return self.state_bytes + self.batch_size * self.sample_bytes

    def __str__(self) -> str:
        return (
            f"{_thousands(self.weights)} weights, {_bytes(self.state_bytes)} with gradients, "
            f"optimizer and averages; activations {_bytes(self.sample_bytes)} a sample, "
            f"{_bytes(self.batch_size * self.sample_bytes)} at batch {self.batch_size}"
        )


def describe(
    network: nn.Module,
    shape: tuple[int, ...],
    batch_size: int,
    *,
    slots: int = 2,
    averages: int = 1,
    cond: Conditioning | None = None,
    dtype: torch.dtype | None = None,
) -> ModelSize:
    """What ``network`` takes in training, activations measured on a batch of one and one of two.

    The second sample is what counts: what does not grow with the batch is no activation. The
    measurement leaves mode, gradients and random numbers as they were.

    Args:
        network: Module (x, noise_level, cond); in training mode meanwhile.
        shape: Shape of one sample.
        batch_size: Samples whose gradients are taken at once.
        slots: Numbers that the optimiser keeps for each weight; Adam 2, SGD with momentum 1.
        averages: How many averages of the weights are kept.
        cond: What the network is conditioned on; what its attribute ``cond`` says if not given.
        dtype: Autocast to measure under, such as bfloat16.
    """
    batch_size = validation.count("describe", "batch_size", batch_size)
    slots = validation.count("describe", "slots", slots, at_least=0)
    averages = validation.count("describe", "averages", averages, at_least=0)
    parameters = list(network.parameters())
    trained = [p for p in parameters if p.requires_grad]
    held = sum(_size(p) for p in parameters) * (1 + averages)
    held += sum(_size(p) for p in trained) * (1 + slots)
    cond = getattr(network, "cond", None) if cond is None else cond
    one, two = (_kept(network, shape, n, cond, dtype) for n in (1, 2))
    return ModelSize(sum(p.numel() for p in trained), held, two - one, batch_size)


def _kept(
    network: nn.Module,
    shape: tuple[int, ...],
    batch: int,
    cond: Conditioning | None,
    dtype: torch.dtype | None,
) -> int:
    """Bytes that the forward pass of so many samples keeps, shared memory counted once."""
    like = next(network.parameters())
    x = torch.zeros(batch, *shape, device=like.device, dtype=like.dtype)
    level = torch.zeros(batch, device=like.device, dtype=like.dtype)
    condition = None if cond is None else cond.null(batch, like.device)
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    mode = {module: module.training for module in network.modules()}
    autocast = torch.autocast(like.device.type, dtype, enabled=dtype is not None)
    try:
        network.train()
        with (
            torch.random.fork_rng(devices=[like.device] if like.is_cuda else []),
            torch.enable_grad(),
            autocast,
            torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor),
        ):
            output = network(x, level, condition)
    finally:
        for module, training in mode.items():
            module.training = training
    del output
    return sum(storage.nbytes() for storage in storages.values())


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _thousands(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _bytes(number: int) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number} bytes"
