"""Attention: the fused form has the values and all derivatives of the written-out one."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from likelihood import Exact
from score_models.networks import attention
from score_models.networks.attention import attend, written_out


def inputs(tokens, count=3):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, 2, 2, tokens, 4, dtype=torch.float64, generator=generator)
    return tuple(a.requires_grad_() for a in drawn)


@pytest.fixture(autouse=True)
def fused_from_the_first_token(monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 0)


def brute_force(q, k, v):
    """Each token by itself, from the definition."""
    rows = []
    for i in range(q.shape[-2]):
        weights = torch.exp((q[..., i : i + 1, :] * k).sum(-1) / q.shape[-1] ** 0.5)
        weights = weights / weights.sum(-1, keepdim=True)
        rows.append((weights[..., None] * v).sum(-2))
    return torch.stack(rows, dim=-2)


@pytest.mark.parametrize("form", [attend, written_out])
def test_attention_is_the_mean_of_the_values_with_softmax_weights(form):
    q, k, v = inputs(5)
    assert_close(form(q, k, v), brute_force(q, k, v))


def test_fused_derivatives_of_first_and_second_order_in_both_modes_are_right():
    arguments = inputs(3)
    assert gradcheck(attend, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(attend, arguments)


def test_forward_over_reverse_equals_that_of_the_written_out_form():
    q, k, v, dq, dk, dv = (a.detach() for a in inputs(6, 6))

    def second(form):
        def gradient(q, k, v):
            value, pullback = torch.func.vjp(form, q, k, v)
            return pullback(value.sin())

        return torch.func.jvp(gradient, (q, k, v), (dq, dk, dv))[1]

    for got, wanted in zip(second(attend), second(written_out), strict=True):
        assert_close(got, wanted)


def test_a_batch_of_batches_is_what_each_is():
    q, k, v = (torch.stack([a, 2 * a]).detach() for a in inputs(4))
    wanted = torch.stack([written_out(q[i], k[i], v[i]) for i in range(2)])
    assert_close(torch.vmap(attend)(q, k, v), wanted)
    wanted = torch.stack([written_out(q[i], k[0], v[i]) for i in range(2)])
    last = v.movedim(0, -1)
    assert_close(torch.vmap(attend, in_dims=(0, None, -1))(q, k[0], last), wanted)


def test_long_sequences_take_the_fused_kernel_unless_it_is_switched_off(monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention

    def counted(*arguments):
        calls.append(1)
        return fused(*arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q, k, v = inputs(4)
    value = attend(q, k, v)
    assert len(calls) == 1
    value.sum().backward()
    assert len(calls) == 2, "the backward pass computes the forward pass once more"
    with sdpa_kernel(SDPBackend.MATH):
        attend(q, k, v)
    attend(*(a.bfloat16() for a in (q, k, v)))
    monkeypatch.setattr(attention, "SHORT", 4)
    attend(q, k, v)
    assert len(calls) == 2


def test_an_exact_divergence_through_fused_attention_is_the_trace_of_the_jacobian():
    x = inputs(3)[0].detach()

    def field(x):
        return attend(x, x.sin(), x)

    exact = Exact()
    _, trace = exact(field, x, exact.probes(x)())
    jacobians = torch.autograd.functional.jacobian(lambda a: written_out(a, a.sin(), a), x)
    jacobians = torch.stack([jacobians[i, ..., i, :, :, :].reshape(24, 24) for i in range(2)])
    assert_close(trace[0], jacobians.diagonal(dim1=1, dim2=2).sum(1))
