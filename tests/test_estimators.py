"""What stands beside the likelihood of a test set: other dequantizations, and other estimators."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_evaluation import (
    SLANTED,
    Analytic,
    gaussian_model,
    levels_data,
    model_of,
    slanted_model,
    vectors,
)

from experiment.dequantizer import dequantizer
from experiment.estimators import bound_times, estimate, show_estimates
from experiment.evaluation import evaluate
from experiment.ledger import append_evaluation, keep_bounds
from experiment.report import write_report
from experiment.settings import Likelihood
from likelihood import Exact, FixedGrid, Hutchinson
from sde_lib import VPSDE, probability_flow
from sde_lib.oracles import Gaussian

SETTINGS = Likelihood(solver=FixedGrid(32, halve=False), divergence=Exact(), batch_size=500)
DATA = levels_data(60)


def true_bits(data):
    """-log2 of the mass of each bin under N(0, SLANTED), a dimension, by importance sampling."""
    density = Gaussian(torch.zeros(3), covariance=SLANTED)
    u = torch.rand(4000, 1, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    points = (-1 + 0.5 * (data.test + u)).reshape(-1, 3)
    mass = density.log_prob(points).reshape(4000, -1).logsumexp(0) - math.log(4000)
    return -(mass + 3 * math.log(0.5)) / (3 * math.log(2))


@pytest.mark.parametrize("kind", ["uniform", "truncated_normal", "variational"])
def test_every_dequantization_bounds_the_code_length_and_weights_tighten_it(kind, tmp_path):
    model, truth = slanted_model(), float(true_bits(DATA).mean())
    settings = replace(SETTINGS, dequantization=kind, draws=16)
    made = dequantizer(settings, DATA, model, tmp_path, "7", seed=0, steps=60)
    plain = evaluate(model, DATA, settings, seed=0, dequantization=made)
    weighed = evaluate(
        model, DATA, replace(settings, importance=True), seed=0, dequantization=made
    )
    slack = 5 * plain.dequantization_error + 2e-3
    assert plain.value > truth - slack
    # the bins are wider than the data: every bound of one draw is loose here
    assert plain.value < truth + {"truncated_normal": 1.2}.get(kind, 0.6)
    assert truth - slack < weighed.value < plain.value
    assert weighed.value - truth < 0.5 * (plain.value - truth) + slack
    assert 1 < weighed.effective_draws <= 16 and math.isnan(plain.effective_draws)
    assert plain.dequantization_error > 0


def test_a_variational_dequantization_is_fitted_once_and_found_again(tmp_path, capsys):
    model, settings = slanted_model(), replace(SETTINGS, dequantization="variational")
    first = dequantizer(settings, DATA, model, tmp_path, "7", seed=0, steps=5)
    again = dequantizer(settings, DATA, model, tmp_path, "7", seed=0, steps=5)
    assert capsys.readouterr().out.count("fitting") == 1
    for name, value in first.flow_module.state_dict().items():
        assert torch.equal(value, again.flow_module.state_dict()[name])
    assert dequantizer(SETTINGS, DATA, model, tmp_path, "7", seed=0) is None
    assert (
        dequantizer(settings, vectors(), gaussian_model(vectors()), tmp_path, "7", seed=0) is None
    )
    with pytest.raises(ValueError, match="fitted first"):
        evaluate(model, DATA, settings, seed=0)


def test_three_estimators_agree_on_a_gaussian_and_come_in_order(tmp_path, capsys):
    data = vectors(200)
    model, settings = gaussian_model(data), replace(SETTINGS, bounds=60)
    ode = evaluate(model, data, settings, seed=0)
    found = estimate(model, data, settings, ode, seed=0)
    values = {name: value for name, (value, _) in found.values.items()}
    assert values["probability-flow ODE"] == pytest.approx(ode.value)
    # the exact score: the ELBO is tight up to its own noise, the bound in T steps is not
    assert values["ELBO"] == pytest.approx(ode.value, abs=0.15)
    assert values["VLB, posterior variance"] > values["VLB, analytic variance"] > ode.value - 0.1
    assert "out of order" not in found.order and "ELBO - VLB" in found.order
    assert found.curve.rate[0] < found.curve.rate[-1]
    assert found.curve.distortion[0] > 5 * found.curve.distortion[-1]
    show_estimates(found)
    assert "T = 60" in capsys.readouterr().out
    kept = np.load(keep_bounds(tmp_path / "likelihood-7-abcdef.npz", found))
    assert kept.zip.filename.endswith("bounds-7-abcdef-T60.npz") and kept["metric"] == "nll"
    for name, (value, error) in found.values.items():
        assert kept[name].mean() == pytest.approx(value), name
        assert kept[name].std(ddof=1) / 200**0.5 == pytest.approx(error), name
    append_evaluation(tmp_path, ode, 7, model, data, settings, "step-00000007.pt", found)
    (row,) = json.loads((tmp_path / "likelihood.json").read_text())
    assert row["bounds"]["values"]["ELBO"][0] == pytest.approx(values["ELBO"])
    page = write_report(tmp_path).read_text()
    assert "Three estimates" in page and "Where the bits are" in page
    for picture in ("information", "rate-distortion"):
        assert (tmp_path / "figures" / f"{picture}.png").stat().st_size > 5000


class CentresNoise(Analytic):
    """For levels that are all as likely, at the centres of their bins."""

    def noise(self, y, rho):
        centres = -1 + 0.5 * (torch.arange(4, dtype=torch.float64) + 0.5)
        near = (-0.5 * ((y[..., None] - centres) / rho[..., None]) ** 2).softmax(-1)
        return (y - near @ centres) / rho


def test_a_model_of_bin_centres_has_its_three_estimates_at_the_centres():
    model = model_of(CentresNoise())
    settings = replace(SETTINGS, dequantization="truncated_normal", bounds=100)
    data = levels_data(200)
    ode = evaluate(model, data, settings, seed=0)
    found = estimate(model, data, settings, ode, seed=0)
    for name, (value, error) in found.values.items():
        # two bits: four levels that are all as likely. Steps cost something, the more the coarser
        wide = 0.12 if name.startswith("VLB") else 0.02
        assert 2 - 4 * error - 0.01 < value < 2 + 4 * error + wide, name
    assert "out of order" not in found.order


def test_bounds_of_hours_say_so_after_their_first_batch(monkeypatch, capsys):
    monkeypatch.setattr("experiment.evaluation.LONG", 0.0)
    settings = replace(SETTINGS, bounds=4, batch_size=20)
    model = slanted_model()
    ode = evaluate(model, DATA, replace(settings, batch_size=500), seed=0)
    assert capsys.readouterr().out == ""
    estimate(model, DATA, settings, ode, seed=0)
    assert capsys.readouterr().out.startswith("bounds of 60 samples: about 0 minutes from here")


def test_levels_start_at_noise_of_half_a_bin():
    flow = probability_flow(VPSDE(), lambda x, t: -x)
    times = bound_times(flow, levels_data(4), 10)
    ratio = VPSDE().level(times[0]).noise_ratio
    assert float(ratio) == pytest.approx(0.5 / 2, rel=1e-6)
    assert float(bound_times(flow, vectors(), 10)[0]) == pytest.approx(VPSDE().t_min, rel=1e-6)


def test_the_curve_is_in_units_of_levels_and_every_variance_is_its_own():
    model, settings = slanted_model(), replace(SETTINGS, bounds=12)
    ode = evaluate(model, DATA, settings, seed=0)
    found = estimate(model, DATA, settings, ode, seed=0)
    names = ["VLB, posterior variance", "VLB, forward variance", "VLB, analytic variance"]
    assert len({round(found.values[name][0], 6) for name in names}) == 3
    # nothing known: the distance of levels from their mean, in levels
    levels = DATA.test.double()
    spread = float((levels - levels.mean()).square().mean().sqrt())
    assert float(found.curve.distortion[0]) == pytest.approx(spread, rel=0.15)


def test_the_bound_in_steps_of_levels_is_above_the_code_length():
    model, settings = slanted_model(), replace(SETTINGS, bounds=60)
    ode = evaluate(model, DATA, settings, seed=0)
    found = estimate(model, DATA, settings, ode, seed=0)
    truth = float(true_bits(DATA).mean())
    for name, (value, error) in found.values.items():
        assert value > truth - 5 * error, name


@pytest.mark.parametrize(
    "choice, words",
    [
        ({"dequantization": "flow"}, ["dequantization", "truncated_normal", "'flow'"]),
        ({"importance": True}, ["draws >= 2", "draws=1"]),
        ({"bounds": 1}, ["bounds", ">= 2"]),
    ],
)
def test_settings_out_of_range_are_refused(choice, words):
    with pytest.raises(ValueError) as caught:
        Likelihood(**choice)
    for word in words:
        assert word in str(caught.value)


def test_noise_of_the_probes_does_not_lift_the_weighed_bound():
    model, data = slanted_model(), levels_data(400)
    exact = replace(SETTINGS, draws=6, importance=True)
    probed = replace(exact, divergence=Hutchinson(2), solver=FixedGrid(32, fresh=False))
    truth, found = (evaluate(model, data, s, seed=0) for s in (exact, probed))
    gap = found.per_sample - truth.per_sample  # the same draws: the probes are what differs
    per_draw = found.probe_error * (found.num_samples * found.effective_draws) ** 0.5
    bias = 0.5 * (1 - 1 / 6) * (per_draw * 3 * math.log(2)) ** 2 / (3 * math.log(2))
    error = float(gap.std()) / len(gap) ** 0.5
    assert bias > 6 * error, "without the correction it would be seen"
    assert abs(float(gap.mean())) < 5 * error + 0.3 * bias


def test_the_probe_error_of_weighed_draws_is_that_of_those_that_count():
    probed = replace(SETTINGS, divergence=Hutchinson(2), draws=8)
    plain = evaluate(slanted_model(), DATA, probed, seed=0)
    weighed = evaluate(slanted_model(), DATA, replace(probed, importance=True), seed=0)
    ratio = (weighed.errors["probe_error"] / plain.errors["probe_error"]).square()
    wanted = 8 / weighed.errors["effective_draws"]  # of draws whose probes are alike
    assert float((ratio / wanted).median()) == pytest.approx(1, abs=0.3)
