"""The fixed grid: its order, its nodes, and that nothing but the sample matters to a sample."""

import math
from dataclasses import replace

import pytest
import torch
from known_flows import PROCESSES, correlated, exact_flow, noised, seeded, vectors
from torch.testing import assert_close

from likelihood import (
    Adaptive,
    Exact,
    FixedGrid,
    Hutchinson,
    Pilot,
    encode,
    log_likelihood,
)
from sde_lib import (
    VPSDE,
    PerSample,
    probability_flow,
)
from sde_lib.adams import Adams
from sde_lib.oracles import Gaussian, GaussianMixture


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("data", [vectors(), correlated()], ids=["mixture", "gaussian"])
def test_integration_error_is_below_a_tenth_of_a_nat_by_96_nodes(sde, data):
    x = noised(data, sde, 32).double()
    result = log_likelihood(exact_flow(sde, data), x, divergence=Exact(), solver=FixedGrid(96))
    error = result.log_prob - data.log_prob(x, sde, sde.t_min)
    assert float(error.square().mean().sqrt()) < 0.01
    # what the halved grid says of it is neither silent nor wild
    assert float(error.abs().mean()) < 2 * float(result.solver_error.mean()) + 1e-4
    assert float(result.solver_error.mean()) < 0.1


@pytest.mark.parametrize("probes", [Hutchinson(2), Exact()], ids=str)
def test_a_sample_is_the_same_in_every_batch(probes):
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 9)
    flow = probability_flow(sde, data.score(sde))

    def run(rows):
        return log_likelihood(
            flow, x[rows], divergence=probes, generator=PerSample(rows), solver=FixedGrid(24)
        )

    together = run(range(9))
    for rows in ([0], [4, 5], [8, 1, 3]):
        alone = run(rows)
        for name in ("log_prob", "standard_error", "latent", "truncation", "solver_error"):
            assert_close(getattr(alone, name), getattr(together, name)[rows], rtol=1e-3, atol=1e-4)


