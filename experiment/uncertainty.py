"""Numbers with their uncertainty, in as many digits as that leaves."""

from __future__ import annotations

from collections.abc import Mapping

from experiment.page import is_number


def uncertain(value: float, error: float | None) -> str:
    """``value`` ± ``error`` with two digits of the error, as in 1.812 ± 0.013.

    Without a known error > 0 there is the value alone, with four digits.
    """
    if not is_number(error) or error < 1e-12:
        return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.0f}"
    digits = 1 - int(f"{error:.1e}".partition("e")[2])  # of the rounded error: 0.0996 is 0.10
    places = max(0, digits)
    return f"{round(value, digits):z.{places}f} ± {round(error, digits):.{places}f}"


def interval(estimate: Mapping[str, float]) -> str:
    """The value and half of its interval, two digits of it; small ones by powers of ten."""
    value, half = estimate["value"], (estimate["high"] - estimate["low"]) / 2
    small = max(abs(value), half) < 1e-3
    return f"{value:.1e} ± {half:.1e}" if small else uncertain(value, half)
