"""Conformance: what a process or a sampler must hold, to be run on a subclass of your own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sde_lib.noise import Generator, PerSample
from sde_lib.oracles import Gaussian
from sde_lib.processes import VPSDE
from sde_lib.samplers.base import Sampler
from sde_lib.sde import SDE

SCALARS = ("alpha", "sigma", "drift_rate", "diffusion")


class ConformanceError(AssertionError):
    """A class that breaks the contract of its kind; the message says where and by how much."""


def check_sde(sde: SDE, *, prior_bound: float = 1e-4) -> None:
    r"""Check that the scalars of a process agree with each other and are safe to compute with.

    Shapes and dtypes are kept; alpha and sigma are positive, all four scalars finite; the log SNR
    falls, and ``time_at`` inverts it; f and g are the derivatives of alpha and sigma, by automatic
    differentiation and again by integrating f and g alone; ``marginal`` and ``drift`` agree with
    the scalars; float32 agrees with float64 down to t_min; the prior is the marginal at t_max.

    Args:
        sde: An instance of the class to check.
        prior_bound: Largest divergence of the marginal at t_max from the prior for data of unit
            variance, in nats per dimension. 1e-4 is a signal of 14 % of the noise.

    Raises:
        ConformanceError: With one sentence: what disagrees, at which t, by how much, and what it
            should be.
    """
    _check_shapes(sde)
    times = _times_of(sde)
    _check_signs(sde, times)
    _check_log_snr(sde, times)
    _check_inverse(sde, times, tolerance=1e-6)
    _check_inverse(
        sde, times.float(), tolerance=1e-2
    )  # a float32 t near t_max may hold 1e-3 of log SNR
    _check_derivatives(sde, times)
    _check_forward_moments(sde)
    _check_drift_and_marginal(sde, times)
    _check_single_precision(sde, times)
    _check_prior(sde, prior_bound)


def _times_of(sde: SDE, count: int = 65) -> Tensor:
    """Different times from t_min to t_max, even in t and even in log t, increasing, float64."""
    even = torch.linspace(sde.t_min, sde.t_max, count, dtype=torch.float64)
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64).log()
    low = torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64).exp()
    times = torch.cat([even, low]).clamp(sde.t_min, sde.t_max).unique()
    apart = (
        torch.cat([times.new_ones(1), times.diff() / times[1:]]) > 1e-6
    )  # not one time, rounded in two ways
    return times[apart]


def _refuse_worst(
    sde: SDE, what: str, t: Tensor, got: Tensor, wanted: Tensor, allowed: Tensor
) -> None:
    """Raise where ``got`` misses ``wanted`` most, if by more than ``allowed``; all are [N]."""
    excess = (got - wanted).abs() / allowed
    if bool((excess <= 1).all()):
        return
    i = int(excess.nan_to_num(nan=math.inf).argmax())
    raise ConformanceError(
        f"{type(sde).__name__}: {what} at t={float(t[i]):.6g}: got {float(got[i]):.8g}, should be "
        f"{float(wanted[i]):.8g}; off by {abs(float(got[i] - wanted[i])):.3g}, "
        f"allowed {float(allowed[i]):.3g}."
    )


def _check_shapes(sde: SDE) -> None:
    if not 0 < sde.t_min < sde.t_max:
        raise ConformanceError(
            f"{type(sde).__name__}: needs 0 < t_min < t_max; "
            f"got t_min={sde.t_min:g}, t_max={sde.t_max:g}."
        )
    middle = 0.5 * (sde.t_min + sde.t_max)
    for name in (*SCALARS, "log_snr", "time_at"):
        for shape in ((), (3,)):
            for dtype in (torch.float32, torch.float64):
                given = torch.full(shape, middle, dtype=dtype)
                given = sde.log_snr(given) if name == "time_at" else given
                result = getattr(sde, name)(given)
                if result.shape != given.shape or result.dtype != dtype:
                    raise ConformanceError(
                        f"{type(sde).__name__}: {name} should keep the shape {shape} and the "
                        f"{dtype} of its argument at t={middle:g}; it returned "
                        f"{tuple(result.shape)} and {result.dtype}."
                    )


def _check_signs(sde: SDE, t: Tensor) -> None:
    for name in SCALARS:
        values = getattr(sde, name)(t)
        wrong = ~torch.isfinite(values) | ((values <= 0) & (name != "drift_rate"))
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            sign = "" if name == "drift_rate" else " and > 0"
            raise ConformanceError(
                f"{type(sde).__name__}: {name} should be finite{sign} from t_min to t_max; "
                f"at t={float(t[i]):.6g} it is {float(values[i]):g}."
            )


def _log_ratio(sde: SDE, t: Tensor) -> Tensor:
    return 2 * (sde.sigma(t).log() - sde.alpha(t).log())


def _check_log_snr(sde: SDE, t: Tensor) -> None:
    log_snr = sde.log_snr(t)
    wanted = -_log_ratio(sde, t)
    _refuse_worst(
        sde, "log_snr is not log(alpha²/sigma²)", t, log_snr, wanted, 1e-9 * (1 + wanted.abs())
    )
    rising = log_snr.diff() >= 0
    if bool(rising.any()):
        i = int(rising.nonzero()[0])
        raise ConformanceError(
            f"{type(sde).__name__}: the log SNR should fall strictly with t; it goes from "
            f"{float(log_snr[i]):.6g} at t={float(t[i]):.6g} to {float(log_snr[i + 1]):.6g} "
            f"at t={float(t[i + 1]):.6g}."
        )


def _check_inverse(sde: SDE, t: Tensor, tolerance: float) -> None:
    """Round trip in log SNR, where an error means the same at every t."""
    log_snr = sde.log_snr(t)
    back = sde.log_snr(sde.time_at(log_snr).double())
    allowed = torch.full_like(back, tolerance)
    what = f"time_at does not invert log_snr in {t.dtype}: log_snr(time_at(l))"
    _refuse_worst(sde, what, t, back, log_snr.double(), allowed)


def _check_derivatives(sde: SDE, t: Tensor) -> None:
    r"""Against :math:`f = (\log\alpha)'`, :math:`g^2 = \sigma^2 (\log \sigma^2/\alpha^2)'`."""
    one = torch.ones_like(t)
    wanted = torch.func.jvp(lambda s: sde.alpha(s).log(), (t,), (one,))[1]
    rate = torch.func.jvp(lambda s: _log_ratio(sde, s), (t,), (one,))[1]
    allowed = 1e-6 * (wanted.abs() + rate.abs())
    _refuse_worst(
        sde, "drift_rate f disagrees with d log(alpha)/dt", t, sde.drift_rate(t), wanted, allowed
    )
    wanted = (sde.sigma(t).square() * rate).clamp(min=0).sqrt()
    what = "diffusion g (not g²) disagrees with sqrt(d sigma²/dt - 2 f sigma²)"
    _refuse_worst(sde, what, t, sde.diffusion(t), wanted, 1e-6 * wanted.clamp(min=1e-300))


def _check_forward_moments(sde: SDE, intervals: int = 400) -> None:
    r"""Carry mean and variance from t_min to t_max by f and g alone; no derivative is trusted.

    In y = x / alpha the forward process is :math:`dy = (g/\alpha)\, dw`, so that over an interval
    log alpha gains the integral of f, and the variance of y that of :math:`g^2/\alpha^2`.
    """
    low, high = sde.log_snr_range()
    t = sde.time_at(torch.linspace(high, low, intervals + 1, dtype=torch.float64))
    t[0], t[-1] = sde.t_min, sde.t_max
    nodes = torch.tensor(
        [-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=torch.float64
    )  # Gauss-Legendre
    weights = torch.tensor([5 / 18, 8 / 18, 5 / 18], dtype=torch.float64)
    width = t.diff()
    inside = 0.5 * (t[1:] + t[:-1])[:, None] + 0.5 * width[:, None] * nodes
    gained = width * (sde.drift_rate(inside) @ weights)
    log_alpha = sde.alpha(t[0]).log() + torch.cat([torch.zeros_like(width[:1]), gained.cumsum(0)])
    what = "the mean that f carries from t_min, exp of the integral of f, misses alpha"
    _refuse_worst(sde, what, t, log_alpha.exp(), sde.alpha(t), 1e-3 * sde.alpha(t))
    added = width * ((sde.diffusion(inside) / sde.alpha(inside)).square() @ weights)
    start = (sde.sigma(t[:1]) / sde.alpha(t[:1])).square()
    std = sde.alpha(t) * torch.cat([start, start + added.cumsum(0)]).sqrt()
    what = "the standard deviation that f and g carry from t_min misses sigma"
    _refuse_worst(sde, what, t, std, sde.sigma(t), 1e-3 * sde.sigma(t))


def _check_drift_and_marginal(sde: SDE, t: Tensor) -> None:
    t = t[:: max(1, len(t) // 8)]
    x = torch.linspace(-2, 3, len(t) * 12, dtype=torch.float64).reshape(len(t), 3, 2, 2)
    for what, got, scalar in (
        ("drift(x, t) is not f(t) x", sde.drift(x, t), sde.drift_rate(t)),
        ("the mean of marginal(x0, t) is not alpha(t) x0", sde.marginal(x, t)[0], sde.alpha(t)),
    ):
        wanted = (scalar[:, None] * x.flatten(1)).flatten()
        if got.shape != x.shape:
            raise ConformanceError(
                f"{type(sde).__name__}: {what}: shape {tuple(got.shape)}, "
                f"should be {tuple(x.shape)}."
            )
        allowed = 1e-6 * (wanted.abs() + scalar.repeat_interleave(12).abs() + 1e-300)
        _refuse_worst(sde, what, t.repeat_interleave(12), got.flatten(), wanted, allowed)
    std = sde.marginal(x, t)[1]
    _refuse_worst(
        sde,
        "the std of marginal(x0, t) is not sigma(t)",
        t,
        std,
        sde.sigma(t),
        1e-6 * sde.sigma(t),
    )


def _check_single_precision(sde: SDE, t: Tensor) -> None:
    t = t.float()  # the same number in both precisions
    for name in SCALARS:
        exact = getattr(sde, name)(t.double())
        what = f"{name} in float32 strays from float64, so it cancels (expm1, log1p?)"
        allowed = 1e-3 * exact.abs() + 1e-30
        _refuse_worst(sde, what, t, getattr(sde, name)(t).double(), exact, allowed)


def _check_prior(sde: SDE, bound: float) -> None:
    end = torch.tensor([sde.t_max], dtype=torch.float64)
    alpha, sigma = sde.alpha(end), sde.sigma(end)
    std = torch.tensor([sde.prior_std()], dtype=torch.float64)
    _refuse_worst(sde, "prior_std is not sigma(t_max)", end, std, sigma, 1e-9 * sigma)
    ratio = float(
        (alpha / sigma).square()
    )  # variance of the marginal over that of the prior, less one
    divergence = 0.5 * (ratio - math.log1p(ratio))
    if not divergence <= bound:
        raise ConformanceError(
            f"{type(sde).__name__}: the prior N(0, sigma(t_max)²) misses the marginal at "
            f"t_max={sde.t_max:g} of unit-variance data by {divergence:.3g} nats per dimension, "
            f"should be at most {bound:g}; raise t_max or the largest noise."
        )
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3) * std
    wanted = torch.distributions.Normal(0.0, std).log_prob(x).sum(1)
    got = sde.prior_log_prob(x)
    what = "prior_log_prob is not the log-density of N(0, sigma(t_max)²)"
    _refuse_worst(sde, what, end.expand(2), got, wanted, 1e-6 * (1 + wanted.abs()))


def check_sampler(
    make: Callable[[int], Sampler],
    sde: SDE | None = None,
    *,
    steps: int = 200,
    bias: float = 0.05,
    batch_tolerance: float = 0.0,
    order_steps: tuple[int, ...] = (120, 240, 480),
) -> None:
    """Check that a sampler samples: on Gaussian data, whose score and flow are exact.

    The result is finite at 1, 2 and 10 steps and keeps shape and dtype; the input is left alone;
    the same seed gives the same bits; sample i depends on seed i alone; mean and variance come
    out right; and where the sampler is deterministic (``stochastic`` is False) and names an
    ``order``, the error falls at that order, by regression, to 0.2.

    Args:
        make: Sampler with a given number of steps; an adaptive one may ignore it.
        sde: The process to check it on; VPSDE if not given.
        steps: Number of steps at which the moments must come out.
        bias: Their allowed bias at these steps: of the mean in standard deviations, of the
            variance relative; five standard errors of the sample come on top.
        batch_tolerance: How far a sample may move with its batch; 0 means to the bit, as every
            fixed-step sampler can. An adaptive one needs some tens of times its tolerance.
        order_steps: Numbers of steps for the regression.

    Raises:
        ConformanceError: With one sentence: what disagrees, by how much, and what it should be.
    """
    sde = VPSDE() if sde is None else sde
    if isinstance(make, Sampler) or not callable(make):
        raise ValueError(
            "check_sampler needs a function that makes a sampler of a number of steps, such as "
            f"its class or lambda steps: ...; got {make!r}."
        )
    _check_results(make, sde)
    _check_seeds(make, sde)
    _check_batch_mates(make, sde, batch_tolerance)
    _check_moments(make, sde, steps, bias)
    if not getattr(make(1), "stochastic", True) and make(1).converges is not None:
        _check_order(make, sde, order_steps)


def _data(shape: tuple[int, ...]) -> Gaussian:
    return Gaussian(torch.full(shape, 0.5), 0.8)


def _run(sampler: Sampler, sde: SDE, x: Tensor, generator: Generator) -> Tensor:
    return sampler(_data(tuple(x.shape[1:])).score(sde), sde, x, generator=generator)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check_results(make: Callable[[int], Sampler], sde: SDE) -> None:
    for shape in ((5, 3), (2, 1, 4, 4)):
        for dtype in (torch.float32, torch.float64):
            x = sde.prior_sample(shape, generator=_seeded(0), dtype=dtype)
            for steps in (1, 2, 10):
                kept = x.clone()
                result = _run(make(steps), sde, x, _seeded(1))
                case = f"{make(steps)} on {type(sde).__name__}, input {shape} {dtype}"
                if result.shape != x.shape or result.dtype != dtype:
                    raise ConformanceError(
                        f"{case}: the result should have the shape and dtype of the input; "
                        f"got {tuple(result.shape)} {result.dtype}."
                    )
                if not bool(torch.isfinite(result).all()):
                    raise ConformanceError(
                        f"{case}: the result should be finite; it holds NaN or infinity."
                    )
                if not torch.equal(x, kept):
                    raise ConformanceError(
                        f"{case}: the input should not be modified; it was written to."
                    )


def _check_seeds(make: Callable[[int], Sampler], sde: SDE) -> None:
    x = sde.prior_sample((4, 3), generator=_seeded(0))
    first, again = (_run(make(10), sde, x, _seeded(1)) for _ in range(2))
    if not torch.equal(first, again):
        raise ConformanceError(
            f"{make(10)}: the same generator seed should give the same bits; the results differ "
            f"by {float((first - again).abs().max()):.3g}. Draw all noise from noise()."
        )


def _check_batch_mates(make: Callable[[int], Sampler], sde: SDE, tolerance: float) -> None:
    """Run the first samples alone, in a batch of 7 and in one of 64, each with its own seed."""
    results = []
    for batch in (64, 7, 1):
        streams = PerSample(range(100, 100 + batch))
        x = sde.prior_sample((batch, 2, 3), generator=streams)
        results.append(_run(make(10), sde, x, streams))
    for batch, result in zip((7, 1), results[1:], strict=True):
        moved = float((result - results[0][:batch]).abs().max())
        if not moved <= tolerance:
            raise ConformanceError(
                f"{make(10)}: sample i should depend on seed i alone; in a batch of {batch} "
                f"it differs by {moved:.3g} from itself in a batch of 64, allowed {tolerance:g}."
            )


def _check_moments(make: Callable[[int], Sampler], sde: SDE, steps: int, bias: float) -> None:
    count, width = 4000, 4
    streams = _seeded(2)
    x = sde.prior_sample((count, width), generator=streams, dtype=torch.float64)
    z = (_run(make(steps), sde, x, streams) - 0.5) / 0.8
    n = z.numel()
    for what, got, wanted, allowed in (
        ("mean", float(z.mean()), 0.0, bias + 5 / math.sqrt(n)),
        ("variance", float(z.var()), 1.0, bias + 5 * math.sqrt(2 / n)),
    ):
        if not abs(got - wanted) <= allowed:
            raise ConformanceError(
                f"{make(steps)} on {type(sde).__name__}: the {what} of {n} samples, in units of "
                f"the data's, is {got:.4g}, should be {wanted:g}; off by {abs(got - wanted):.3g}, "
                f"allowed {allowed:.3g} (bias {bias:g} and five standard errors)."
            )


def measured_order(
    make: Callable[[int], Sampler], sde: SDE, order_steps: tuple[int, ...] = (120, 240, 480)
) -> float:
    """Order at which a deterministic sampler approaches the exact flow of a Gaussian.

    Minus the slope of log error over log steps, fitted by least squares; the error is the largest
    over nine starting points. The exact end is x at t_min or its denoised value: the nearer one.
    """
    data = Gaussian(
        0.5, torch.tensor([0.3, 0.8, 2.0])
    )  # for one width the leading error may happen to vanish
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].expand(9, 3)
    start, end = data.push(sde, z, sde.t_max), data.push(sde, z, sde.t_min)
    t_min = torch.tensor(sde.t_min, dtype=torch.float64)
    denoised = sde.level(t_min).denoised(end, data.score(sde)(end, t_min))
    errors = []
    for steps in order_steps:
        result = make(steps)(data.score(sde), sde, start, generator=_seeded(3))
        errors.append(min(float((result - target).abs().max()) for target in (end, denoised)))
    # beyond that the error is rounding and no longer falls
    log_error = torch.tensor(errors, dtype=torch.float64).clamp(min=1e-13).log()
    log_steps = torch.tensor(order_steps, dtype=torch.float64).log()
    log_steps = log_steps - log_steps.mean()
    return -float((log_steps * log_error).sum() / log_steps.square().sum())


def _check_order(make: Callable[[int], Sampler], sde: SDE, order_steps: tuple[int, ...]) -> None:
    order, measured = make(1).converges, measured_order(make, sde, order_steps)
    if not abs(measured - order) <= 0.2:
        raise ConformanceError(
            f"{make(order_steps[-1])} on {type(sde).__name__}: the error to the exact flow falls "
            f"at order {measured:.2f} between {order_steps[0]} and {order_steps[-1]} steps, "
            f"should be {order} to 0.2."
        )
