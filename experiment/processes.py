"""Training by the processes of torchrun: what each holds, and what they tell each other."""

from __future__ import annotations

import os
import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from experiment.errors import RunError
from experiment.shards import rank, together, world_size
from score_models import Objective
from sde_lib import validation


class Processes(ABC):
    """One process or many that train one model on shares of each batch.

    Args:
        timeout: Seconds after which a process stops waiting for the others in an iteration.
    """

    def __init__(self, timeout: float = 1800) -> None:
        self.timeout = validation.real("distributed", "timeout", timeout, above=0)
        self.rank, self.size = rank(), world_size()
        self._group: Any = None

    def join(self) -> None:
        """Meet the others.

        Raises:
            RunError: If they cannot be reached.
        """
        if self.size > 1 and self._group is None:
            self._group = together().new_group(timeout=timedelta(seconds=self.timeout))

    def share(self, batch_size: int) -> range:
        """The rows of a batch that this process works on.

        Raises:
            RunError: If there are fewer rows than processes.
        """
        if batch_size < self.size:
            raise RunError(
                f"training.batch_size={batch_size} is of all processes together and gives none to "
                f"some of the {self.size}; make it larger or start fewer."
            )
        return range(
            batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size
        )

    def _settle(self, device: torch.device) -> None:
        """Meet the others, each with a device of its own.

        Raises:
            RunError: If this machine has fewer GPUs than processes.
        """
        self.join()
        if device.type != "cuda":
            return
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > there:
            raise RunError(
                f"{here} processes on {socket.gethostname()} for {there} GPU(s), and each needs "
                f"its own: start --nproc-per-node {there}, or train with device=cpu."
            )
        torch.cuda.set_device(device)

    @property
    def parted(self) -> bool:
        """Whether a process holds parts of tensors; they have to lie in memory row by row."""
        return False

    def check(self, objective: Objective) -> None:  # noqa: B027
        """Refuse an objective that cannot be trained so.

        Raises:
            RunError: Saying what to take.
        """

    @abstractmethod
    def spread(self, module: nn.Module, device: torch.device) -> nn.Module:
        """What to call in place of ``module`` so that gradients are those of the whole batch.

        A loss is to be a mean over the whole batch times the number of processes: gradients are
        averaged over them.
        """

    @abstractmethod
    def weights(self, module: nn.Module) -> list[nn.Parameter]:
        """What this process updates: parameters, or its parts of them."""

    def collect(self, module: nn.Module, weights: Sequence[nn.Parameter]) -> None:  # noqa: B027
        """After the backward pass: give ``weights`` their gradients.

        Raises:
            RunError: If they are not those of the whole batch.
        """

    def norm(self, weights: Sequence[nn.Parameter]) -> Tensor:
        """Norm of the gradient of the whole model, []."""
        gradients = [w.grad for w in weights if w.grad is not None]  # frozen, or not used
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def whole(self, part: Tensor, like: Tensor) -> Tensor:
        """The tensor whose ``part`` this process holds; ``like`` is the parameter it belongs to.

        All processes have to ask.
        """
        return part

    def told(self, part: Tensor, like: Tensor) -> Tensor:
        """:meth:`whole` for the first process alone, which writes it; others keep ``part``."""
        return part

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`whole`."""
        return whole

    def last(self, module: nn.Module, yes: bool) -> Any:  # noqa: ANN401
        """Context of a pass through a part of the rows; only the last makes them communicate."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes of a tensor on the device; the host does not wait."""
        if self.size == 1:
            return value
        value = value.clone()
        together().all_reduce(value, group=self._group)
        return value / self.size

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes have; the host waits for them."""
        if self.size == 1:
            return number
        told = torch.tensor(number)
        dist = together()
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        return int(told)

    def rows(self, values: Tensor, batch_size: int) -> Tensor:
        """The rows of all processes, in order, of which ``values`` [b, ...] are this one's."""
        if self.size == 1:
            return values
        whole = values.new_zeros(batch_size, *values.shape[1:])
        mine = self.share(batch_size)
        whole[mine.start : mine.stop] = values
        together().all_reduce(whole, group=self._group)
        return whole


