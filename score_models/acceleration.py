"""The same model at less cost: its network in half precision, or compiled."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

from score_models.conditioning import Conditioning
from score_models.model import ScoreModel
from sde_lib import validation

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Autocast(nn.Module):
    """A network whose matrix products and convolutions run in half precision.

    What goes in and comes out keeps its dtype: states, scalars and sums over steps stay in
    float32, where rounding would add up.

    Args:
        network: Module (x [B, ...], noise_level [B], cond) -> [B, ...].
        dtype: bfloat16 or float16.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    @property
    def leave(self) -> nn.Module:
        """The last layers of the network, which second heads look behind."""
        return self.network.leave

    @property
    def cond(self) -> Conditioning | None:
        """What the network is conditioned on."""
        return getattr(self.network, "cond", None)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        """Output [B, ...] in the dtype of ``x``."""
        with torch.autocast(x.device.type, self.dtype):
            return self.network(x, noise_level, cond).to(x.dtype)


def faster(model: ScoreModel, *, precision: str = "float32", compile: bool = False) -> ScoreModel:
    """``model`` with its network in another precision, or compiled, or both; weights are shared.

    Args:
        model: Left as it is.
        precision: float32, bfloat16 or float16; of the network alone.
        compile: Whether ``torch.compile`` fuses the network's operations: the first call of each
            shape takes a minute or more, the others less than before.
    """
    validation.choice("faster", "precision", precision, PRECISIONS)
    validation.flag("faster", "compile", compile)
    network, dtype = model.network, PRECISIONS[precision]
    if dtype is not None:
        network = Autocast(network, dtype)
        network.training = model.network.training  # its own alone: parts may have other modes
    if compile:
        network = torch.compile(network)
    made = copy(model)  # of its own class, with what a subclass has added
    made._modules, made._features = {**model._modules, "network": network}, None
    return made
