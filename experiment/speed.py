"""How a training step is computed, as opposed to what it computes."""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from experiment.errors import RunError
from score_models import Objective, ScoreModel, faster
from score_models.acceleration import PRECISIONS
from sde_lib import validation

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2  # of mallopt(3)


@dataclass(frozen=True)
class Speed:
    """Precision, compilation, memory and the making of batches.

    Args:
        precision: Of the network alone: float32, bfloat16 or float16 (with a loss scale).
            Preconditioning, loss, weights, optimiser and averages stay in float32.
        compile: Whether ``torch.compile`` fuses the network: a minute or two at the start.
        channels_last: Whether images lie in memory pixel by pixel; None: on a GPU in half
            precision. On CPUs it was measured to cost time in every precision.
        accumulate: Parts that the rows of a process are worked through in, one gradient of all of
            them; where memory runs out there are more.
        ahead: Batches that are made ahead; None: 2 on a GPU or with workers, else 0.
        workers: Processes that make them, for data that take long to read; 0: a thread.
    """

    precision: str = "float32"
    compile: bool = False
    channels_last: bool | None = None
    accumulate: int = 1
    ahead: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        validation.choice("speed", "precision", self.precision, PRECISIONS)
        validation.flag("speed", "compile", self.compile)
        if self.channels_last is not None:
            validation.flag("speed", "channels_last", self.channels_last)
        for name, least in (("accumulate", 1), ("workers", 0)):
            whole = validation.count("speed", name, getattr(self, name), at_least=least)
            object.__setattr__(self, name, whole)
        if self.ahead is not None:
            ahead = validation.count("speed", "ahead", self.ahead, at_least=0)
            object.__setattr__(self, "ahead", ahead)

    def parts(self, rows: range) -> int:
        """The parts that the ``rows`` of a process are worked through in.

        Raises:
            RunError: If some would be empty.
        """
        if self.accumulate > len(rows):
            raise RunError(
                f"speed.accumulate={self.accumulate} is more than the {len(rows)} samples of a "
                "batch that a process works on; make it smaller."
            )
        return self.accumulate

    def check(self, objective: Objective, device: torch.device) -> None:
        """Refuse what could only fail in the first iteration.

        Raises:
            RunError: If a network that is to be compiled cannot be, or cannot be trained so.
        """
        if not self.compile:
            return
        if objective.second_derivatives:
            raise RunError(
                f"speed.compile=true: a compiled network has no second derivatives, of which "
                f"{type(objective).__name__} makes its gradient; leave it out."
            )
        compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
        if device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise RunError(
                "speed.compile=true needs a C++ compiler on a CPU and the path has none of "
                f"{', '.join(compilers)}. Install one, name it in CXX, or leave it out."
            )

    def of_model(
        self, model: ScoreModel, device: torch.device, contiguous: bool = False
    ) -> ScoreModel:
        """What computes the loss of ``model``; weights are shared.

        Args:
            model: On ``device``; its weights may change their layout in memory.
            device: Where it is.
            contiguous: Whether weights have to lie row by row.

        Raises:
            RunError: If that is not what was asked for.
        """
        half = PRECISIONS[self.precision] is not None
        pixelwise = self.channels_last
        if pixelwise is None:
            pixelwise = half and device.type == "cuda" and not contiguous
        if pixelwise and contiguous:
            raise RunError(
                "speed.channels_last=true: distributed=fsdp cuts weights along their rows and "
                "takes no other layout; leave one of the two out."
            )
        if pixelwise:
            for weight in model.parameters():
                if weight.ndim == 4:  # of images; those of signals and volumes stay
                    weight.data = weight.data.to(memory_format=torch.channels_last)
        return faster(model, precision=self.precision, compile=self.compile)

    def batches_ahead(self, device: torch.device) -> int:
        """How many batches are made ahead."""
        if self.ahead is not None:
            return self.ahead
        return 2 if self.workers or device.type == "cuda" else 0

    def loss_scale(self, device: torch.device) -> LossScale:
        """What the loss is multiplied by, so that gradients do not vanish in half precision."""
        return LossScale(device, start=2.0**15 if self.precision == "float16" else 1.0)


class LossScale:
    """Factor on the loss: halved when a gradient overflows, doubled after many that did not.

    All of it stays on the device. A factor that starts at 1 stays there.

    Reference: Micikevicius et al., Mixed Precision Training, 2018.

    Args:
        device: Of the gradients.
        start: First factor; 1 for none.
        patience: Iterations without overflow before it doubles.
    """

    def __init__(self, device: torch.device, start: float, patience: int = 2000) -> None:
        self.start, self.moves, self.patience = start, start != 1.0, patience
        self.factor = torch.tensor(start, device=device)
        self.calm = torch.zeros((), device=device)

    def overflowed(self, bad: Tensor) -> Tensor:
        """Whether a ``bad`` gradient is one of a factor that is too large, not of bad numbers."""
        return bad & (self.factor > 1)

    def adapt(self, overflow: Tensor) -> None:
        """Take note of an iteration."""
        if not self.moves:
            return
        self.calm = torch.where(overflow, 0.0, self.calm + 1)
        double = self.calm >= self.patience
        self.calm = torch.where(double, 0.0, self.calm)
        up = torch.where(double, self.factor * 2, self.factor)
        self.factor = torch.where(overflow, (self.factor / 2).clamp(min=1.0), up)

    def state_dict(self) -> dict[str, Tensor]:
        """Factor and patience so far."""
        return {"factor": self.factor, "calm": self.calm, "start": torch.tensor(self.start)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse; a run that goes on in another precision has its own factor."""
        if float(state.get("start", 1.0)) == self.start:
            self.factor.copy_(state["factor"])
            self.calm.copy_(state["calm"])


def keep_freed_memory() -> None:
    """On Linux, let the process keep what tensors have freed: the next step wants it again.

    Else each step gives its activations back to the kernel, which clears every page again: 6 to
    10 % of the time of a U-Net's step on a CPU, at batch 64 and 256. A threshold on the size of
    single blocks would not do, as glibc takes none above 32 MB.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, 2**26)):
            libc.mallopt(option, value)