class DDP(Processes):
    """Each process holds the whole model; gradients are averaged while they are computed."""

    def spread(self, module: nn.Module, device: torch.device) -> nn.Module:
        if self.size == 1:
            return module
        self._settle(device)
        with warnings.catch_warnings():
            # the name that comes after it is not in the oldest torch that is supported
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                module,
                device_ids=[device] if device.type == "cuda" else None,
                process_group=self._group,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )

    def weights(self, module: nn.Module) -> list[nn.Parameter]:
        return list(module.parameters())

    def collect(self, module: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        if self.size == 1 or not any(map(_unused, weights)):
            return
        # what shares a message with them was not averaged
        unused = [name for name, weight in module.named_parameters() if _unused(weight)]
        raise RunError(
            "distributed=ddp needs all weights that are trained to enter the loss; got none "
            f"of {len(unused)}, the first {unused[0]}. Freeze them (requires_grad=False), or "
            "take distributed=fsdp, which leaves them as they are."
        )

    def last(self, module: nn.Module, yes: bool) -> Any:  # noqa: ANN401
        return nullcontext() if yes or self.size == 1 else module.no_sync()


class FSDP(Processes):
    """Each process holds a part of every tensor of the model, of its averages and of the
    optimiser (FSDP2); the parts come together layer by layer for a pass.

    Args:
        timeout: Seconds after which a process stops waiting for the others in an iteration.
        smallest: Weights of a layer that is worth a round of its own.
    """

    def __init__(self, timeout: float = 1800, smallest: int = 100_000) -> None:
        super().__init__(timeout)
        self.smallest = validation.count("distributed", "smallest", smallest)

    @property
    def parted(self) -> bool:
        return self.size > 1

    def check(self, objective: Objective) -> None:
        if self.parted and objective.second_derivatives:
            raise RunError(
                "distributed=fsdp frees the weights of a layer after its pass, and "
                f"{type(objective).__name__} comes back to them for second derivatives. Take "
                "distributed=ddp."
            )

    def spread(self, module: nn.Module, device: torch.device) -> nn.Module:
        if self.size == 1:
            return module
        self._settle(device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for layer in _layers(module, self.smallest):
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def weights(self, module: nn.Module) -> list[nn.Parameter]:
        # plain tensors over the memory of the parts: an optimiser works by number, and its fused
        # kernel takes no distributed ones
        return [
            nn.Parameter(_local(p).detach(), requires_grad=p.requires_grad)
            for p in module.parameters()
        ]

    def collect(self, module: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        for weight, parameter in zip(weights, module.parameters(), strict=True):
            gradient = parameter.grad
            if not weight.requires_grad:
                continue
            weight.grad = None if gradient is None else _local(gradient)

    def norm(self, weights: Sequence[nn.Parameter]) -> Tensor:
        own = super().norm(weights)
        return (self.mean(own.square()) * self.size).sqrt()

    def whole(self, part: Tensor, like: Tensor) -> Tensor:
        if self.size == 1 or part.ndim == 0:  # the optimiser's step count is no part of anything
            return part
        from torch.distributed.tensor import DTensor

        spread = DTensor.from_local(
            part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        return spread.full_tensor()

    def told(self, part: Tensor, like: Tensor) -> Tensor:
        whole = self.whole(part, like)  # one tensor at a time: all would fill a GPU
        return whole.cpu() if self.rank == 0 else part

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        if self.size == 1 or whole.ndim == 0:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return _local(
            distribute_tensor(whole.to(_local(like).device), like.device_mesh, like.placements)
        )

    def last(self, module: nn.Module, yes: bool) -> Any:  # noqa: ANN401
        if self.size == 1:
            return nullcontext()
        return _syncing(module, yes)


@contextmanager
def _syncing(module: nn.Module, yes: bool) -> Iterator[None]:
    module.set_requires_gradient_sync(yes)
    yield


def _layers(module: nn.Module, smallest: int) -> Iterator[nn.Module]:
    """Parts of a network with enough weights, that hold no other such part; never the whole."""

    def size(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters())

    for part in module.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict) or any(
            size(inner) >= smallest for inner in part.children()
        ):
            yield from _layers(part, smallest)
        elif size(part) >= smallest:
            yield part


def _unused(weight: nn.Parameter) -> bool:
    return weight.requires_grad and weight.grad is None


def _local(tensor: Tensor) -> Tensor:
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
