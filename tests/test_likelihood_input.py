"""What a likelihood is asked and cannot do: one sentence that says so."""

import pytest
import torch
from known_flows import exact_flow, noised, seeded, vectors
from torch.testing import assert_close

from likelihood import (
    Adaptive,
    Cosine,
    Exact,
    FixedGrid,
    Hutchinson,
    Principal,
    log_likelihood,
)
from sde_lib import (
    VESDE,
    VPSDE,
    PerSample,
    probability_flow,
)
from sde_lib.samplers import SamplingError


def test_orders_that_the_half_grid_cannot_have_are_refused():
    with pytest.raises(ValueError, match="nodes >= 40 for order 5; got nodes=9"):
        FixedGrid(9, order=5)
    with pytest.raises(ValueError, match="at most 100000 nodes"):
        FixedGrid(10**9)
    assert FixedGrid(40, order=5).chosen_order == 5


def test_samples_that_are_not_finite_leave_the_others_their_result():
    sde, data = VPSDE(), vectors()

    def broken(x, t):
        score = data.score(sde)(x, t)
        far = (x[:, :1] > 50) & (t < 0.5)
        return torch.where(far, float("nan"), score)

    x = noised(data, sde, 4)
    x[2, 0] = 1e3
    flow = probability_flow(sde, broken)
    with pytest.raises(SamplingError, match=r"1 of 4 .* from node [01] on.* number 2") as caught:
        log_likelihood(flow, x, generator=PerSample(range(4)))
    good = [0, 1, 3]
    partial = caught.value.partial.log_prob
    assert_close(
        partial[good],
        log_likelihood(flow, x[good], generator=PerSample(good)).log_prob,
        rtol=1e-4,
        atol=1e-3,
    )
    assert bool(partial[2].isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_for_the_network_and_not_for_the_states(dtype):
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 8)
    with pytest.raises(ValueError, match="half precision converts inside"):
        log_likelihood(probability_flow(sde, data.score(sde)), x.to(dtype))

    def low(x, t):  # a network whose result is rounded to half precision
        return (data.score(sde)(x, t) * sde.sigma(t).to(x)).to(dtype) / sde.sigma(t).to(dtype)

    result = log_likelihood(probability_flow(sde, low), x, generator=seeded())
    exact = log_likelihood(probability_flow(sde, data.score(sde)), x, generator=seeded())
    assert result.log_prob.dtype == torch.float32
    assert_close(result.log_prob, exact.log_prob, rtol=0.05, atol=1.0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: lambda x, t: s(x, t)[:, :2], r"shape of x; got \(\d+, 2\) for x of shape"),
        (lambda s: lambda x, t: s(x, t)[:, :1], r"shape of x; got \(\d+, 1\) for x of shape"),
        (lambda s: lambda x, t: (s(x, t), 0), "real numbers in the shape of x; got tuple"),
        (lambda s: lambda x, t: None, "real numbers in the shape of x; got NoneType"),
        (lambda s: lambda x, t: s(x, t) + 0j, "real numbers in the shape of x; got torch.complex"),
        (lambda s: lambda x, t: s(x.detach(), t), "cannot be differentiated"),
        (lambda s: lambda x, t: torch.as_tensor(x.numpy()), "cannot be differentiated"),
        (lambda s: torch.no_grad()(s), "cannot be differentiated"),
        (lambda s: lambda x, t, w=torch.ones(24, requires_grad=True): w * s(x.detach(), t),
         "cannot be differentiated"),
        (lambda s: lambda x, t, n=torch.nn.Linear(24, 24).half(): n(x), "x.half"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("probes", [Exact(), Hutchinson(2)], ids=str)
def test_a_score_that_cannot_serve_says_why(spoil, words, probes):
    sde, data = VPSDE(), vectors()
    flow = probability_flow(sde, spoil(data.score(sde)))
    with pytest.raises(ValueError, match=words):
        log_likelihood(flow, torch.zeros(3, 24), divergence=probes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": [[0.0] * 24]}, "as a tensor; got list"),
        ({"x": torch.zeros(0, 24)}, "batch"),
        ({"flow": VPSDE()}, "needs flow to be a ProbabilityFlow"),
        ({"flow": lambda x, t: x}, "needs flow to be a ProbabilityFlow"),
        ({"solver": "dopri5"}, "needs solver to be a Solver, .*got 'dopri5'"),
        ({"solver": FixedGrid}, "got the class FixedGrid"),
        ({"divergence": Exact}, "needs divergence to be a Divergence, .*got the class Exact"),
        ({"generator": 3}, "PerSample or None; got 3"),
        ({"divergence": Hutchinson(2, basis=Cosine(9))}, r"Cosine\(9\) needs samples of 9 axes"),
        ({"divergence": Hutchinson(2, basis=Principal(torch.eye(7)))}, "7 axes; got samples"),
    ],
)
def test_arguments_of_the_wrong_kind_are_told_in_one_sentence(arguments, words):
    sde, data = VPSDE(), vectors()
    given = {"flow": exact_flow(sde, data), "x": torch.zeros(3, 24)} | arguments
    with pytest.raises(ValueError, match=words):
        log_likelihood(given.pop("flow"), given.pop("x"), **given)


def test_bases_that_are_none_are_refused_when_they_are_made():
    for axes in (2 * torch.eye(5), torch.ones(5, 5), torch.eye(5)[:3], torch.eye(5).long()):
        with pytest.raises(ValueError, match="orthogonal matrix"):
            Principal(axes)
    with pytest.raises(ValueError, match="axes"):
        Cosine(0)
    with pytest.raises(ValueError, match="basis='cosine'"):
        Hutchinson(2, basis="cosine")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: FixedGrid(7), ["nodes", ">= 8", "7"]),
        (lambda: FixedGrid(order=9), ["order 6", "9"]),
        (lambda: FixedGrid(fresh=1), ["fresh", "true or false"]),
        (lambda: Hutchinson(2, "sobol"), ["distribution", "orthogonal", "'sobol'"]),
        (lambda: Adaptive(log_prob_tol=0.0), ["log_prob_tol", "> 0"]),
        (lambda: VPSDE(t_min=0.0), ["t_min"]),
        (lambda: VESDE(t_min=0.0), ["t_min"]),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)
