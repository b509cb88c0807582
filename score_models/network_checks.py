"""Conformance: what a network must hold, to be run on one of your own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from score_models.conditioning import Conditioning
from score_models.features import Features
from sde_lib.checks import ConformanceError

BATCH = 3


def check_network(
    network: nn.Module,
    shape: tuple[int, ...],
    *,
    examples: Tensor | None = None,
    starts_at_zero: bool = True,
) -> None:
    """Check that a network (x, noise_level, cond) is one that samplers and likelihoods can use.

    The output has shape and dtype of x, and is zero at the start. Then, with all weights random:
    sample i depends on input i alone, on the noise level and on the condition; derivatives by
    forward and reverse mode and differences agree, and so do second ones by reverse mode twice and
    by forward over reverse; float32 and bfloat16 autocast agree with float64; what enters the last
    layer, ``leave``, can be kept; where the network has ``checkpointing``, gradients with it are
    the same bits as without, dropout included; a condition that does not fit is refused.

    Args:
        network: An instance of the class to check; left as it is.
        shape: Shape of one sample.
        examples: Three different values of ``cond``, for a conditional network.
        starts_at_zero: Whether the new network should return zeros.

    Raises:
        ConformanceError: With one sentence, what is wrong and by how much.
    """
    network = deepcopy(network).eval()
    probe = _Probe(type(network).__name__, shape, examples)
    if starts_at_zero:
        probe.differ("a new network should return zeros", probe.output(network), 0.0, 0.0)
    randomise(network)
    network = network.double()
    probe.check_output(network)
    probe.check_alone(network)
    probe.check_reacts(network)
    probe.check_derivatives(network)
    probe.check_precisions(network)
    probe.check_features(network)
    probe.check_checkpointing(network)
    probe.check_refusals(network)


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """``network`` with every weight normal, of variance 1 / fan in; in place.

    Networks start at zero, where nothing can be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.copy_(drawn / max(weight[0].numel(), 4) ** 0.5)
    return network


