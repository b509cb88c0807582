"""Networks: any size and channel count, all derivatives, sample i from input i alone."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.testing import assert_close

from likelihood import Exact, Hutchinson
from score_models import Classes, Vector, networks
from score_models.checks import check_network
from score_models.networks import MLP, DiT, ScoreUNet, UNet
from score_models.networks.blocks import Dropout, through
from score_models.networks.dit import from_patches, positions, to_patches
from sde_lib.checks import ConformanceError

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
    with pytest.raises(ValueError, match=r"0, the finest, to 1.*got attention=\[2\]"):
        UNet((1, 8, 8), attention=(2,))
    with pytest.raises(ValueError, match="one to three sizes"):
        ScoreUNet((1, 8, 8, 8, 8))
    with pytest.raises(ValueError, match="kernel=null, project=True.*project and output_skip"):
        ScoreUNet((1, 8, 8), kernel=None)
    with pytest.raises(
        ValueError, match=r"whole attention heads.*\[8, 16, 16, 16\], head_channels=3"
    ):
        ScoreUNet((1, 8, 8), width=8, head_channels=3)
    with pytest.raises(ValueError, match="progressive_input to be one of none, residual, skip"):
        ScoreUNet((1, 8, 8), progressive_input="all")
    with pytest.raises(ValueError, match="rescale to be true or false"):
        ScoreUNet((1, 8, 8), rescale=1)
    with pytest.raises(ValueError, match="whole patches.*patch=2.*network=unet"):
        DiT((1, 9, 8))
    with pytest.raises(ValueError, match="divisible by 4"):
        DiT((1, 8, 8), width=10, heads=5)
    with pytest.raises(ValueError, match="width"):
        MLP((2,), width=1.5)


# sum, and sum weighted by -1 .. 1, of outputs before attention, dropout and blocks were rewritten
@pytest.mark.parametrize(
    "network, shape, plain, weighted",
    [
        (UNet((2, 9, 12), 16, blocks=1, heads=2), (2, 9, 12), -219.20165182942, 69.31864680126),
        (
            UNet((1, 8, 8), 8, (1, 2, 2), heads=2, attention=(0, -1)),
            (1, 8, 8),
            -108.37967887355,
            -0.28295212971,
        ),
        (MLP((3, 2), 16, 2, 4), (3, 2), -1.97736068203, -0.28992590314),
    ],
)
def test_networks_of_earlier_versions_are_the_same_functions(network, shape, plain, weighted):
    network = randomised(network).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = network(x, torch.tensor([-1.0, 2.0], dtype=torch.float64))
    slope = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    assert float(y.sum()) == pytest.approx(plain, rel=1e-9)
    assert float((y * slope).sum()) == pytest.approx(weighted, rel=1e-9)


CONF = Path(__file__).resolve().parents[1] / "conf" / "network"
PUBLISHED = {  # millions of weights; without the variance that ADM and DiT also predict
    "ddpm": ((3, 32, 32), None, 35.7),
    "ddpmpp": ((3, 32, 32), None, 61.8),
    "ncsnpp": ((3, 32, 32), None, 62.8),
    "ncsnpp_deep": ((3, 32, 32), None, 107.6),
    "adm": ((3, 64, 64), Classes(1000), 295.9),
}


@pytest.mark.parametrize("choice", PUBLISHED)
def test_presets_have_as_many_weights_as_published(choice):
    shape, cond, millions = PUBLISHED[choice]
    node = yaml.safe_load((CONF / f"{choice}.yaml").read_text())
    kind = getattr(networks, node.pop("_target_").rpartition(".")[2])
    with torch.device("meta"):  # shapes without memory
        network = kind(**node | {"shape": shape, "cond": cond})
    weights = sum(weight.numel() for weight in network.parameters())
    assert weights / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_transformer_of_the_paper_has_its_33_million_weights():
    with torch.device("meta"):
        network = DiT((4, 32, 32), cond=Classes(1000))
    assert sum(w.numel() for w in network.parameters()) / 1e6 == pytest.approx(33, abs=0.5)


VECTORS = torch.tensor([[0.0, 1.0], [2.0, 3.0], [torch.nan, torch.nan]])


@pytest.mark.parametrize(
    "network, shape, examples",
    [
        (MLP((3, 2), 8, 2, 4, cond=Vector(2)), (3, 2), VECTORS),
        (UNet((2, 13), 8, (1, 2), 1, heads=2, dropout=0.3), (2, 13), None),
        (UNet((1, 8, 9, 8), 8, (1, 2), 1, heads=2), (1, 8, 9, 8), None),
        (DiT((2, 8, 12), 4, 8, 2, 2, dropout=0.3, cond=Vector(2)), (2, 8, 12), VECTORS),
        (ScoreUNet((2, 11), 8, (1, 2), 1, progressive_input="skip"), (2, 11), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_networks_along_any_axes_and_conditioned_on_vectors_conform(network, shape, examples):
    check_network(network, shape, examples=examples)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("progressive_input", ["none", "skip", "residual"])
def test_output_skips_add_an_output_of_each_resolution(kernel, progressive_input):
    switches = dict(kernel=kernel, progressive_input=progressive_input, output_skip=True)
    network = randomised(ScoreUNet((2, 9, 8), 8, (1, 1, 2), 1, (), **switches))
    x, level = torch.randn(2, 2, 9, 8), torch.zeros(2)
    with torch.no_grad():
        whole = network(x, level)
        own = []
        for i in range(3):  # the outputs of the others switched off
            alone = ScoreUNet((2, 9, 8), 8, (1, 1, 2), 1, (), **switches).eval()
            alone.load_state_dict(network.state_dict())
            for j, leave in enumerate([*alone.outputs, alone.leave]):
                if j != i:
                    for weight in leave[-1].parameters():
                        weight.zero_()
            own.append(alone(x, level))
    assert_close(sum(own), whole)
    assert all(float(part.abs().max()) > 1e-3 for part in own)


def test_rescaled_sums_are_those_of_two_branches_divided_by_the_root_of_two():
    plain = randomised(ScoreUNet((1, 8, 8), 8, (1,), 1, (), rescale=False)).middle[1]
    scaled = ScoreUNet((1, 8, 8), 8, (1,), 1, ()).middle[1].eval()
    scaled.load_state_dict(plain.state_dict())
    x, level = torch.randn(2, 8, 8, 8), torch.zeros(2, 32)
    assert_close(scaled(x, level), plain(x, level) / 2**0.5)


def test_patches_are_cut_row_by_row_and_put_back():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = to_patches(x, 2)
    assert torch.equal(tokens[1, 4].reshape(3, 2, 2), x[1, :, 2:4, 2:4])
    assert torch.equal(from_patches(tokens, 2, x.shape), x)


def test_positions_differ_and_their_products_depend_on_the_distance_alone():
    p = positions(4, 5, 16).double().reshape(4, 5, 16)
    assert_close((p[0, 0] * p[2, 1]).sum(), (p[1, 3] * p[3, 4]).sum())
    assert len(p.reshape(20, 16).unique(dim=0)) == 20


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    n = 200_000
    y = Dropout(rate).train()(torch.ones(n))
    kept = (y > 0).float()
    assert abs(float(kept.mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / n) ** 0.5
    assert abs(float((kept[1:] * kept[:-1]).mean()) - (1 - rate) ** 2) < 5 * n**-0.5
    assert_close(y[y > 0], y[y > 0] * 0 + 1 / (1 - rate), rtol=2**-15, atol=0)
    assert torch.equal(Dropout(rate).eval()(y), y)


def test_checkpointing_computes_what_is_inside_again_and_keeps_less():
    calls = []

    class Block(nn.Module):
        def forward(self, x):
            calls.append(1)
            return (x * x).sin().exp()

    x = torch.randn(3, requires_grad=True)
    (plain,) = torch.autograd.grad(through(Block(), x, sparing=False).sum(), x)
    (sparing,) = torch.autograd.grad(through(Block(), x, sparing=True).sum(), x)
    assert torch.equal(plain, sparing) and len(calls) == 3


class Mixing(MLP):
    """Sees its batch."""

    def forward(self, x, noise_level, cond=None):
        return super().forward(x - x.mean(0), noise_level, cond)


class Deaf(MLP):
    """Does not hear the noise level."""

    def forward(self, x, noise_level, cond=None):
        return super().forward(x, 0 * noise_level, cond)


class Careless(MLP):
    """Ignores what it is not built for."""

    def forward(self, x, noise_level, cond=None):
        return super().forward(x, noise_level)


class Cut(MLP):
    """Has a part without derivative."""

    def forward(self, x, noise_level, cond=None):
        return super().forward(x, noise_level, cond) + x.detach() ** 2


class Forgetful(MLP):
    """Forgets its random numbers: what is computed again differs."""

    def forward(self, x, noise_level, cond=None):
        noise = torch.rand(()) if self.checkpointing else 0.0
        return super().forward(x, noise_level, cond) + noise


@pytest.mark.parametrize(
    "kind, complaint",
    [
        (Mixing, "not on its batch"),
        (Deaf, "react to its noise level"),
        (Careless, "is ignored"),
        (Cut, "should be the slope"),
        (Forgetful, "checkpointing should not change a bit of output"),
    ],
)
def test_what_does_not_conform_is_told(kind, complaint):
    with pytest.raises(ConformanceError, match=f"{kind.__name__}: .*({complaint})"):
        check_network(kind((3,), 8, 1), (3,), starts_at_zero=kind is not Cut)


class Nameless(nn.Module):
    """Has a last layer, but not under the name that is looked for."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x, noise_level, cond=None):
        return self.last(torch.cat([x, noise_level[:, None]], dim=1).sin())


def test_a_network_that_does_not_start_at_zero_or_has_no_leave_is_told():
    with pytest.raises(ConformanceError, match="without a module called `leave`"):
        check_network(Nameless(), (3,), starts_at_zero=False)
    network = MLP((3,), 8, 1)
    nn.init.ones_(network.leave[-1].bias)
    with pytest.raises(ConformanceError, match="new network should return zeros; off by 1 of 1"):
        check_network(network, (3,))
