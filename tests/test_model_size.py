"""What a model takes, against counts by hand."""

import pytest
import torch
from torch import nn

from score_models import Classes
from score_models.model_size import ModelSize, describe
from score_models.networks import MLP, UNet


class TwoLayers(nn.Module):
    """Keeps for the gradient: its input, what enters the nonlinearity, and what leaves it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, level, cond=None):
        return self.second(nn.functional.silu(self.first(x)))


def test_weights_states_and_activations_are_those_counted_by_hand():
    size = describe(TwoLayers(), (4,), 10)
    weights = 4 * 8 + 8 + 8 * 4 + 4
    assert size.weights == weights
    assert size.state_bytes == 4 * weights * 5  # weights, gradients, two moments, one average
    assert size.sample_bytes == 4 * (4 + 8 + 8)
    assert size.total_bytes == 20 * weights + 10 * 80


def test_slots_averages_frozen_weights_and_double_precision_count():
    network = TwoLayers().double()
    network.first.requires_grad_(False)
    size = describe(network, (4,), 1, slots=1, averages=3)
    assert size.weights == 8 * 4 + 4
    assert size.state_bytes == 8 * (76 * 4 + 36 * 2)


def test_a_model_is_left_as_it_is():
    network = MLP((2,), 8, 1, cond=Classes(3)).eval()
    network.leave.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    describe(network, (2,), 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training and network.leave.training
    assert all(p.grad is None for p in network.parameters())


def test_checkpointing_and_half_precision_keep_less():
    def bytes_of(dtype=None, **options):
        network = UNet((1, 8, 8), 16, dropout=0.1, **options)
        return describe(network, (1, 8, 8), 1, dtype=dtype).sample_bytes

    assert bytes_of(checkpointing=True) < 0.5 * bytes_of()
    assert bytes_of(torch.bfloat16) < 0.8 * bytes_of()


def test_the_line_says_it_in_units():
    size = ModelSize(35_746_307, 714_926_140, 51_000_000, 128)
    assert str(size) == (
        "35.7 M weights, 715 MB with gradients, optimizer and averages; activations 51 MB a "
        "sample, 6.53 GB at batch 128"
    )
    assert str(ModelSize(76, 1520, 80, 1)).startswith("76 weights, 1.52 kB")


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="batch_size"):
        describe(TwoLayers(), (4,), 0)