class _Probe:
    """Inputs of one shape, and what is looked at with them."""

    def __init__(self, owner: str, shape: tuple[int, ...], cond: Tensor | None) -> None:
        self.owner, self.cond = owner, cond
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(3, BATCH, *shape, generator=generator, dtype=torch.float64)
        self.x, self.v, self.w = drawn
        self.level = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)

    def output(self, network: nn.Module, rows: slice = slice(None)) -> Tensor:
        dtype = next(network.parameters()).dtype
        cond = None if self.cond is None else self.cond[rows]
        return network(self.x[rows].to(dtype), self.level[rows].to(dtype), cond)

    def fail(self, what: str) -> None:
        raise ConformanceError(f"{self.owner}: {what}.")

    def differ(self, what: str, got: Tensor, wanted: Tensor | float, allowed: float) -> None:
        """Fail where ``got`` is off by more than ``allowed``, in units of the largest wanted."""
        wanted = torch.as_tensor(wanted, dtype=torch.float64)
        off = float((got.double() - wanted).abs().max().detach())
        scale = float(wanted.abs().max().detach()) or 1.0
        if not off <= allowed * scale:  # NaN too
            self.fail(f"{what}; off by {off:.3g} of {scale:.3g}, allowed {allowed:.3g} of it")

    def check_output(self, network: nn.Module) -> None:
        y = self.output(network)
        if y.shape != self.x.shape or y.dtype != self.x.dtype:
            self.fail(
                f"the output should have shape and dtype of x, {tuple(self.x.shape)} and "
                f"{self.x.dtype}; got {tuple(y.shape)} and {y.dtype}"
            )

    def check_alone(self, network: nn.Module) -> None:
        alone = [self.output(network, slice(i, i + 1)) for i in range(BATCH)]
        what = "sample i should depend on input i alone, not on its batch"
        self.differ(what, self.output(network), torch.cat(alone), 1e-10)

    def check_reacts(self, network: nn.Module) -> None:
        value = self.output(network)
        others = {"noise level": network(self.x, self.level + 0.1, self.cond)}
        if self.cond is not None:
            others["condition"] = network(self.x, self.level, self.cond.roll(1, 0))
        for what, other in others.items():
            off = (value - other).detach().abs().flatten(1).amax(1)
            if not float(off.min()) > 1e-6:
                self.fail(f"each sample should react to its {what}; one does not")

    def field(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: network(x, self.level, self.cond)

    def check_derivatives(self, network: nn.Module) -> None:
        field, x = self.field(network), self.x.clone().requires_grad_()
        _, pushed = torch.func.jvp(field, (self.x,), (self.v,))
        (pulled,) = torch.autograd.grad((field(x) * self.w).sum(), x, create_graph=True)
        forward, reverse = (pushed * self.w).sum(), (pulled * self.v).sum()
        self.differ("forward and reverse mode should agree", reverse, forward, 1e-8)
        step = 1e-5  # leaves 1e-10 of curvature and 1e-11 of rounding
        with torch.no_grad():
            rise = field(self.x + step * self.v) - field(self.x - step * self.v)
        what = "the derivative should be the slope; is a part cut off by detach()?"
        self.differ(what, pushed, rise / (2 * step), 1e-5)
        (second,) = torch.autograd.grad(reverse, x)

        def slope(x: Tensor) -> Tensor:
            return torch.func.vjp(field, x)[1](self.w)[0]

        _, mixed = torch.func.jvp(slope, (self.x,), (self.v,))
        self.differ("second derivatives should agree in both orders", second, mixed, 1e-8)

    def check_precisions(self, network: nn.Module) -> None:
        value, single = self.output(network), deepcopy(network).float()
        got = self.output(single)
        self.differ("float32 should agree with float64", got, value, 1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            half = self.output(single)
        # 8 bits, and rounding grows with depth; a lost term is of the order of one
        self.differ("bfloat16 autocast should agree with float64", half, value, 0.2)

    def check_features(self, network: nn.Module) -> None:
        watched = deepcopy(network)
        try:
            features = Features(watched)
            self.output(watched)
            features.note()
        except (ValueError, RuntimeError) as error:
            self.fail(str(error).removesuffix("."))
        if len(features.latest) != BATCH:
            self.fail(f"features should have {BATCH} rows; got {tuple(features.latest.shape)}")

    def check_checkpointing(self, network: nn.Module) -> None:
        if not hasattr(network, "checkpointing"):
            return
        plain, sparing = deepcopy(network).train(), deepcopy(network).train()
        plain.checkpointing, sparing.checkpointing = False, True
        for what, one, other in zip(
            ("output", *(name for name, _ in network.named_parameters())),
            self.training_pass(plain),
            self.training_pass(sparing),
            strict=True,
        ):
            self.differ(f"checkpointing should not change a bit of {what}", other, one, 0.0)
        with torch.random.fork_rng(devices=[]):  # transforms of torch.func while it trains
            pushed, pulled = self.both_modes(sparing)
        self.differ("checkpointing should leave both modes as they are", pulled, pushed, 1e-8)

    def both_modes(self, network: nn.Module) -> list[Tensor]:
        """w J v by forward and by reverse mode, with the same random numbers."""
        field = self.field(network)
        torch.manual_seed(0)
        pushed = (torch.func.jvp(field, (self.x,), (self.v,))[1] * self.w).sum()
        torch.manual_seed(0)
        return [pushed, (torch.func.vjp(field, self.x)[1](self.w)[0] * self.v).sum()]

    def training_pass(self, network: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = self.output(network)
            loss = (output * self.w).sum()
            gradients = torch.autograd.grad(loss, list(network.parameters()))
        return [output, *gradients]

    def check_refusals(self, network: nn.Module) -> None:
        spec: Conditioning | None = getattr(network, "cond", None)
        if (spec is None) != (self.cond is None):
            self.fail("its attribute cond and the examples should both be there, or neither")
        wrong = torch.zeros(BATCH) if spec is None else None
        try:
            network(self.x, self.level, wrong)
        except ValueError:
            return
        self.fail("a condition that is ignored, or one that is missing, should be refused")
