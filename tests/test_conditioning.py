"""Conditions: what they are, how they are left out, and who is told when they do not fit."""

import pytest
import torch
from torch.testing import assert_close

from score_models import Classes, Vector
from score_models.checks import randomise
from score_models.networks import MLP

DROPPED = torch.tensor([True, False, True])
LABELS, ROWS = torch.tensor([0, 1, 2]), torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])


@pytest.mark.parametrize("spec, cond", [(Classes(3), LABELS), (Vector(2), ROWS)])
def test_dropping_puts_the_null_in_the_rows_that_are_named(spec, cond):
    got = spec.drop(cond, DROPPED)
    null = spec.null(3)
    assert_close(got[DROPPED], null[DROPPED], equal_nan=True)
    assert torch.equal(got[~DROPPED], cond[~DROPPED])
    assert spec.check("a test", null, 3) is null
    assert got.dtype == cond.dtype


@pytest.mark.parametrize("spec, cond", [(Classes(3), LABELS), (Vector(2), ROWS)])
def test_the_null_has_an_embedding_of_its_own_that_is_trained_without_nan(spec, cond):
    embedding = randomise(spec.embedding(4))
    dropped = embedding(spec.drop(cond, DROPPED))
    assert torch.equal(dropped[0], dropped[2])
    assert torch.equal(dropped[1], embedding(cond)[1])
    assert not torch.equal(dropped[0], embedding(cond)[0])
    gradients = torch.autograd.grad(dropped.sum(), list(embedding.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert all(float(g.abs().max()) > 0 for g in gradients), "values and null are both trained"


def test_an_embedding_of_a_vector_that_is_partly_missing_is_not_hidden():
    embedding = Vector(2).embedding(4)
    assert bool(embedding(torch.tensor([[1.0, torch.nan]])).isnan().all())


@pytest.mark.parametrize(
    "cond, match",
    [
        (None, r"is conditional and needs cond.*got none.*network\.cond\.null"),
        (LABELS.float(), r"int64 \[3\].*got float32 \[3\].*\.long\(\)"),
        (LABELS[:1], r"got int64 \[1\].*expand"),
        (torch.tensor([0, 4, 1]), r"0 \.\. 2, or 3 for none; got 0 to 4"),
        (torch.tensor([0, -1, 1]), "got -1 to 1"),
    ],
)
def test_classes_that_do_not_fit_are_refused(cond, match):
    network = MLP((2,), 8, 1, cond=Classes(3))
    with pytest.raises(ValueError, match=match):
        network(torch.zeros(3, 2), torch.zeros(3), cond)


@pytest.mark.parametrize(
    "cond, match",
    [
        (ROWS.long(), r"floating point \[3, 2\].*got int64 \[3, 2\].*\.float\(\)"),
        (ROWS[:, :1], r"got float32 \[3, 1\]"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(cond, match):
    network = MLP((2,), 8, 1, cond=Vector(2))
    with pytest.raises(ValueError, match=match):
        network(torch.zeros(3, 2), torch.zeros(3), cond)


def test_specifications_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Classes needs count"):
        Classes(0)
    with pytest.raises(ValueError, match="Vector needs size"):
        Vector(1.5)
    assert Classes(1e1).count == 10


def test_a_network_can_be_mapped_over_conditions():
    network = randomise(MLP((2,), 8, 1, cond=Classes(3))).eval()
    x, level = torch.randn(3, 2), torch.zeros(3)
    mapped = torch.vmap(lambda x, level, cond: network(x[None], level[None], cond[None])[0])
    assert_close(mapped(x, level, LABELS), network(x, level, LABELS))
