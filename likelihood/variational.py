"""Learned dequantization: a small flow that puts its noise where the density of the model is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood.dequantize import Dequantization, Dequantized
from sde_lib import SDE, ProbabilityFlow, validation
from sde_lib.noise import Generator, rand, randn_like
from sde_lib.rows import Rows, for_rows

Bound = Callable[[Tensor, Generator], Tensor]
LIMIT = 2.0  # of the log-scale of one coupling: no single step can run away


class Coupling(nn.Module):
    r"""An affine coupling :math:`y \mapsto e^s y + m` of one half of y, given the other half.

    s and m are functions of the half that is kept and of the levels; s stays within plus and
    minus ``LIMIT``. Its log-determinant is the sum of s.

    Args:
        kept: Mask of the half that is kept, bool, of the shape of one sample.
        network: Takes the kept half and the levels joined along axis 1 to s and m, joined alike.
    """

    def __init__(self, kept: Tensor, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, y: Tensor, centred: Tensor) -> tuple[Tensor, Tensor]:
        """The new y [B, ...] float64 and the log-determinant [B], from y and levels [B, ...]."""
        seen = torch.where(self.kept, 2 * y.sigmoid() - 1, 0.0)
        dtype = next(self.network.parameters()).dtype
        told = self.network(torch.cat([seen, centred], 1).to(dtype)).double()
        scale, shift = torch.where(torch.cat([self.kept, self.kept]), 0.0, told).chunk(2, 1)
        log_scale = LIMIT * torch.tanh(scale / LIMIT)
        return log_scale.exp() * y + shift, log_scale.flatten(1).sum(1)


class DequantizationFlow(nn.Module):
    r"""A conditional flow q(u | v) on the unit cube, exactly uniform before it is trained.

    Uniform noise becomes logistic noise y by the logit, goes through affine couplings that see the
    levels, and comes back by the sigmoid:

    .. math::  \log q(u | v) = \sum_d \left[\log \sigma'(y_d) - \log \sigma'(y'_d)\right]
               - \log \left| \det \partial y' / \partial y \right|,
               \qquad \sigma'(y) = \sigma(y)\, \sigma(-y)

    The networks start at zero, where every coupling is the identity and log q = 0. Images
    [C, H, W] get checkerboards and small convolutions, and so have few weights; every other shape
    is a vector with its even and odd numbers in turn and a small MLP.

    Args:
        shape: Shape of one sample.
        hidden: Width of the networks.
        layers: Couplings, at least 2, since each changes one half of the sample.
        generator: Source of the initial weights; torch's own if not given.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: int = 32,
        layers: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(validation.count("DequantizationFlow", "shape", n) for n in shape)
        hidden = validation.count("DequantizationFlow", "hidden", hidden)
        layers = validation.count("DequantizationFlow", "layers", layers, at_least=2)
        self.image = len(self.shape) == 3
        parity = _parity(self.shape if self.image else (math.prod(self.shape),))
        build = _convolutions if self.image else _perceptron
        self.couplings = nn.ModuleList(
            Coupling(parity != layer % 2, build(len(parity), hidden)) for layer in range(layers)
        )
        _initialize(self, generator)

    def forward(self, noise: Tensor, centred: Tensor) -> tuple[Tensor, Tensor]:
        """One u for each row of noise, with its log-density.

        Args:
            noise: Uniform in [0, 1), [B, *shape] float64.
            centred: Levels scaled to (-1, 1), [B, *shape].

        Returns:
            u in (0, 1), [B, *shape] float64, and log q(u | v), nats, [B].
        """
        if noise.shape[1:] != self.shape or centred.shape != noise.shape:
            raise ValueError(
                f"DequantizationFlow was built for samples of shape {self.shape}; got noise of "
                f"shape {tuple(noise.shape)} and levels of shape {tuple(centred.shape)}. Build "
                "one for that shape."
            )
        y = noise.double().clamp(2**-54, 1 - 2**-53).logit()  # logit(0) is minus infinity
        y, centred = (part if self.image else part.flatten(1) for part in (y, centred))
        log_q = _log_slope(y)
        for coupling in self.couplings:
            y, log_det = coupling(y, centred)
            log_q = log_q - log_det
        return y.sigmoid().reshape(noise.shape), log_q - _log_slope(y)


def _log_slope(y: Tensor) -> Tensor:
    """Log-derivative of the sigmoid, summed over a sample, [B]; the logistic log-density too."""
    return (F.logsigmoid(y) + F.logsigmoid(-y)).flatten(1).sum(1)


def _parity(shape: tuple[int, ...]) -> Tensor:
    """Sum of the indices modulo 2, of ``shape``: a checkerboard through all axes."""
    axes = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return torch.stack(axes).sum(0) % 2


def _perceptron(size: int, hidden: int) -> nn.Sequential:
    return _stack(nn.Linear, 2 * size, hidden)


def _convolutions(channels: int, hidden: int) -> nn.Sequential:
    return _stack(partial(nn.Conv2d, kernel_size=3, padding=1), 2 * channels, hidden)


def _stack(layer: Callable[[int, int], nn.Module], size: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        layer(size, hidden), nn.SiLU(), layer(hidden, hidden), nn.SiLU(), layer(hidden, size)
    )


@torch.no_grad()
def _initialize(flow: DequantizationFlow, generator: torch.Generator | None) -> None:
    """Random first layers; the last is zero, so that the flow starts as the identity."""
    for coupling in flow.couplings:
        *first, last = coupling.network[::2]
        for layer in first:
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=fan_in**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


@dataclass(frozen=True)
class VariationalDequantization(Dequantization):
    r"""Spreads each level over its bin as a learned flow does: :math:`x = low + w\,(v + u)`.

    :math:`u \sim q(u | v)`, hence :math:`\log q(x | v) = \log q(u | v) - D \log w`. Whatever the
    flow is, the bound holds; training (:func:`fit_dequantization`) only tightens it, and an
    untrained :class:`DequantizationFlow` is uniform dequantization. It is for a model that was
    trained on uniformly dequantized data, or on draws of this one, which ``encode`` gives.

    Reference: Ho et al., Flow++, 2019, section 3.1.

    Args:
        levels: K, from 2 to 65536.
        low: Where the bin of level 0 starts, in model units.
        high: Where the bin of level K - 1 ends.
        flow_module: Module (noise, centred levels) -> (u, log q), like
            :class:`DequantizationFlow`; its ``state_dict`` is all there is to save.
    """

    flow_module: nn.Module = field(kw_only=True, compare=False, repr=False)

    def encode(self, values: Tensor, generator: Generator = None) -> Tensor:
        """Levels [B, ...] as float32 points, each drawn from q; without gradients."""
        with torch.no_grad():
            return self._draw(values, generator, None).x

    def draw_with_gradient(self, values: Tensor, generator: Generator = None) -> Dequantized:
        """``draw`` whose ``x`` and ``log_q`` can be differentiated by the weights of the flow."""
        self.check(values)
        return self._draw(values, generator, None)

    def _draw(self, values: Tensor, generator: Generator, sde: SDE | None) -> Dequantized:
        noise = rand(values.shape, generator, device=values.device, dtype=torch.float64)
        centred = (2 * values.double() + 1) / self.levels - 1
        u, log_q = self.flow_module(noise, centred)
        log_volume = values[0].numel() * math.log(self.bin_width)
        return Dequantized(self._place(values, u), log_q - log_volume)


def one_sample_bound(flow: ProbabilityFlow) -> Bound:
    r"""A lower bound on log p(x) for one evaluation of the score, differentiable in x.

    The variational bound in continuous time, in the clock :math:`u = \log(\sigma / \alpha)`, with
    a Gaussian decoder of standard deviation :math:`\varrho_{min} = e^{u_{min}}`:

    .. math::  \log p(x) \ge E \left[ \log \frac{\pi(x_T)}{q(x_T | x)}
               - (u_{max} - u_{min})\, \|\varepsilon - \hat\varepsilon(x_u)\|^2 \right]
               - \frac{D}{2} \log(2 \pi e) - D\, u_{min}

    with u uniform, one draw of it a sample. It bounds the density of the SDE with that score, of
    the data themselves and not of x at t_min, and the likelihood of the ODE only as far as the
    score is exact: it is for training a dequantization, not for reporting.

    Reference: Kingma et al., Variational Diffusion Models, 2021.

    Args:
        flow: Its score must be differentiable with respect to x.

    Returns:
        Function (x [B, ...], generator) -> one draw of the bound, nats, [B] float64.
    """
    return _OneSampleBound(flow)


class _OneSampleBound:
    """The bound of :func:`one_sample_bound`; under conditions, of the batch that they are for."""

    def __init__(self, flow: ProbabilityFlow) -> None:
        self.flow, self.ends = flow, flow.clock_range()

    def for_rows(self, rows: Rows) -> _OneSampleBound:
        """Of the samples ``rows`` of that batch."""
        return _OneSampleBound(self.flow.for_rows(rows))

    def __call__(self, x: Tensor, generator: Generator = None) -> Tensor:
        flow, (low, high) = self.flow, self.ends
        u = rand((len(x),), generator, device=x.device, dtype=torch.float64)
        level = flow.level_at(low + (high - low) * u).like(x)
        alpha, sigma = level.expand_like(x)[1:3]
        noise = randn_like(x, generator)
        eps_hat = level.noise(flow.score(alpha * x + sigma * noise, level.t).to(x.dtype))
        error = (noise - eps_hat).double().square().flatten(1).sum(1)
        decoder = -x[0].numel() * (low + 0.5 * math.log(2 * math.pi * math.e))
        return _prior_term(flow, x, high, generator) - (high - low) * error + decoder


def _prior_term(flow: ProbabilityFlow, x: Tensor, clock: float, generator: Generator) -> Tensor:
    """One draw of log pi(x_T) - log q(x_T | x), nats, [B]; the noise of the two cancels."""
    level = flow.level_at(torch.tensor(clock, dtype=torch.float64, device=x.device))
    x, noise = x.double(), randn_like(x, generator).double()
    log_prior = flow.prior_log_prob(level.alpha * x + level.sigma * noise)
    log_scale = torch.log(level.sigma * math.sqrt(2 * math.pi))
    return log_prior + 0.5 * noise.square().flatten(1).sum(1) + x[0].numel() * log_scale


@torch.enable_grad()
def fit_dequantization(
    dequantization: VariationalDequantization,
    bound: Bound,
    values: Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    lr: float = 2e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Train q by maximising :math:`E[\mathrm{bound}(x) - \log q(x | v)]`, nothing else changes.

    Adam with a learning rate that falls linearly to zero and gradients clipped to norm one.

    Args:
        dequantization: Its ``flow_module`` is trained in place.
        bound: Function (x [B, ...], generator) -> nats [B], at most log p(x) on average and
            differentiable in x; :func:`one_sample_bound` of a flow, or an exact log-density.
        values: Levels to train on, [N, ...], integers.
        steps: Optimiser iterations.
        batch_size: Rows drawn, with replacement, for each of them.
        lr: Learning rate at the start.
        generator: Source of all randomness.

    Returns:
        The objective at each step, nats a dimension, [steps] float64.

    Raises:
        ValueError: For values that are no levels, or a bound that is no function of x.
        FloatingPointError: When objective or gradient are not finite; the weights are then those
            of the last good step.
    """
    dequantization.check(values)
    steps = validation.count("fit_dequantization", "steps", steps)
    batch_size = validation.count("fit_dequantization", "batch_size", batch_size)
    weights = list(dequantization.flow_module.parameters())
    optimizer = torch.optim.Adam(
        weights, lr=validation.real("fit_dequantization", "lr", lr, above=0)
    )
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    draw = partial(_batch, values, bound, batch_size, generator)
    _check_bound(dequantization, *draw(), generator)
    history = []
    for step in range(steps):
        gain = _gain(dequantization, *draw(), generator)
        _set_gradients(weights, -gain, step)
        optimizer.step()
        falling.step()
        history.append(gain.detach())
    return torch.stack(history)


def _batch(
    values: Tensor, bound: Bound, size: int, generator: torch.Generator | None
) -> tuple[Bound, Tensor]:
    """So many rows of ``values``, and the bound for them."""
    device = values.device if generator is None else generator.device
    rows = torch.randint(len(values), (size,), generator=generator, device=device)
    rows = rows.to(values.device)
    return for_rows(bound, rows), values[rows]


def _gain(
    dequantization: VariationalDequantization, bound: Bound, values: Tensor, generator: Generator
) -> Tensor:
    """Mean of bound - log q over one draw for each of ``values``, nats a dimension, []."""
    drawn = dequantization._draw(values, generator, None)
    return drawn.bound(bound(drawn.x, generator)).mean() / values[0].numel()


def _set_gradients(weights: list[Tensor], loss: Tensor, step: int) -> None:
    """Gradients of the flow alone: those of the score network are neither computed nor kept."""
    gradients = torch.autograd.grad(loss, weights)
    norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
    if not bool(torch.isfinite(loss + norm)):  # the one wait for the device a step
        raise FloatingPointError(
            f"fit_dequantization: at step {step} the objective is {-loss.item():g} nats a "
            f"dimension and its gradient has norm {norm.item():g}; the weights are those before "
            "this step. Does the bound give NaN for points inside the bins? Else lower lr."
        )
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient / norm.clamp(min=1).to(gradient)


def _check_bound(
    dequantization: VariationalDequantization, bound: Bound, values: Tensor, generator: Generator
) -> None:
    """Refuse a bound through which no gradient comes: only the entropy would be trained."""
    x = dequantization.encode(values, generator).requires_grad_()
    total = bound(x, generator).sum()
    if total.requires_grad and torch.autograd.grad(total, x, allow_unused=True)[0] is not None:
        return
    raise ValueError(
        "fit_dequantization needs a bound(x, generator) that is differentiable in x; got one that "
        "does not depend on x. Compute it without torch.no_grad() and without detaching x."
    )
