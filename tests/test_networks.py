"""Networks: any size and channel count, all derivatives, sample i from input i alone."""

import pytest
import torch
from torch.testing import assert_close

from likelihood import Exact, Hutchinson
from score_models.networks import MLP, UNet

IMAGES = [(1, 8, 8), (3, 9, 13), (2, 15, 8), (4, 28, 28)]


def randomised(network):
    """Networks start as zero; fill every weight, so that derivatives are of something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(
                torch.randn(weight.shape, generator=generator) / max(weight[0].numel(), 4) ** 0.5
            )
    return network.eval()


def small_unet(shape):
    return randomised(UNet(shape, width=8, multipliers=(1, 2), blocks=1, heads=2))


@pytest.mark.parametrize("shape", IMAGES)
def test_unet_keeps_the_shape_of_images_of_any_size(shape):
    x = torch.randn(3, *shape)
    y = small_unet(shape)(x, torch.zeros(3))
    assert y.shape == x.shape
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("multipliers", [(1,), (1, 1, 2), (1, 2, 2, 2)])
def test_unet_takes_any_number_of_resolutions(multipliers):
    network = randomised(
        UNet((1, 8, 8), width=8, multipliers=multipliers, blocks=1, heads=2, attention=(0, -1))
    )
    assert network(torch.randn(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "network, shape",
    [(small_unet((2, 8, 9)), (2, 8, 9)), (randomised(MLP((3, 2), 16, 2, 4)), (3, 2))],
)
def test_forward_and_reverse_mode_derivatives_agree(network, shape):
    network = network.double()
    generator = torch.Generator().manual_seed(1)
    x, v, w = torch.randn(3, 2, *shape, dtype=torch.float64, generator=generator)
    level = torch.tensor([-1.0, 2.0], dtype=torch.float64)

    def field(x):
        return network(x, level)

    _, forward = torch.func.jvp(field, (x,), (v,))
    _, pullback = torch.func.vjp(field, x)
    assert_close((forward * w).sum(), (v * pullback(w)[0]).sum())


def test_second_derivatives_exist():
    network = small_unet((1, 8, 8)).double()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    y = network(x, torch.zeros(1, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert bool(second.isfinite().all()) and float(second.abs().max()) > 0


@pytest.mark.parametrize(
    "network, shape", [(small_unet((1, 8, 8)), (1, 8, 8)), (randomised(MLP((5,), 16, 2, 4)), (5,))]
)
def test_exact_trace_and_hutchinson_of_a_network_equal_its_jacobian(network, shape):
    network = network.double()
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    level = torch.tensor([0.0, 1.0], dtype=torch.float64)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda a, i=i: network(a[None], level[i : i + 1])[0], x[i]
            )
            for i in range(2)
        ]
    ).flatten(1)
    size = x[0].numel()
    matrix = jacobian.reshape(2, size, size)
    truth = matrix.diagonal(dim1=1, dim2=2).sum(1)

    exact = Exact(chunk=7)
    value, trace = exact(lambda a: network(a, level), x, exact.probes(x)())
    assert_close(value, network(x, level).detach())
    assert_close(trace[0], truth)

    estimator, k = Hutchinson(num_probes=400), 400
    _, traces = estimator(
        lambda a: network(a, level), x, estimator.probes(x, torch.Generator().manual_seed(3))()
    )
    symmetric = (matrix + matrix.mT) / 2
    off_diagonal = symmetric - torch.diag_embed(symmetric.diagonal(dim1=1, dim2=2))
    variance = 2 * off_diagonal.square().sum((1, 2))  # of one Rademacher probe, in closed form
    assert bool(((traces.mean(0) - truth).abs() < 5 * (variance / k).sqrt()).all())
    assert_close(traces.var(0), variance, rtol=0.4, atol=0)


def test_sample_i_depends_on_input_i_alone():
    network = small_unet((1, 8, 8)).double()
    x = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    level = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert_close(network(x, level)[2:3], network(x[2:3], level[2:3]), rtol=0, atol=1e-12)


def test_networks_react_to_the_noise_level():
    for network, shape in (
        (small_unet((1, 8, 8)), (1, 8, 8)),
        (randomised(MLP((5,), 16, 2)), (5,)),
    ):
        x = torch.randn(1, *shape).expand(2, *shape)
        y = network(x, torch.tensor([-2.0, -1.9]))
        assert float((y[0] - y[1]).abs().max()) > 1e-4


def test_networks_start_as_zero_so_that_training_starts_at_the_prior():
    for network, shape in ((UNet((1, 8, 8), width=8, heads=2), (1, 8, 8)), (MLP((5,)), (5,))):
        assert float(network(torch.randn(2, *shape), torch.zeros(2)).abs().max()) == 0


def test_what_a_network_cannot_take_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="network=mlp"):
        UNet((5,))
    with pytest.raises(ValueError, match="at least 8x8"):
        UNet((1, 4, 8))
    with pytest.raises(ValueError, match="divisible by heads"):
        UNet((1, 8, 8), width=10, heads=4)
    with pytest.raises(ValueError, match="dropout"):
        UNet((1, 8, 8), dropout=1.0)
    with pytest.raises(ValueError, match="width"):
        MLP((2,), width=1.5)
