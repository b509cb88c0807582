"""Grids: ends, order and formulas of the times that samplers visit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import EDMSDE, SDE, VPSDE, DiscreteSDE
from sde_lib.grids import Grid, Karras, Quadratic, Subsequence, UniformLogSNR, UniformTime

GRIDS = [UniformTime(), UniformLogSNR(), Karras(), Karras(power=1.0), Quadratic()]


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_times_fall_strictly_from_t_max_to_t_min(any_sde: SDE, grid: Grid, steps: int) -> None:
    times = grid(any_sde, steps)

    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert (float(times[0]), float(times[-1])) == (any_sde.t_max, any_sde.t_min)
    assert bool((times.diff() < 0).all())


def test_uniform_log_snr_is_even_in_log_snr(any_sde: SDE) -> None:
    gaps = any_sde.log_snr(UniformLogSNR()(any_sde, 20)).diff()

    assert_close(gaps, gaps.mean().expand(20), rtol=1e-6, atol=0)


def test_karras_on_edm_is_the_published_schedule() -> None:
    i, n = torch.arange(18, dtype=torch.float64), 18
    published = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7

    assert_close(Karras()(EDMSDE(), n - 1), published)


def test_karras_is_even_in_the_root_of_the_noise_ratio(any_sde: SDE) -> None:
    roots = any_sde.level(Karras(power=3.0)(any_sde, 20)).noise_ratio ** (1 / 3)

    assert_close(roots.diff(), roots.diff().mean().expand(20), rtol=1e-5, atol=0)


def test_karras_of_power_infinity_is_uniform_log_snr(sde: SDE) -> None:
    assert_close(Karras(power=1e6)(sde, 10), UniformLogSNR()(sde, 10), rtol=1e-3, atol=0)


def test_quadratic_is_even_in_the_root_of_t(sde: SDE) -> None:
    gaps = Quadratic()(sde, 12).sqrt().diff()

    assert_close(gaps, gaps.mean().expand(12))


@pytest.mark.parametrize(
    "inner", [UniformTime(), Quadratic(), UniformLogSNR(), Karras()], ids=repr
)
@pytest.mark.parametrize("levels", [3, 20, 1000])
def test_subsequence_picks_different_levels_and_keeps_both_ends(inner: Grid, levels: int) -> None:
    sde = DiscreteSDE.linear_betas(num_levels=levels)
    for steps in {1, 2, min(7, levels - 1), levels // 2, levels - 1}:
        picked = Subsequence(inner)(sde, steps) * levels
        assert_close(picked, picked.round(), rtol=0, atol=1e-9)
        assert (round(float(picked[0])), round(float(picked[-1]))) == (levels, 1)
        assert bool((picked.diff() < -0.5).all())


def test_subsequence_of_all_steps_visits_every_level() -> None:
    sde = DiscreteSDE.linear_betas(num_levels=50)

    picked = Subsequence()(sde, 49) * 50

    assert picked.round().tolist() == list(range(50, 0, -1))


def test_subsequence_takes_the_levels_nearest_to_its_grid() -> None:
    picked = Subsequence()(DiscreteSDE.linear_betas(num_levels=1000), 10) * 1000

    assert picked.round().tolist() == [1000, 900, 800, 700, 600, 500, 401, 301, 201, 101, 1]


def test_subsequence_refuses_more_steps_than_there_are_levels() -> None:
    with pytest.raises(
        ValueError, match="cannot pick 11 different levels out of 10; use at most 9 steps"
    ):
        Subsequence()(DiscreteSDE.linear_betas(num_levels=10), 10)


def test_subsequence_refuses_a_process_without_levels() -> None:
    with pytest.raises(
        ValueError, match="VPSDE has none; use another grid, or sde=ddpm or sde=ncsn"
    ):
        Subsequence()(VPSDE(), 10)


@dataclass(frozen=True)
class Standing(Grid):
    """Never moves."""

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        return torch.full_like(fractions, 0.5)


@dataclass(frozen=True)
class Backward(Grid):
    """Leaves the range on its way."""

    def times(self, sde: SDE, fractions: Tensor) -> Tensor:
        return sde.t_max + fractions


@pytest.mark.parametrize("grid", [Standing(), Backward()], ids=repr)
def test_times_that_do_not_fall_are_refused(grid: Grid) -> None:
    with pytest.raises(
        ValueError, match="do not strictly decrease from t_max=1 to t_min=1e-05 in 5 steps"
    ):
        grid(VPSDE(), 5)


@pytest.mark.parametrize("power", [0.0, -1.0])
def test_karras_refuses_a_power_that_is_not_positive(power: float) -> None:
    with pytest.raises(
        ValueError, match="Karras needs power to be a finite number > 0; got power="
    ):
        Karras(power=power)
