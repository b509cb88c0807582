"""Exponential integrators: against the formulas of their papers, written out, and each other."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_sampler_orders import gaussian_moments, wanted_moments
from torch.testing import assert_close

from experiment.fitted import fitted
from score_models import EDM, ScoreModel
from score_models.networks import MLP
from sde_lib import SDE, VPSDE, Counted
from sde_lib.grids import FittedGrid, Grid, Karras, UniformLogSNR, UniformTime
from sde_lib.oracles import Gaussian, GaussianMixture
from sde_lib.samplers import (
    DDIM,
    DEIS,
    Ancestral,
    DPMSolver,
    DPMSolverPP,
    FlowAdams,
    PredictorCorrector,
    SamplingError,
    UniPC,
    fitted_grid,
)
from sde_lib.samplers.exponential import PREDICTIONS, polynomial_weights
from sde_lib.samplers.flow_adams import RULES, SAMPLES, SEED, _look
from sde_lib.samplers.remembered import remembered


def starts(sde: SDE, count: int = 16) -> torch.Tensor:
    """Prior samples in float64."""
    generator = torch.Generator().manual_seed(0)
    return sde.prior_sample((count, 2), generator=generator, dtype=torch.float64)


def levels_of(sde: SDE, steps: int) -> list[tuple[float, float, float, torch.Tensor]]:
    """alpha, sigma and lambda = log(alpha/sigma) of even steps in lambda, and t."""
    times = UniformLogSNR()(sde, steps)
    level = sde.level(times)
    lam = (level.alpha / level.sigma).log()
    columns = (level.alpha.tolist(), level.sigma.tolist(), lam.tolist(), times)
    return list(zip(*columns, strict=True))


def data_of(score, row, x):
    """x0_hat at a row of :func:`levels_of`."""
    alpha, sigma, _, t = row
    return (x + sigma**2 * score(x, t)) / alpha


@pytest.mark.parametrize(
    "sampler",
    [
        partial(DEIS, order=1),
        partial(DPMSolver, order=1),
        partial(DPMSolverPP, order=1),
        partial(DPMSolver, order=1, prediction="data"),
        partial(UniPC, order=1, corrector=False),
        partial(UniPC, order=1, corrector=False, prediction="noise"),
    ],
    ids=str,
)
def test_first_orders_are_ddim(sampler, sde: SDE, mixture: GaussianMixture) -> None:
    score, x = mixture.score(sde), starts(sde)
    assert_close(
        sampler(10)(score, sde, x),
        DDIM(10, grid=UniformLogSNR())(score, sde, x),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", PREDICTIONS)
def test_weights_integrate_polynomials_exactly_whatever_the_step(name: str, sde: SDE) -> None:
    prediction, times = PREDICTIONS[name], Karras()(sde, 6)
    now, nxt = (sde.level(times[part]) for part in (slice(2, 4), slice(3, 5)))
    u = sde.level(times).noise_ratio.log()
    nodes = torch.stack([u[[2, 1, 0]], u[[3, 2, 1]]])
    found = polynomial_weights(prediction, nodes, now, nxt)
    for i, (start, end) in enumerate(((u[2], u[3]), (u[3], u[4]))):
        fine = torch.linspace(float(start), float(end), 20001, dtype=torch.float64)
        to = type(nxt)(*(c[i] for c in nxt))
        weight = prediction.weight(fine, to, 0.0)
        for power in range(3):
            wanted = torch.trapezoid(weight * fine**power, fine)
            assert_close((found[i] * nodes[i] ** power).sum(), wanted, rtol=1e-6, atol=1e-9)


def test_dpmpp_2m_is_the_algorithm_of_its_paper(sde: SDE, mixture: GaussianMixture) -> None:
    """Lu et al. 2022b, algorithm 2."""
    score, x = mixture.score(sde), starts(sde)
    path = levels_of(sde, 8)
    ours = DPMSolverPP(8, lower_order_final=False, denoise=False)(score, sde, x)
    before = None
    for n, (row, nxt) in enumerate(pairwise(path)):
        h, data = nxt[2] - row[2], data_of(score, row, x)
        blend = data
        if n:
            r = (row[2] - path[n - 1][2]) / h
            blend = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
        x = nxt[1] / row[1] * x - nxt[0] * math.expm1(-h) * blend
        before = data
    assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_dpmpp_3m_is_the_formula_of_its_paper(sde: SDE, mixture: GaussianMixture) -> None:
    """The two differences of the last three data predictions, with phi_2 and phi_3."""
    score, x = mixture.score(sde), starts(sde)
    path = levels_of(sde, 9)
    ours = DPMSolverPP(9, order=3, lower_order_final=False, denoise=False)
    wanted = ours(score, sde, x)
    seen: list[torch.Tensor] = []
    for n, (row, nxt) in enumerate(pairwise(path)):
        h = nxt[2] - row[2]
        seen.append(data_of(score, row, x))
        phi_1 = -math.expm1(-h)
        phi_2 = 1 - phi_1 / h
        phi_3 = phi_2 / h - 0.5
        x = nxt[1] / row[1] * x + nxt[0] * phi_1 * seen[-1]
        if n == 1:
            r = (row[2] - path[n - 1][2]) / h
            x = x + nxt[0] * phi_1 * (seen[-1] - seen[-2]) / (2 * r)
        if n > 1:
            r0, r1 = (row[2] - path[n - 1][2]) / h, (path[n - 1][2] - path[n - 2][2]) / h
            d0, d1 = (seen[-1] - seen[-2]) / r0, (seen[-2] - seen[-3]) / r1
            first = d0 + r0 / (r0 + r1) * (d0 - d1)
            second = 2 * (d0 - d1) / (r0 + r1)  # in print without the 2, and of order 2
            x = x + nxt[0] * (phi_2 * first - phi_3 * second)
    assert_close(wanted, x, rtol=1e-8, atol=1e-8)


def test_dpm_solver_3_is_the_algorithm_of_its_paper(sde: SDE, mixture: GaussianMixture) -> None:
    """Lu et al. 2022a, algorithm 2, with r of 1/3 and 2/3."""
    score, x = mixture.score(sde), starts(sde)
    ours = DPMSolver(9, lower_order_final=False, denoise=False)(score, sde, x)

    def eps(row, x):
        return -row[1] * score(x, row[3])

    path = levels_of(sde, 9)
    for first, nxt in zip(path[:-1:3], path[3::3], strict=True):
        h = nxt[2] - first[2]
        inner = []
        for r in (1 / 3, 2 / 3):
            t = sde.time_at(torch.tensor(2 * (first[2] + r * h), dtype=torch.float64))
            level = sde.level(t)
            inner.append((float(level.alpha), float(level.sigma), first[2] + r * h, t))
        e0 = eps(first, x)
        one, two = inner
        u1 = one[0] / first[0] * x - one[1] * math.expm1(h / 3) * e0
        d1 = eps(one, u1) - e0
        bend = (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * 2
        u2 = two[0] / first[0] * x - two[1] * (math.expm1(2 * h / 3) * e0 + bend * d1)
        d2 = eps(two, u2) - e0
        bend = (math.expm1(h) / h - 1) * 1.5
        x = nxt[0] / first[0] * x - nxt[1] * (math.expm1(h) * e0 + bend * d2)
    assert_close(ours, x, rtol=1e-7, atol=1e-7)


def test_unipc_is_the_algorithm_of_its_paper(mixture: GaussianMixture) -> None:
    """Zhao et al. 2023, in the data prediction with B(h) = e^h - 1: the weights of the differences
    solve a Vandermonde system; with one difference both weights are set to 1/2."""
    sde, order = VPSDE(), 3
    score, x = mixture.score(sde), starts(sde)
    path = levels_of(sde, 9)
    ours = UniPC(9, order=order, denoise=False)(score, sde, x)

    def weights(ratios, h):
        if len(ratios) == 1:
            return [0.5]
        count, phi, b, factorial = len(ratios), -math.expm1(-h) / h, [], 1
        for k in range(1, count + 1):  # integrals of powers, in units of B
            phi = (1 - phi) / h if k == 1 else (1 / math.factorial(k) - phi) / h
            factorial *= k
            b.append(phi * factorial * h / -math.expm1(-h))
        rows = torch.tensor([[r**k for r in ratios] for k in range(count)], dtype=torch.float64)
        return torch.linalg.solve(rows, torch.tensor(b, dtype=torch.float64)).tolist()

    seen, base = [], x
    for n, row in enumerate(path[:-1]):
        seen.append(data_of(score, row, x))
        if n:
            p = min(order, n, 10 - n)
            last = path[n - 1]
            h = row[2] - last[2]
            ratios = [(path[n - 1 - k][2] - last[2]) / h for k in range(1, p)] + [1.0]
            points = [seen[n - 1 - k] for k in range(1, p)] + [seen[n]]
            bend = sum(
                w * (point - seen[n - 1]) / r
                for w, r, point in zip(weights(ratios, h), ratios, points, strict=True)
            )
            x = row[1] / last[1] * base - row[0] * math.expm1(-h) * (seen[n - 1] + bend)
        base, nxt = x, path[n + 1]
        p, h = min(order, n + 1, 9 - n), nxt[2] - row[2]
        ratios = [(path[n - k][2] - row[2]) / h for k in range(1, p)]
        bend = (
            sum(
                w * (seen[n - k] - seen[n]) / r
                for k, (w, r) in enumerate(zip(weights(ratios, h), ratios, strict=True), start=1)
            )
            if ratios
            else 0.0
        )
        x = nxt[1] / row[1] * x - nxt[0] * math.expm1(-h) * (seen[n] + bend)
    assert_close(ours, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_stochastic_data_prediction_is_exact_for_a_point_mass(
    sde: SDE, eta: float, steps: int
) -> None:
    """Whatever eta: x_0 is known, and what is left of the noise is as large as it should be."""
    point = Gaussian(0.7, 0.0)
    spread, paths = sde.prior_std() ** 2, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    for move, now, nxt in DPMSolverPP(steps, eta=eta).plan(sde):
        start = now.alpha * point.mean[0] + paths
        end = move(point.score(sde), start, now, nxt, lambda: paths.roll(1))
        assert_close(end[0], nxt.alpha * point.mean[0])
        spread = float(end[1] - end[0]) ** 2 * spread + float(end[2] - end[0]) ** 2
        assert spread == pytest.approx(float(nxt.sigma) ** 2, rel=1e-9)


def test_sde_dpmpp_is_more_accurate_than_ancestral_steps() -> None:
    """Mean and variance of Gaussian data at few steps, from the affine map of each."""
    sde, data, errors = VPSDE(), Gaussian(0.5, 0.8), {}
    wanted = wanted_moments(sde, data)[1]
    for sampler in (DPMSolverPP(20, order=2, eta=1.0), Ancestral(20, grid=UniformLogSNR())):
        errors[type(sampler).__name__] = abs(gaussian_moments(sampler, sde, data)[1] - wanted)
    assert errors["DPMSolverPP"] < 0.3 * errors["Ancestral"]


def test_a_corrected_state_is_one_evaluation_behind_and_costs_none(mixture) -> None:
    sde = VPSDE()
    score = Counted(mixture.score(sde))
    UniPC(12, denoise=False)(score, sde, starts(sde))
    assert score.nfe == 12


def test_a_corrector_of_langevin_moves_what_a_multistep_predictor_goes_on_from(mixture) -> None:
    sde, score, x = VPSDE(), mixture.score(VPSDE()), starts(VPSDE())
    generator = torch.Generator().manual_seed(1)
    multistep = PredictorCorrector(40, predictor=DPMSolverPP(), grid=UniformLogSNR())
    alone = PredictorCorrector(40, predictor=DPMSolverPP(), grid=UniformLogSNR(), corrections=0)
    assert_close(alone(score, sde, x), DPMSolverPP(40, lower_order_final=False)(score, sde, x))
    moved = multistep(score, sde, x, generator=generator)
    assert float((moved - alone(score, sde, x)).abs().mean()) > 0.05


def test_the_fitted_grid_is_dense_where_the_model_has_structure() -> None:
    sde = VPSDE()
    data = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.05)  # scales 0.05 to 1
    grid = fitted_grid(data.score(sde), sde, torch.zeros(1, 2, dtype=torch.float64))
    u = -0.5 * sde.log_snr(grid(sde, 200))
    inside = ((u > math.log(0.03)) & (u < math.log(2.0))).double().mean()
    even = (math.log(2.0) - math.log(0.03)) / float(u[0] - u[-1])
    assert float(inside) > 1.4 * even


def test_the_fitted_density_is_the_fourth_root_of_how_v_bends_along_exact_paths(sde: SDE) -> None:
    data = Gaussian(0.0, torch.tensor([0.7], dtype=torch.float64))
    found = fitted_grid(data.score(sde), sde, torch.zeros(1, 1, dtype=torch.float64))
    times = UniformLogSNR()(sde, 64)
    level = sde.level(times)
    rows = zip(times, level.rows(), strict=True)
    v = []
    for t, at in rows:  # of one path: all others are multiples of it
        x = data.push(sde, torch.ones(1, 1, dtype=torch.float64), t)
        score = data.score(sde)(x, t)
        norm = torch.hypot(at.alpha, at.sigma)
        v.append((at.alpha * at.noise(score) - at.sigma * at.denoised(x, score)) / norm)
    u, v = level.noise_ratio.log(), torch.stack(v)[:64].flatten()
    middle = (u[:61] + u[3:64]) / 2
    bend = v.diff(n=3).abs() * 0.5 / middle.cosh()
    near = torch.exp(-0.5 * ((u[:, None] - middle) / 0.8).square())
    wanted = (near * bend**0.25).sum(1) / near.sum(1)
    wanted = wanted / wanted.max() + 0.05
    # the pilot's own first steps, of lower order, leave a trace
    assert_close(torch.tensor(found.density).double(), wanted, rtol=0.02, atol=0.01)


def test_the_order_follows_the_number_of_steps_and_falls_where_nothing_comes_after() -> None:
    def orders(steps: int) -> list[int]:
        return FlowAdams(steps, grid=UniformLogSNR()).orders()

    assert orders(2) == [1, 1]
    assert orders(8) == [1, 2, 3, 3, 3, 3, 2, 1]
    assert orders(30) == [1, 2, *[3] * 27, 2]
    assert orders(50) == [1, 2, 3, *[4] * 45, 3, 2]
    assert orders(70) == [1, 2, 3, *[4] * 67]
    assert FlowAdams(9, order=4, grid=UniformLogSNR()).orders() == [1, 2, 3, *[4] * 6]


def test_a_grid_is_fitted_once_for_a_model_and_not_to_the_batch(mixture) -> None:
    sde, other = VPSDE(), VPSDE(beta_max=15.0)
    score = Counted(mixture.score(sde))
    sampler = FlowAdams(10)
    first = sampler(score, sde, starts(sde))
    assert score.nfe == 64 + 11
    assert torch.equal(sampler(score, sde, starts(sde)), first) and score.nfe == 64 + 22
    assert torch.equal(sampler(score, sde, starts(sde)[:3]), first[:3])
    sampler(score, other, starts(sde))
    assert score.nfe == 2 * 64 + 44, "another process asks for another grid"
    kept = sampler.fitted(score, sde, starts(sde))
    assert kept.fitted(score, sde, starts(sde)) is kept
    with pytest.raises(SamplingError, match="NaN"):
        FlowAdams(5)(lambda x, t: x * math.nan, sde, starts(sde))


def test_a_grid_stays_with_its_weights(tmp_path, mixture) -> None:
    @dataclass
    class Model:
        score: Counted
        sde: SDE

    sde = VPSDE()
    model = Model(Counted(mixture.score(sde)), sde)
    weights, other = tmp_path / "a.pt", tmp_path / "b.pt"
    weights.write_bytes(b"a")
    other.write_bytes(b"b")
    where = {"like": torch.zeros(1, 2), "folder": tmp_path}
    first = fitted(FlowAdams(), model, checkpoint=weights, **where)
    assert model.score.nfe == 64
    again = fitted(FlowAdams(), model, checkpoint=weights, **where)
    assert model.score.nfe == 64 and again.grid == first.grid
    fitted(FlowAdams(), model, checkpoint=other, **where)
    assert model.score.nfe == 128
    for file in tmp_path.glob("grid-*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "weights": "others"}))
    assert fitted(FlowAdams(), model, checkpoint=weights, **where).grid == first.grid
    assert model.score.nfe == 192
    asked = FlowAdams(grid=UniformTime())
    assert fitted(asked, model, checkpoint=weights, **where) is asked


def test_a_grid_is_fitted_anew_when_the_weights_have_changed() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.std = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def score(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            level = VPSDE().level(t)
            return -x / ((level.alpha * self.std) ** 2 + level.sigma**2)

    sde, network, sampler = VPSDE(), Network(), FlowAdams(10)
    before = sampler.fitted(network.score, sde, starts(sde)).grid
    assert sampler.fitted(network.score, sde, starts(sde)).grid is before
    with torch.no_grad():
        network.std.fill_(0.02)
    after = sampler.fitted(network.score, sde, starts(sde)).grid
    assert after != before
    assert after == FlowAdams().fitted(network.score, sde, starts(sde)).grid


def test_without_a_grid_there_is_no_plan_yet() -> None:
    with pytest.raises(ValueError, match="no grid yet; use the sampler that fitted"):
        FlowAdams().plan(VPSDE())
    FlowAdams().check(VPSDE())


def test_what_is_shown_of_a_fitted_sampler_is_short(mixture) -> None:
    sde = VPSDE()
    sampler = FlowAdams().fitted(mixture.score(sde), sde, starts(sde))
    assert len(repr(sampler)) < 150


@pytest.mark.parametrize(
    ("clock", "density"),
    [((1.0,), (1.0,)), ((0.0, 1.0), (1.0, 1.0)), ((1.0, 0.0), (1.0, 0.0)), ((1.0, 0.0), (1.0,))],
)
def test_an_impossible_density_is_refused(clock, density) -> None:
    with pytest.raises(ValueError, match="FittedGrid needs"):
        FittedGrid(clock, density)


def test_tables_are_remembered_for_what_cannot_change() -> None:
    calls = []

    def table(*args):
        calls.append(args)
        return len(calls)

    @dataclass
    class Changing:
        value: int = 0

    for _ in range(2):
        remembered(table, VPSDE(), 3)
    assert len(calls) == 1
    for _ in range(2):
        remembered(table, Changing(), 3)
    assert len(calls) == 3
    remembered(table, VPSDE(beta_max=10.0), 3)
    assert len(calls) == 4


def test_a_grid_that_changes_within_a_sampler_changes_what_it_does(mixture) -> None:
    class Bending(Grid):
        power = 7.0

        def times(self, sde: SDE, fractions: torch.Tensor) -> torch.Tensor:
            return Karras(self.power).times(sde, fractions)

    sde, grid = VPSDE(), Bending()
    sampler = DPMSolverPP(6, grid=grid)
    score = mixture.score(sde)
    first = sampler(score, sde, starts(sde))
    grid.power = 1.0
    wanted = DPMSolverPP(6, grid=Karras(1.0))(score, sde, starts(sde))
    assert_close(sampler(score, sde, starts(sde)), wanted)
    assert float((first - wanted).abs().max()) > 1e-3


def test_a_model_that_breaks_on_the_way_ends_the_pilot_in_a_sentence() -> None:
    sde = VPSDE()
    with pytest.raises(SamplingError, match="first at step"):
        FlowAdams(5)(lambda x, t: -x * (math.nan if t < 0.3 else 1), sde, starts(sde))


@pytest.mark.parametrize("sampler", [DEIS, DPMSolver, DPMSolverPP, UniPC, FlowAdams])
def test_tables_made_in_inference_mode_serve_outside_and_orders_may_be_floats(sampler) -> None:
    sde, made = VPSDE(beta_max=17.0), sampler(4, order=2.0)
    x = starts(sde)
    with torch.inference_mode():
        first = made(lambda x, t: -x, sde, x)

    @torch.enable_grad()
    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad((-0.5 * x.square() * (1 + 0 * t)).sum(), x)[0]

    assert_close(made(guided, sde, x), first.clone())


@pytest.mark.parametrize("steps", [4, 6])
def test_with_few_steps_the_rule_of_the_nearest_ends_is_taken(steps: int, mixture) -> None:
    sde, score = VPSDE(t_min=1e-3), mixture.score(VPSDE(t_min=1e-3))
    pilot = _look(score, sde, starts(sde), SAMPLES, SEED)

    asked = FlowAdams(steps, denoise=False)
    fit = asked.fit(score, sde, starts(sde))

    def error(rule: str) -> float:
        end = RULES[rule](asked, fit.grid)(score, sde, pilot.start)
        return float((end - pilot.end).square().mean())

    errors = {rule: error(rule) for rule in RULES}
    assert fit.rule == min(errors, key=errors.get)
    taken = asked.fitted(score, sde, starts(sde))
    assert taken.steps == steps and taken.denoise is False
    assert max(errors.values()) > 1.5 * errors[fit.rule], "there is something to choose"


@pytest.mark.parametrize(
    "asked", [FlowAdams(8), FlowAdams(5, order=3), FlowAdams(5, grid=UniformLogSNR())]
)
def test_no_rule_is_tried_with_more_steps_or_when_one_was_asked_for(asked, mixture) -> None:
    sde = VPSDE()
    counted = Counted(mixture.score(sde))

    found = asked.fitted(counted, sde, starts(sde))

    assert type(found) is FlowAdams and counted.nfe in (0, 64)


def test_the_rule_for_few_steps_is_kept_beside_the_grid(tmp_path: Path) -> None:
    model = ScoreModel(MLP((2,), width=8, blocks=1), VPSDE(), EDM(0.5)).requires_grad_(False)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"some")
    where = {"checkpoint": weights, "like": torch.zeros(1, 2), "folder": tmp_path / "fitted"}

    first = fitted(FlowAdams(5), model, **where)
    (file,) = (tmp_path / "fitted").glob("grid-05-*.json")
    written = file.stat().st_mtime_ns
    again = fitted(FlowAdams(5), model, **where)

    assert again == first and file.stat().st_mtime_ns == written
    file.write_text(file.read_text().replace('"rule": "', '"rule": "no '))
    assert fitted(FlowAdams(5), model, **where) == first, "a rule that is not there is found anew"
