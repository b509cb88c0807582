"""A condition for each row goes where its row goes: through samplers, likelihoods, wrappers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from known_classes import MEANS, NUMBERS, SDE, SHARES, STD, KnownClasses, components
from torch.testing import assert_close

from likelihood import Adaptive, Exact, FixedGrid, calibrate_variance, log_likelihood
from score_models import Classes, Vector, classifier_free, conditioned
from sde_lib import Counted, PerSample, probability_flow
from sde_lib.memory import in_halves
from sde_lib.rows import by_row, for_others, for_rows, innermost
from sde_lib.samplers import AdaptiveSDE, DPMSolverAdaptive, FlowAdams
from sde_lib.samplers.base import InShape

LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2])
X = MEANS[LABELS].double() + STD * torch.randn(
    7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)
T = torch.tensor(0.3, dtype=torch.float64)


@pytest.fixture
def model():
    return KnownClasses()


def test_a_likelihood_of_parts_of_a_batch_is_that_of_the_whole_and_of_the_class(model):
    score = conditioned(model.score, LABELS, others=NUMBERS)
    flow = probability_flow(SDE, score)
    how = {"solver": FixedGrid(48), "divergence": Exact()}

    whole = log_likelihood(flow, X, **how)
    parts = in_halves(
        lambda rows: log_likelihood(flow.for_rows(rows), X[rows.start : rows.stop], **how),
        range(7),
    )
    last = log_likelihood(flow.for_rows(torch.tensor([6, 6, 0])), X[[6, 6, 0]], **how)

    known = torch.cat([components()[c].log_prob(x[None]) for c, x in zip(LABELS, X, strict=True)])
    assert_close(whole.log_prob + whole.prior_mismatch, known, rtol=0, atol=1e-3)
    assert_close(torch.cat([part.log_prob for part in parts]), whole.log_prob)
    assert_close(last.log_prob, whole.log_prob[[6, 6, 0]])
    assert len(flow.memory) == 1, "one pilot"


def test_the_look_at_the_origin_is_under_the_condition_of_each_row_and_is_counted(model):
    how = {"solver": FixedGrid(24, halve=False), "divergence": Exact()}
    counted = Counted(conditioned(model.score, LABELS, others=NUMBERS))
    flow = probability_flow(SDE, counted)
    log_likelihood(flow, X, **how)
    before = counted.nfe

    whole = log_likelihood(flow, X, **how)

    alone = [log_likelihood(flow.for_rows(slice(i, i + 1)), X[i : i + 1], **how) for i in range(7)]
    assert_close(whole.prior_mismatch, torch.cat([one.prior_mismatch for one in alone]))
    assert whole.nfe == 25 and whole.pilot_nfe == 0
    assert alone[0].nfe == 24 and alone[0].pilot_nfe == 1
    assert counted.nfe - before == 25 * 8, "parts count in the same place"


def test_an_adaptive_likelihood_that_halves_its_batch_gives_each_half_its_own(model):
    def broken(x, t, cond):
        return torch.where((cond == 1)[:, None], torch.nan, model.score(x, t, cond))

    flow = probability_flow(SDE, conditioned(broken, LABELS))
    with pytest.raises(RuntimeError, match="2 of 7") as caught:
        log_likelihood(flow, X, solver=Adaptive(compare=False), divergence=Exact())

    partial, good = caught.value.partial, LABELS != 1
    found = partial.log_prob + partial.prior_mismatch
    known = torch.cat([components()[c].log_prob(x[None]) for c, x in zip(LABELS, X, strict=True)])
    assert bool(found[~good].isnan().all())
    assert_close(found[good], known[good], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "sampler", [DPMSolverAdaptive(rtol=1e-3, atol=1e-3), AdaptiveSDE(rtol=0.1)], ids=repr
)
@pytest.mark.parametrize("guided", [False, True])
def test_samples_that_have_arrived_take_their_condition_along(model, sampler, guided):
    def score(cond):
        return classifier_free(model, cond, 2.0) if guided else conditioned(model.score, cond)

    def drawn(sampler, rows):
        streams = PerSample([100 + i for i in rows])
        start = SDE.prior_sample((len(rows), 2), generator=streams, dtype=torch.float64)
        return sampler(score(LABELS[rows]), SDE, start, generator=streams)

    rows = list(range(7))
    found = drawn(sampler, rows)
    assert min(model.rows) < max(model.rows), "some have arrived before others"
    assert_close(found, drawn(replace(sampler, compact=False), rows))
    assert_close(found, torch.cat([drawn(sampler, [i]) for i in rows]))


@pytest.mark.parametrize("steps", [5, 12])
def test_the_pilot_of_a_sampler_sees_the_others_and_no_sample_its_mates(model, steps):
    def drawn(rows):
        score = conditioned(model.score, LABELS[rows], others=NUMBERS)
        start = SDE.prior_sample((len(rows), 2), generator=PerSample(rows), dtype=torch.float64)
        return FlowAdams(steps)(score, SDE, start)

    assert_close(drawn([0, 1, 2, 3, 4]), torch.cat([drawn([0, 1]), drawn([2, 3, 4])]))
    assert_close(drawn([2]), drawn([0, 1, 2])[2:])


@pytest.mark.parametrize(("scale", "wanted"), [(0.0, "all"), (1.0, "class")])
def test_guided_samples_follow_the_mixture_at_scale_0_and_the_class_at_scale_1(scale, wanted):
    model, n = KnownClasses(), 600
    start = SDE.prior_sample((n, 2), generator=torch.Generator().manual_seed(1))
    score = classifier_free(model, torch.tensor([1]), scale)

    x = FlowAdams(20)(score, SDE, start)

    plain = conditioned(model.score, torch.tensor([1 if scale else 3]))
    assert_close(x, FlowAdams(20)(plain, SDE, start), rtol=0, atol=1e-3)
    mean = SHARES @ MEANS if wanted == "all" else MEANS[1]
    between = SHARES @ (MEANS - mean).square() if wanted == "all" else torch.zeros(2)
    std = (STD**2 + between).sqrt()
    # the solver is off by hundredths of the spread
    assert bool(((x.mean(0) - mean).abs() < 5 * std / n**0.5 + 0.02 * std).all())


def test_the_calibration_of_a_batch_in_parts_is_that_of_the_whole(model):
    labels = LABELS.repeat(10)
    flow = probability_flow(SDE, conditioned(model.score, labels))
    found = [
        calibrate_variance(
            flow,
            X.repeat(10, 1),
            steps=4,
            generator=torch.Generator().manual_seed(0),
            batch_size=size,
        )
        for size in (70, 9)
    ]
    assert_close(found[0].unresolved, found[1].unresolved)


def test_wrappers_hold_of_rows_what_is_inside(model):
    score = conditioned(model.score, LABELS, others=NUMBERS)
    for wrapped in (InShape(score), Counted(InShape(score))):
        assert by_row(wrapped) and innermost(wrapped) == model.score
        some = torch.tensor([4, 2])
        assert_close(for_rows(wrapped, some)(X[some], T), model.score(X[some], T, LABELS[some]))
        others = for_others(wrapped, 5)(X[:5], T)
        assert_close(others, model.score(X[:5], T, torch.tensor([0, 1, 2, 0, 1])))


def test_what_treats_all_rows_alike_is_itself_for_any_of_them(model):
    one = conditioned(model.score, torch.tensor([1]))
    flow = probability_flow(SDE, one)
    assert for_rows(one, slice(0, 2)) is one and not by_row(one)
    assert flow.for_rows(range(3)) is flow
    plain = probability_flow(SDE, components()[0].score(SDE))
    assert plain.for_rows(range(3)) is plain and plain.for_others(4) is plain


def test_a_batch_of_another_size_than_the_conditions_is_refused(model):
    with pytest.raises(ValueError, match="each of 7 samples was given 3 samples; bind"):
        conditioned(model.score, LABELS)(X[:3], T)


@pytest.mark.parametrize("value", [1, [1], [0, 2, 1]])
def test_classes_are_read_as_numbers_are_written(value):
    listed = value if isinstance(value, list) else [value]
    assert Classes(3).read("cond", value).tolist() == listed


def test_vectors_are_read_as_numbers_are_written():
    assert_close(Vector(2).read("cond", [1, 2.5]), torch.tensor([[1, 2.5]]))
    assert_close(Vector(2).read("cond", [[0, 1], [2, 3]]), torch.tensor([[0.0, 1], [2, 3]]))


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        *((Classes(3), value) for value in (3, -1, True, 1.5, "dog", [], [0, 3], [[0]])),
        *((Vector(2), value) for value in (3, [1], [1, 2, 3], "x", [[1, 2], [3]], [1, None])),
        (Vector(2), [float("nan"), 1.0]),
    ],
    ids=repr,
)
def test_what_is_no_condition_is_told_with_what_would_be(spec, value):
    with pytest.raises(ValueError, match=r"cond takes a .*list of.*got"):
        spec.read("cond", value)


def test_there_is_no_end_of_vectors():
    with pytest.raises(ValueError, match="no end of vectors"):
        Vector(2).each("likelihood.cond=marginal")
    assert Vector(2).few(16) is None and Classes(30).few(16) is None
    assert Classes(3).few(16) == [0, 1, 2]
