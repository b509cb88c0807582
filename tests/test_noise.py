"""Where randomness enters: streams that depend on their own seed alone."""

from __future__ import annotations

import math

import pytest
import torch

from sde_lib import VPSDE, Counted, PerSample
from sde_lib.noise import of_rows, rand, randn, randn_like


@pytest.mark.parametrize("draw", [randn, rand])
def test_sample_i_depends_on_seed_i_alone(draw) -> None:  # noqa: ANN001
    alone = draw((1, 2, 3), PerSample([42]))
    among_seven = draw((7, 2, 3), PerSample([1, 2, 42, 3, 4, 5, 6]))
    among_many = draw((64, 2, 3), PerSample([*range(50, 113), 42]))

    assert torch.equal(alone[0], among_seven[2])
    assert torch.equal(alone[0], among_many[63])


def test_different_seeds_give_independent_numbers() -> None:
    x = randn((2, 20_000), PerSample([0, 1]), dtype=torch.float64)

    correlation = float((x[0] * x[1]).mean())
    assert abs(correlation) < 5 / math.sqrt(20_000)


def test_a_stream_never_gives_a_number_twice() -> None:
    streams = PerSample([0, 1])

    numbers = torch.cat([randn((2, 50), streams), randn((2, 50), streams)], dim=1)

    assert len(numbers.unique()) == numbers.numel()


def test_a_generator_gives_the_numbers_of_torch(seeded) -> None:  # noqa: ANN001
    wanted = torch.randn(3, 2, generator=seeded(5))

    assert torch.equal(randn((3, 2), seeded(5)), wanted)
    assert torch.equal(randn_like(torch.empty(3, 2), seeded(5)), wanted)


def test_without_a_generator_the_global_one_is_used() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        drawn = randn((3,))
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.randn(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_like_x_has_its_dtype(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, dtype=dtype)

    for generator in (PerSample([0, 1]), torch.Generator(), None):
        assert randn_like(x, generator).dtype == dtype


def test_prior_samples_take_one_seed_each() -> None:
    both = VPSDE().prior_sample((2, 3), generator=PerSample([4, 9]))
    alone = VPSDE().prior_sample((1, 3), generator=PerSample([9]))

    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize("seeds", [[], [-1], [0, 2**63], [1.5, 2], 3, ["a"], None])
def test_impossible_seeds_are_refused(seeds) -> None:  # noqa: ANN001
    with pytest.raises(
        ValueError,
        match=r"PerSample needs at least one seed, each a whole number in \[0, 2\^63\); got",
    ):
        PerSample(seeds)


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="one seed a sample: got 2 seeds for a batch of 3"):
        randn((3, 4), PerSample([0, 1]))


def test_selected_rows_draw_from_their_own_streams_and_use_them_up() -> None:
    streams, other = PerSample([0, 1, 2]), PerSample([0, 1, 2])
    first, second = (randn((3, 4), other) for _ in range(2))

    some = randn((2, 4), of_rows(streams, [2, 0]))

    assert torch.equal(some, first[[2, 0]])
    assert torch.equal(randn((3, 4), streams), torch.stack([second[0], first[1], second[2]]))


def test_a_generator_without_streams_serves_any_rows() -> None:
    generator = torch.Generator()
    assert of_rows(generator, [2]) is generator and of_rows(None, [2]) is None


def test_numbers_are_drawn_on_the_device_of_the_seeds_unless_told() -> None:
    assert PerSample([0]).device == torch.device("cpu")
    assert randn((1, 2), PerSample([0])).device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_numbers_of_a_gpu_generator_stay_on_the_gpu() -> None:
    for generator in (PerSample([0], device="cuda"), torch.Generator("cuda")):
        assert randn((1, 2), generator).device.type == "cuda"


def test_counted_counts_calls_and_passes_them_on() -> None:
    score = Counted(lambda x, t, scale=1: scale * x)

    assert [score(2, 0), score(2, 0, scale=3)] == [2, 6]
    assert score.nfe == 2