def test_information_by_noise_level_is_the_posterior_variance_over_that_of_the_noise():
    sde, std = VPSDE(), torch.tensor([0.1, 1.0, 0.5])
    data = Gaussian(torch.zeros(3), std)
    result = log_likelihood(exact_flow(sde, data), noised(data, sde, 4).double())
    rho = result.clock.exp()[:, None]
    wanted = (std**2 / (std**2 + rho**2)).sum(1)  # posterior variance s² rho² / (s² + rho²)
    assert_close(result.information(), wanted[:, None].expand(-1, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("probes", [Exact(), Hutchinson(2)], ids=str)
def test_log_prob_is_differentiable_by_gradcheck(probes):
    sde = VPSDE()
    scale = torch.tensor([0.8, 1.3], dtype=torch.float64, requires_grad=True)
    memory = {}  # of one pilot: nodes that moved with the parameters would move the error

    def remembering(score):
        flow = probability_flow(sde, score)
        flow.memory.update(memory)
        Pilot.of(flow, x, probes)
        memory.update(flow.memory)
        return flow

    def log_prob(x, scale):
        def score(y, t):
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            return -y / (alpha**2 * scale**2 + sigma**2) - 0.1 * torch.sin(y)

        result = log_likelihood(
            remembering(score),
            x,
            solver=FixedGrid(12, halve=False),
            divergence=probes,
            generator=seeded(),
            differentiable=True,
        )
        return result.log_prob, result.latent

    x = torch.randn(3, 2, generator=seeded(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_prob, (x, scale))
    with pytest.raises(ValueError, match="FixedGrid"):
        log_likelihood(
            probability_flow(sde, lambda y, t: -y), x, solver=Adaptive(), differentiable=True
        )


def test_gradient_of_the_exact_log_density_is_the_score():
    sde, data = VPSDE(), vectors(3)
    x = noised(data, sde, 20).double().requires_grad_()
    result = log_likelihood(
        exact_flow(sde, data), x, solver=FixedGrid(192, halve=False), differentiable=True
    )
    (gradient,) = torch.autograd.grad(result.log_prob.sum(), x)
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    score = data.score(sde)(x.detach(), t)
    assert float((gradient - score).norm(dim=1).max()) < 0.02 * float(score.norm(dim=1).mean())
    assert not log_likelihood(exact_flow(sde, data), x).log_prob.requires_grad


@pytest.mark.parametrize(
    "solver", [FixedGrid(16), Adaptive(1e-3, 1e-3)], ids=["fixed", "adaptive"]
)
def test_inference_mode_changes_nothing(solver):
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 3)
    outside = log_likelihood(exact_flow(sde, data), x, solver=solver, generator=seeded())
    with torch.inference_mode():
        flow = exact_flow(sde, data)
        inside = log_likelihood(flow, x.clone(), solver=solver, generator=seeded())
        latent = encode(exact_flow(sde, data), x.clone(), nodes=16)
    assert_close(inside.log_prob, outside.log_prob, rtol=0, atol=1e-5)
    assert latent.shape == x.shape


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: the loop's waits cannot be seen"
)
def test_the_loop_over_the_nodes_never_waits_for_the_gpu():
    device, sde, calls = torch.device("cuda"), VPSDE(), 0

    def score(x, t):
        nonlocal calls
        calls += 1
        if calls == 3:
            torch.cuda.set_sync_debug_mode("error")
        if calls == 30:
            torch.cuda.set_sync_debug_mode("default")
        return -x

    flow, x = probability_flow(sde, score), torch.zeros(4, 24, device=device)
    for _ in range(2):  # what the pilot found is kept
        calls = 1000 if not flow.memory else 0
        generator = torch.Generator(device).manual_seed(0)
        try:
            result = log_likelihood(flow, x, solver=FixedGrid(32), generator=generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(result.log_prob.isfinite().all())


def test_the_trace_is_integrated_one_order_above_the_path():
    sde, data = VPSDE(), Gaussian(torch.zeros(2, dtype=torch.float64), 0.3)
    flow = exact_flow(sde, data)  # whose trace does not depend on the path
    low, high = (math.exp(u) for u in flow.clock_range())
    truth = math.log((0.09 + high**2) / (0.09 + low**2))
    errors = []
    for nodes in (64, 128):
        solver = FixedGrid(nodes, halve=False)
        x = noised(data, sde, 1)
        path = solver.solve(flow, x, Exact(), None, differentiable=False)
        errors.append(abs(float(path.volume) - truth))
    assert errors[0] / errors[1] > 2**4.6 and errors[1] < 1e-7


def test_a_tolerance_of_log_p_of_its_own_takes_evaluations_of_its_own():
    sde, data = VPSDE(), vectors()
    flow, x = exact_flow(sde, data), noised(data, sde, 4)
    loose, tight = (
        log_likelihood(
            flow, x, solver=Adaptive(1e-3, 1e-3, tol, compare=False), divergence=Exact()
        )
        for tol in (None, 1e-7)
    )
    assert tight.nfe > loose.nfe


def test_no_sample_of_an_adaptive_solver_hides_behind_its_batch_mates():
    sde = VPSDE()
    data = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.02)
    flow, solver = exact_flow(sde, data), Adaptive(1e-4, 1e-4, compare=False)
    hard = noised(data, sde, 1).double()
    easy = torch.tensor([[40.0, 40.0]], dtype=torch.float64).expand(199, 2)
    alone = log_likelihood(flow, hard, solver=solver)
    among = log_likelihood(flow, torch.cat([hard, easy]), solver=solver)
    assert among.nfe >= alone.nfe
    assert float((among.log_prob[0] - alone.log_prob[0]).abs()) < 1e-2


def test_a_quick_solver_is_cheaper():
    assert FixedGrid(64).quick() == FixedGrid(32, halve=False)
    assert FixedGrid(16).quick() == FixedGrid(16, halve=False)
    assert Adaptive().quick() == Adaptive(1e-3, 1e-3, compare=False)


def test_float32_needs_no_more_nodes_than_float64():
    sde, data = VPSDE(), vectors()
    x = noised(data, sde, 64)
    errors = {
        dtype: log_likelihood(
            exact_flow(sde, data), x.to(dtype), divergence=Exact(), solver=FixedGrid(64)
        ).log_prob.double()
        - data.log_prob(x.double(), sde, sde.t_min)
        for dtype in (torch.float32, torch.float64)
    }
    rms = {dtype: float(error.square().mean().sqrt()) for dtype, error in errors.items()}
    assert rms[torch.float32] < 1.2 * rms[torch.float64] + 1e-4


def test_attention_kernels_without_second_derivatives_are_left_aside():
    torch.manual_seed(0)
    project = torch.nn.Linear(4, 12)

    def score(x, t):
        q, k, v = project(x.reshape(len(x), 1, 6, 4)).chunk(3, -1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return -x + 0.1 * mixed.reshape(x.shape)

    flow, x = probability_flow(VPSDE(), score), torch.randn(3, 24, generator=seeded())
    exact = log_likelihood(flow, x, divergence=Exact(), solver=FixedGrid(32))
    probed = log_likelihood(
        flow, x, divergence=Hutchinson(64), solver=FixedGrid(32), generator=seeded()
    )
    assert bool(
        ((exact.log_prob - probed.log_prob).abs() < 5 * probed.standard_error + 1e-3).all()
    )
    point = x.clone().requires_grad_()
    smooth = log_likelihood(
        flow, point, divergence=Exact(), solver=FixedGrid(8, halve=False), differentiable=True
    )
    assert bool(torch.isfinite(torch.autograd.grad(smooth.log_prob.sum(), point)[0]).all())


def test_one_sample_and_few_nodes_are_enough():
    sde, data = VPSDE(), vectors()
    for probes in (Hutchinson(1), Hutchinson(2), Exact()):
        result = log_likelihood(
            exact_flow(sde, data), noised(data, sde, 1), solver=FixedGrid(8), divergence=probes
        )
        assert result.log_prob.shape == (1,) and bool(result.total_error.isfinite().all())
    assert replace(result, nfe=0).nfe == 0


@pytest.mark.parametrize(("nodes", "fine"), [(24, False), (79, False), (80, True)])
def test_few_nodes_are_predicted_at_the_order_of_the_corrector_and_many_at_one_less(nodes, fine):
    """Seen in where the network is asked: at the predicted states of the rule."""
    sde, data = VPSDE(), correlated()
    x = noised(data, sde, 3).double()
    seen = []

    def watched(x, t):
        seen.append(x.detach())
        return data.score(sde)(x, t)

    flow = probability_flow(sde, watched)
    solver = FixedGrid(nodes, halve=False)
    log_likelihood(flow, x, divergence=Exact(), solver=solver)
    asked = [x for x in seen if len(x) == 3][:nodes]  # the pilot follows 16
    clock = Pilot.of(flow, x, Exact()).nodes(nodes)
    levels, wanted = flow.level_at(clock).rows(), []

    def rate(i, z):
        wanted.append(flow.scale(levels[i]) * z)
        return exact_flow(sde, data).scaled_velocity(z, levels[i])

    Adams(clock, 4, fine).solve(rate, x / flow.scale(levels[0]))
    assert_close(torch.stack(asked), torch.stack(wanted), rtol=1e-12, atol=1e-12)
