"""Levels drawn evenly or by the size of their losses, against sums written out by hand."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from torch.testing import assert_close

from score_models import Hybrid, LossAwareLevels, OneLevel, UniformLevels
from score_models.objective_checks import probed_model
from sde_lib import VPSDE, BatchRows, DiscreteSDE


def test_levels_of_a_discrete_process_are_its_own():
    sde = DiscreteSDE.linear_betas(num_levels=40)
    u = (torch.arange(80, dtype=torch.float64) + 0.5) / 80
    t, importance = UniformLevels(levels=40).quantile(sde, u)
    wanted = sde.times_of(torch.arange(1, 41)).repeat_interleave(2)
    assert_close(t, wanted, rtol=1e-14, atol=0)
    assert bool((importance == 1).all())
    row, _ = UniformLevels(levels=40).row(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert row.tolist() == [0, 39]


def test_one_level_is_where_the_noise_ratio_says():
    t, importance = OneLevel(noise_ratio=0.3)(VPSDE(), 5)
    assert_close(VPSDE().level(t).noise_ratio, torch.full_like(t, 0.3))
    assert bool((importance == 1).all())
    with pytest.raises(ValueError, match="OneLevel needs noise_ratio among those of VPSDE"):
        OneLevel(noise_ratio=1e4)(VPSDE(), 5)
    with pytest.raises(ValueError, match="noise_ratio"):
        OneLevel(noise_ratio=0.0)


def filled(**options) -> LossAwareLevels:
    """Three levels of two losses each: root mean squares 5, 1 and 2."""
    times = LossAwareLevels(levels=3, keep=2, **options)
    times.history.copy_(torch.tensor([[1.0, 7.0], [-1.0, 1.0], [0.0, 8**0.5]]))
    times.counts.fill_(2)
    return times


def test_shares_of_a_history_written_by_hand():
    even = torch.full((3,), 1 / 3, dtype=torch.float64)
    aware = torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64) / 8
    times = filled(floor=0.1)
    assert_close(times.shares(), 0.9 * aware + 0.1 * even, rtol=1e-6, atol=0)
    times.counts[1] = 1  # one level has not been seen twice
    assert_close(times.shares(), even)
    silent = filled()
    silent.history.zero_()
    assert_close(silent.shares(), even)


def test_loss_aware_draws_are_unbiased_and_have_their_shares():
    times, n = filled(floor=0.1), 300_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    row, importance = times.row(u)
    share = torch.bincount(row, minlength=3) / n
    assert_close(share.double(), times.shares(), rtol=0, atol=2 / n)
    values = torch.tensor([3.0, -1.0, 10.0], dtype=torch.float64)
    assert float((importance * values[row]).mean()) == pytest.approx(4.0, abs=50 / n)


def test_no_other_shares_give_less_variance():
    """For losses that are known at each level the second moment is the mean root mean square,
    squared, which by Cauchy and Schwarz is the least there is."""
    times = filled(floor=1e-9)
    sizes = torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64)

    def second_moment(shares):
        return float((sizes.square() / shares).sum()) / 9

    assert second_moment(times.shares()) == pytest.approx((8 / 3) ** 2, rel=1e-6)
    assert second_moment(filled(floor=1.0).shares()) == pytest.approx(10.0)


@pytest.mark.parametrize("batch", [1, 7, 200])  # one in a hundred rows to dozens of one level
def test_observe_keeps_the_latest_losses_of_each_level_in_row_order(batch):
    times = LossAwareLevels(levels=5, keep=3, floor=0.2)
    kept, counts = [deque(maxlen=3) for _ in range(5)], [0] * 5
    generator = torch.Generator().manual_seed(0)
    for round_ in range(12):
        u = times.draw(batch, generator)
        losses = torch.rand(batch, generator=generator) + round_
        losses[::50] = {4: math.nan, 5: math.inf}.get(round_, 1.0)
        row, importance = times.row(u)
        for i, value, counted in zip(row.tolist(), losses, importance, strict=True):
            if math.isfinite(value):
                kept[i].append(float(value / counted))
                counts[i] += 1
        times.observe(u, losses)
        assert times.counts.tolist() == counts
        for i in range(5):
            found = times.history[i, : min(counts[i], 3)].tolist()
            assert sorted(found) == pytest.approx(sorted(kept[i]), rel=1e-6)
    assert batch == 1 or min(counts) >= 3, "the shares were no longer even"


def test_the_state_does_not_depend_on_who_computes_which_losses():
    sde, x0 = VPSDE(), 0.6 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    model, states = probed_model(sde, 1, torch.tensor([[0.1, 0.2, 0.0, -0.1]])), []
    for parts in ([range(12)], [range(5), range(5, 12)]):
        torch.manual_seed(0)
        objective = Hybrid(LossAwareLevels(levels=3, keep=2))
        objective.prepare(model, x0)
        for key in range(6):
            whole = objective.draw(sde, x0.shape, BatchRows(key, 12))
            losses = []
            for rows in parts:
                some = x0[rows.start : rows.stop]
                losses.append(objective(model, some, BatchRows(key, 12, rows)).detach())
            objective.observe(whole, torch.cat(losses))
        states.append(objective.bound.times)
    assert torch.equal(states[0].counts, states[1].counts)
    assert_close(states[0].history, states[1].history)
    assert not torch.allclose(states[0].shares(), torch.full((3,), 1 / 3).double())


def test_bad_choices_are_refused_with_the_reason():
    for wrong in ({"levels": 1}, {"keep": 0}, {"floor": 0.0}, {"stratified": 1}):
        with pytest.raises(ValueError, match=f"LossAwareLevels needs {next(iter(wrong))}"):
            LossAwareLevels(**wrong)
    with pytest.raises(ValueError, match="UniformLevels needs levels"):
        UniformLevels(levels=1)
