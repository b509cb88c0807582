"""The likelihood of a test set under models of known density: number, error and units."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from experiment.data import Dataset
from experiment.evaluation import Evaluation, evaluate, show
from experiment.ledger import append_evaluation, evaluated, keep_samples, newest
from experiment.seeds import sample_streams
from experiment.settings import Likelihood, units_of
from likelihood import Adaptive, Exact, FixedGrid, Hutchinson, Pixel, log_likelihood
from score_models import Noise, ScoreModel
from sde_lib import EDMSDE, VPSDE, probability_flow
from sde_lib.oracles import Gaussian
from sde_lib.samplers import SamplingError
from sde_lib.sde import expand_like


class Analytic(nn.Module):
    """A network under ``Noise(data_std=1)`` that returns E[eps | y] exactly, y = x0 + rho eps."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))  # a model has parameters, and they a device

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        rho = expand_like(noise_level.double().exp(), x)
        y = x.double() * (rho**2 + 1).sqrt()  # undo c_in
        return self.noise(y, rho).to(x)

    def noise(self, y: Tensor, rho: Tensor) -> Tensor:
        raise NotImplementedError


class GaussianNoise(Analytic):
    """For data N(mean, covariance) in model units."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.mean = mean.double()
        self.variances, self.axes = torch.linalg.eigh(covariance.double())

    def noise(self, y: Tensor, rho: Tensor) -> Tensor:
        along = (y - self.mean).flatten(1) @ self.axes
        return (rho * along / (self.variances + rho**2) @ self.axes.mT).reshape(y.shape)


class UniformNoise(Analytic):
    """For data uniform in [-1, 1]: the noised density is a difference of two normal integrals."""

    def noise(self, y: Tensor, rho: Tensor) -> Tensor:
        ends = torch.stack([1 - y.abs(), -1 - y.abs()]) / rho  # odd in y; here nothing cancels
        upper, lower = torch.exp(-0.5 * ends**2) / math.sqrt(2 * math.pi)
        first, last = torch.special.ndtr(ends)
        return y.sign() * (upper - lower) / (first - last)


def model_of(network: Analytic, sde=None) -> ScoreModel:
    return ScoreModel(network, sde or VPSDE(), Noise(data_std=1.0)).eval()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


COVARIANCE = torch.tensor([[4.0, 1.2, 0.0], [1.2, 1.0, 0.1], [0.0, 0.1, 0.05]])
SOURCE = Gaussian(torch.tensor([5.0, -2.0, 0.3]), covariance=COVARIANCE)


def vectors(count: int = 24) -> Dataset:
    """Data of a known Gaussian, far from standardised."""
    train = SOURCE.sample(2000, generator=generator(0))
    test = SOURCE.sample(count, generator=generator(1))
    return Dataset("vectors", train, test)


def gaussian_model(data: Dataset, sde=None) -> ScoreModel:
    """The exact model of ``SOURCE``, stated in the model units of ``data``."""
    units = data.units
    mean = (SOURCE.mean.float() - units.shift) / units.scale
    return model_of(GaussianNoise(mean, COVARIANCE / units.scale / units.scale[:, None]), sde)


TIGHT = Likelihood(divergence=Exact(), solver=FixedGrid(192))


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(sigma_min=1e-3, sigma_max=200.0)], ids=repr)
def test_nll_of_each_sample_equals_its_closed_form_in_data_units(sde):
    data = vectors()
    result = evaluate(gaussian_model(data, sde), data, TIGHT, seed=0)
    truth = -SOURCE.log_prob(data.test.double())
    # what is left: the prior leaves out alpha² / sigma² < 5e-5 at t_max, and sigma² = 1e-6 is
    # added at t_min; times variances below 2 and squared deviations below 20
    assert result.metric == "nll" and result.num_samples == 24
    assert_close(result.per_sample, truth, rtol=0, atol=2e-3)
    assert result.value == pytest.approx(float(truth.mean()), abs=1e-4)


def test_nll_counts_the_volume_of_the_units():
    data = vectors()
    scaled = Dataset("scaled", data.train * 1000, data.test * 1000)
    here, there = (
        evaluate(gaussian_model(data), which, TIGHT, seed=0).per_sample for which in (data, scaled)
    )
    assert_close(there - here, torch.full_like(here, 3 * math.log(1000)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", [8, 256])
def test_uniform_data_of_k_levels_score_log2_k_bits_per_dim(levels):
    values = torch.randint(levels, (50, 4), generator=generator(0))
    inner = torch.randint(1, levels - 1, (12, 4), generator=generator(1))  # noise at t_min
    data = Dataset("uniform", values, inner, levels=levels)  # softens the ends of the outer bins
    settings = replace(TIGHT, solver=FixedGrid(96))
    result = evaluate(model_of(UniformNoise()), data, settings, seed=0)
    assert result.metric == "bits_per_dim"
    truth = torch.full((12,), math.log2(levels), dtype=torch.float64)
    # left: alpha² / sigma² = 4e-5 of the prior; scores in float32
    assert_close(result.per_sample, truth, rtol=0, atol=1e-4)
    assert result.value == pytest.approx(math.log2(levels), abs=1e-4)


def levels_data(count: int, levels: int = 4) -> Dataset:
    values = torch.randint(levels, (count, 3), generator=generator(2))
    return Dataset("levels", values, values, levels=levels)


# of a correlated Gaussian: the divergence depends on the probes, the density on the dequantization
SLANTED = torch.tensor([[0.3, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.2]])


def slanted_model() -> ScoreModel:
    return model_of(GaussianNoise(torch.zeros(3), SLANTED))


def test_bits_per_dim_of_a_gaussian_model_are_the_mean_over_the_bins():
    data, draws = levels_data(8), 256
    settings = Likelihood(divergence=Exact(), draws=draws, batch_size=8)
    result = evaluate(slanted_model(), data, settings, seed=3)
    u = torch.rand(20_000, 1, 3, generator=generator(4), dtype=torch.float64)
    points = -1 + 0.5 * (data.test + u)
    model = Gaussian(torch.zeros(3), covariance=SLANTED)
    nats = -model.log_prob(points.reshape(-1, 3)).reshape(20_000, 8) - 3 * math.log(0.5)
    bits = nats / (3 * math.log(2))
    error = bits.std(0) * (1 / draws + 1 / 20_000) ** 0.5
    assert bool(((result.per_sample - bits.mean(0)).abs() < 5 * error + 1e-3).all())
    assert float(5 * error.max()) < float(bits.mean(0).std()), "samples are told apart"


def test_draws_of_a_sample_are_averaged_and_counted():
    data = levels_data(6)
    settings = Likelihood(divergence=Exact(), solver=FixedGrid(96), draws=3)
    averaged = evaluate(slanted_model(), data, settings, seed=1)
    repeated = replace(data, test=data.test.repeat_interleave(3, 0))
    single = evaluate(slanted_model(), repeated, replace(settings, draws=1), seed=1)

    each = single.per_sample.reshape(6, 3)
    assert float(each.std(1).min()) > 1e-2, "each draw is another point of the bin"
    assert_close(averaged.per_sample, each.mean(1), rtol=0, atol=1e-5)
    assert averaged.num_samples == 6 and averaged.nfe == 3 * single.nfe


@pytest.mark.parametrize(
    "choice",
    [
        {"draws": 5},
        {"draws": 2, "importance": True},
        {"dequantization": "truncated_normal"},
        {"dequantization": "variational"},
    ],
    ids=str,
)
def test_what_is_about_levels_is_refused_for_continuous_data(choice):
    data, settings = vectors(), Likelihood(divergence=Exact(), **choice)
    with pytest.raises(ValueError, match="is about data of K levels; vectors is continuous"):
        evaluate(gaussian_model(data), data, settings, seed=0)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_value_of_a_sample_does_not_depend_on_the_batch_size(batch_size):
    data = levels_data(11)
    settings = Likelihood(divergence=Hutchinson(), solver=FixedGrid(192), draws=2, batch_size=64)
    model = slanted_model()
    whole = evaluate(model, data, settings, seed=1)
    parts = evaluate(model, data, replace(settings, batch_size=batch_size), seed=1)
    other = evaluate(model, data, settings, seed=2)
    # equal but for the rounding of other batches
    assert_close(parts.per_sample, whole.per_sample, rtol=0, atol=1e-5)
    assert float((other.per_sample - whole.per_sample).abs().max()) > 1e-2


def test_an_evaluation_of_hours_says_so_after_its_first_batch(monkeypatch, capsys):
    data, settings = vectors(), Likelihood(divergence=Exact(), solver=FixedGrid(16), batch_size=6)
    evaluate(gaussian_model(data), data, settings, seed=0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("experiment.evaluation.LONG", 0.0)
    evaluate(gaussian_model(data), data, settings, seed=0)
    said = capsys.readouterr().out
    assert said.startswith("likelihood of 24 samples: about 0 minutes from here; ")
    assert said.count("\n") == 1 and "likelihood.max_samples=N" in said


def test_the_first_samples_are_those_of_the_whole_test_set():
    data = levels_data(11)
    settings = Likelihood(divergence=Hutchinson(), solver=FixedGrid(192))
    whole = evaluate(slanted_model(), data, settings, seed=1)
    part = evaluate(slanted_model(), data, replace(settings, max_samples=4), seed=1)
    assert (whole.num_samples, part.num_samples) == (11, 4)
    assert_close(part.per_sample, whole.per_sample[:4], rtol=0, atol=1e-5)
    more = evaluate(slanted_model(), data, replace(settings, max_samples=100), seed=1)
    assert more.num_samples == 11


def test_value_and_standard_error_are_those_of_a_mean():
    data = vectors(24)
    result = evaluate(gaussian_model(data), data, Likelihood(divergence=Exact()), seed=0)
    values = result.per_sample.tolist()
    mean = sum(values) / 24
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 23)
    assert result.value == pytest.approx(mean, rel=1e-12)
    assert result.standard_error == pytest.approx(spread / math.sqrt(24), rel=1e-12)
    # the nll of a Gaussian is half a chi-square of 3 degrees of freedom and a constant: variance
    # 3 / 2, and the variance of N such has relative standard error sqrt((2 + 12 / 3) / N)
    variance = 24 * result.standard_error**2
    assert abs(variance / 1.5 - 1) < 5 * math.sqrt(6 / 24)


def test_the_probe_error_is_the_spread_around_the_exact_trace():
    data = levels_data(100)
    exact = Likelihood(divergence=Exact(), solver=FixedGrid(64), draws=4, batch_size=400)
    probed = replace(exact, divergence=Hutchinson(num_probes=4))
    truth = evaluate(slanted_model(), data, exact, seed=0)
    result = evaluate(slanted_model(), data, probed, seed=0)

    off = result.per_sample - truth.per_sample  # at the same dequantization: probes alone
    assert abs(result.value - truth.value) < 5 * result.probe_error
    measured, relative = off.square().mean() / 100, off.square().std() / off.square().mean()
    # four probes say more of their spread than one error does, hence the root of 2
    assert abs(result.probe_error**2 / measured - 1) < 5 * math.sqrt(2) * relative / math.sqrt(100)
    assert 0 < result.probe_error < result.standard_error
    assert truth.probe_error == 0


def test_a_single_probe_kept_along_the_path_does_not_know_its_error():
    settings = Likelihood(divergence=Hutchinson(num_probes=1), solver=FixedGrid(32, fresh=False))
    result = evaluate(slanted_model(), levels_data(4), settings, seed=0)
    assert math.isnan(result.probe_error) and result.standard_error > 0


def test_a_failed_sample_leaves_the_weighed_others_their_values():
    class Broken(GaussianNoise):
        def forward(self, x, noise_level, cond=None):
            return torch.where(first(x, noise_level), math.nan, super().forward(x, noise_level))

    def first(x, noise_level):  # two of the three draws of the first of two samples
        bad = (torch.arange(len(x)) < 2) & (len(x) == 6)
        return bad[:, None] & (noise_level.max() < -3)

    data = levels_data(4)
    settings = Likelihood(
        solver=FixedGrid(16), divergence=Exact(), draws=3, importance=True, batch_size=2
    )
    whole = evaluate(slanted_model(), data, settings, seed=0)
    with pytest.raises(SamplingError, match="not finite") as caught:
        evaluate(model_of(Broken(torch.zeros(3), SLANTED)), data, settings, seed=0)
    partial = caught.value.partial
    assert partial.isnan().tolist() == [True, False, True, False]
    assert_close(partial[1::2], whole.per_sample[1::2], rtol=0, atol=1e-6)


def test_weights_of_noise_that_nobody_knows_are_refused_and_large_noise_is_told(capsys):
    data = levels_data(6)
    weighed = Likelihood(draws=2, importance=True, divergence=Hutchinson(1))
    with pytest.raises(ValueError, match=r"num_probes=2"):
        settings = replace(weighed, solver=FixedGrid(16, fresh=False))
        evaluate(slanted_model(), data, settings, seed=0)
    noisy = replace(
        weighed, divergence=Hutchinson(1, "gaussian", Pixel()), solver=FixedGrid(8, halve=False)
    )
    for settings, loud in ((noisy, True), (replace(noisy, divergence=Exact()), False)):
        show(evaluate(slanted_model(), data, settings, seed=0), data, "here")
        said = capsys.readouterr().out
        assert ("too noisy for importance weights" in said) is loud
        assert "of the draws 1." in said


def test_the_start_of_a_truncated_normal_leaves_no_truncation_and_is_noted(tmp_path):
    data, model = levels_data(4), slanted_model()
    settings = Likelihood(
        solver=FixedGrid(32), divergence=Exact(), dequantization="truncated_normal"
    )
    found = evaluate(model, data, settings, seed=0)
    assert math.isnan(found.truncation) and math.isfinite(found.prior_mismatch)
    append_evaluation(tmp_path, found, 1, model, data, settings, "step-1.pt")
    (row,) = json.loads((tmp_path / "likelihood.json").read_text())
    start = units_of(data, settings, None).start_time(model.sde)
    assert f"t = {start:.4g}, where the noise fills the bins" in row["note"]
    with pytest.raises(ValueError, match=r"training\.dequantize=false"):
        settings.check(data, on_centres=False)
    settings.check(data, on_centres=True)


def test_errors_of_each_sample_keep_their_sign_and_the_unit_of_the_metric():
    data = levels_data(3)
    settings = Likelihood(solver=FixedGrid(48), divergence=Exact())
    found = evaluate(slanted_model(), data, settings, seed=3)
    units, sde = data.units, slanted_model().sde
    streams = sample_streams(3, "likelihood", range(3), torch.device("cpu"))
    drawn = units.draw(data.test, streams)
    flow = probability_flow(sde, slanted_model().score)
    result = log_likelihood(flow, drawn.x, solver=FixedGrid(48), divergence=Exact())
    nat = 1 / (3 * math.log(2))
    for name, sign in (("truncation", -1), ("prior_mismatch", -1), ("solver_error", 1)):
        wanted = sign * nat * getattr(result, name).double()
        assert_close(found.errors[name], wanted, rtol=1e-3, atol=1e-9)
    clock, information = found.information
    assert_close(information, nat * result.information().T.double(), rtol=1e-4, atol=1e-6)
    assert_close(clock, result.clock)


def test_a_budget_is_in_the_unit_of_the_metric(capsys):
    data = levels_data(12)
    settings = Likelihood(divergence=Hutchinson(2, basis=Pixel()), budget=0.1)
    found = evaluate(slanted_model(), data, settings, seed=0)
    assert "0.1 bits/dim (0.208 nats) a sample" in capsys.readouterr().out
    assert found.pilot_nfe > 33 * 16  # the trial as well
    error = torch.hypot(found.errors["probe_error"], found.errors["solver_error"])
    assert float(error.median()) < 0.1
    broken = model_of(UniformNoise())
    broken.network.noise = lambda y, rho: y * math.nan
    with pytest.raises(ValueError, match=r"likelihood\.budget, 0.1 bits/dim .* not finite"):
        evaluate(broken, data, settings, seed=0)
    with pytest.raises(ValueError, match=r"likelihood\.budget, 1e-12 bits/dim .* out of reach"):
        evaluate(slanted_model(), data, replace(settings, budget=1e-12), seed=0)


def test_evaluations_are_counted_over_unequal_batches():
    class Counted(GaussianNoise):
        rows = 0

        def forward(self, x, noise_level, cond=None):
            self.rows += len(x)
            return super().forward(x, noise_level, cond)

    network = Counted(torch.zeros(3), SLANTED)
    settings = Likelihood(divergence=Exact(), batch_size=4, draws=2)
    result = evaluate(model_of(network), levels_data(10), settings, seed=0)
    assert result.nfe * 10 + result.pilot_nfe == network.rows and result.nfe == 2 * (64 + 33)


@pytest.mark.parametrize(
    "choice, words",
    [
        ({"batch_size": 0}, ["batch_size", "whole number >= 1", "batch_size=0"]),
        ({"batch_size": 1.5}, ["batch_size", "whole number", "1.5"]),
        ({"draws": 0}, ["draws", ">= 1"]),
        ({"basis": "fourier"}, ["basis", "principal", "'fourier'"]),
        ({"budget": 0.0}, ["budget", "> 0"]),
        ({"max_samples": 1}, ["max_samples", ">= 2", "max_samples=1"]),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_when_they_are_made(choice, words):
    with pytest.raises(ValueError) as caught:
        Likelihood(**choice)
    for word in ["likelihood needs", *words]:
        assert word in str(caught.value)


def test_counts_may_be_written_1e3():
    settings = Likelihood(batch_size=1e3, draws=2.0, max_samples=1e2)
    assert (settings.batch_size, settings.draws, settings.max_samples) == (1000, 2, 100)
    assert all(isinstance(n, int) for n in (settings.batch_size, settings.max_samples))


def test_rows_of_the_file_are_added_and_say_how_to_repeat_them(tmp_path):
    per_sample = torch.tensor([3.0, 4.0])
    result = Evaluation("bits_per_dim", 3.5, 0.5, math.nan, 2, 64.0, 1.5, per_sample)
    assert str(result) == "3.5000 ± 0.5000 bits/dim"
    assert str(replace(result, metric="nll")) == "3.5000 ± 0.5000 nats"
    assert result.as_metrics() == {
        "eval/bits_per_dim": 3.5,
        "eval/bits_per_dim_stderr": 0.5,
        "eval/nfe": 64.0,
    }
    model, settings = slanted_model(), Likelihood(draws=3, solver=Adaptive(1e-3, 1e-4))
    for data, iteration in ((levels_data(4), 7), (vectors(4), 8)):
        append_evaluation(tmp_path, result, iteration, model, data, settings, "step-7.pt")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "likelihood.json").read_text()
    first, second = json.loads(text, parse_constant=refuse)
    assert (first["value"], first["standard_error"], first["probe_error"]) == (3.5, 0.5, None)
    assert (first["iteration"], second["iteration"]) == (7, 8)
    assert first["sde"] == repr(model.sde) and first["checkpoint"] == "step-7.pt"
    assert "3 draw" in first["dequantization"] and "continuous" in second["dequantization"]
    assert "rtol=0.001, atol=0.0001" in first["settings"] and "t_min = 1e-05" in first["note"]
    assert "per_sample" not in first


def test_a_run_is_scored_by_its_own_checkpoint_on_enough_samples(tmp_path):
    def add(samples, checkpoint, iteration=7):
        result = Evaluation("nll", 3.5, 0.5, 0.0, samples, 64.0, 1.5, torch.zeros(samples))
        arguments = (iteration, slanted_model(), vectors(4), Likelihood(), checkpoint)
        append_evaluation(tmp_path, result, *arguments)

    assert not evaluated(tmp_path, 7, 2)
    add(2, "step-00000007.pt")
    assert evaluated(tmp_path, 7, 2) and not evaluated(tmp_path, 7, 4)
    add(4, "/elsewhere/checkpoints/step-00000007.pt")
    assert not evaluated(tmp_path, 7, 4), "another run's"
    add(4, "step-00000007.pt")
    assert evaluated(tmp_path, 7, 4) and not evaluated(tmp_path, 8, 4)


def test_the_newest_result_of_a_run_comes_with_its_caveat(tmp_path):
    result = Evaluation("nll", 3.5, 0.5, 0.0, 2, 64.0, 1.5, torch.zeros(2))
    arguments = (7, slanted_model(), vectors(4), Likelihood(), "step-00000007.pt")
    assert newest(tmp_path) is None
    append_evaluation(tmp_path, result, *arguments)
    assert newest(tmp_path) == "3.5000 ± 0.5000 nats"
    append_evaluation(tmp_path, result, *arguments, caveat="of one level")
    assert newest(tmp_path) == "3.5000 ± 0.5000 nats; of one level"


@pytest.mark.parametrize(
    "solver", [FixedGrid(16), Adaptive(1e-3, 1e-3)], ids=["fixed", "adaptive"]
)
def test_samples_that_fail_leave_the_others_their_values(solver):
    class Broken(GaussianNoise):
        def noise(self, y, rho):
            far = (y.abs().amax(1, keepdim=True) > 50) & (rho < 1)
            return torch.where(far, math.nan, super().noise(y, rho))

    data = vectors(6)
    units = data.units
    mean = (SOURCE.mean.float() - units.shift) / units.scale
    broken = model_of(Broken(mean, COVARIANCE / units.scale / units.scale[:, None]))
    test = data.test.clone()
    test[4] += 1e4
    settings = Likelihood(solver=solver, divergence=Exact(), batch_size=2)
    with pytest.raises(SamplingError) as caught:
        evaluate(broken, replace(data, test=test), settings, seed=0)
    whole = evaluate(gaussian_model(data), data, settings, seed=0).per_sample
    lost = caught.value.partial.isnan()
    assert lost.nonzero().flatten().tolist() == [4]  # and not its batch mate
    assert_close(caught.value.partial[~lost], whole[~lost], rtol=0, atol=1e-3)


def test_what_nobody_measured_is_not_called_zero(tmp_path):
    settings = Likelihood(solver=FixedGrid(16, halve=False), divergence=Exact())
    result = evaluate(slanted_model(), levels_data(4), settings, seed=0)
    assert math.isnan(result.solver_error) and math.isnan(result.dequantization_error)
    assert result.as_row()["solver_error"] is None


def test_evaluations_of_other_settings_are_kept_beside_each_other(tmp_path):
    data, model = levels_data(4), slanted_model()
    kept = []
    for nodes in (16, 24):
        settings = Likelihood(solver=FixedGrid(nodes), divergence=Exact())
        result = evaluate(model, data, settings, seed=0)
        kept.append(keep_samples(tmp_path, result, "00000007", 0))
    assert kept[0] != kept[1]
    with np.load(kept[1]) as content:
        assert_close(torch.from_numpy(content["bits_per_dim"]), result.per_sample)
        assert_close(torch.from_numpy(content["solver_error"]), result.errors["solver_error"])
        assert content["information"].shape == (4, 24) and content["clock"].shape == (24,)
    assert keep_samples(tmp_path, result, "00000007", 0) == kept[1]
