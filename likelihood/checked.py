"""What every likelihood asks of its input and says of a result that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from sde_lib.reverse import ProbabilityFlow
from sde_lib.samplers.base import SamplingError


def check_batch(owner: str, x: Tensor) -> None:
    """Refuse what is not a batch [B, ...] of finite numbers; waits for the device.

    Raises:
        ValueError: Saying what ``x`` is instead.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{owner} needs a batch [B, ...] as a tensor; got {type(x).__name__}. "
            "torch.as_tensor(x, dtype=torch.float32) makes one."
        )
    wanted = x.ndim >= 2 and x.numel() > 0 and x.dtype in (torch.float32, torch.float64)
    if not wanted or not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"{owner} needs a batch [B, ...] of finite floating-point numbers, float32 or "
            f"float64; got shape {tuple(x.shape)}, {x.dtype}"
            f"{'' if torch.isfinite(x).all() else ', with NaN or infinity'}. A single sample is "
            "x[None]; a network in half precision converts inside its score function."
        )


def check_kind(owner: str, name: str, value: object, kind: type, example: str) -> None:
    """Refuse an argument of another class, or a class in the place of an object.

    Raises:
        ValueError: Saying what was given and what to pass.
    """
    if not isinstance(value, kind):
        what = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise ValueError(f"{owner} needs {name} to be a {kind.__name__}, {example}; got {what}.")


def check_flow(owner: str, flow: object) -> None:
    """Refuse what is not a flow.

    Raises:
        ValueError: Saying how to make one.
    """
    check_kind(owner, "flow", flow, ProbabilityFlow, "probability_flow(sde, score)")


def check_finite(
    owner: str,
    values: Tensor,
    *,
    what: str = "samples",
    nodes: Tensor | None = None,
    clock: Tensor | None = None,
    partial: object = None,
) -> None:
    """The one wait for the device, at the end of a solve.

    Args:
        owner: Whose result it is.
        values: One number, or more, for each of ``what``, [B, ...].
        what: They are of.
        nodes: Whether the N nodes of a path were finite, [N], if that is known.
        clock: log(sigma/alpha) there, [N].
        partial: Goes along with the error: what was found, the failed ones not finite.

    Raises:
        SamplingError: Saying how many are not finite, from where on, and which is the first.
    """
    bad = (
        ~torch.isfinite(values.detach()).flatten(1).all(1)
        if values.ndim > 1
        else ~torch.isfinite(values.detach())
    )
    if not bool(bad.any()):
        return
    where = "at the end"
    if nodes is not None and not bool(nodes.all()):
        node = int((~nodes).nonzero()[0])
        where = f"from node {node} on, log(sigma/alpha) = {float(clock[node]):.4g}"
    error = SamplingError(
        f"{owner}: {int(bad.sum())} of {len(bad)} {what} are not finite {where}, the first is "
        f"number {int(bad.nonzero()[0])}; does the score function return NaN or infinity there?"
    )
    error.partial = partial
    raise error
