"""Samplers: orders, exactness, moments, seeds and costs, each against a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sde_lib import SDE, VPSDE, BrownianPaths, Counted, DiscreteSDE, PerSample
from sde_lib.checks import check_sampler
from sde_lib.grids import Karras, Subsequence, UniformLogSNR, UniformTime
from sde_lib.oracles import GaussianMixture
from sde_lib.reverse_variance import PosteriorVariance
from sde_lib.samplers import (
    DDIM,
    DEIS,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    DPMSolverPP,
    EulerMaruyama,
    FixedODE,
    FlowAdams,
    Heun,
    Langevin,
    LangevinCorrector,
    NoPredictor,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    SamplingError,
    TorchSDE,
    UniPC,
)
from sde_lib.sde import Level

Make = Callable[[int], Sampler]
SeededGenerator = Callable[[int], torch.Generator]

FLOW = {
    "ddim": DDIM,
    "heun": Heun,
    "euler": partial(EulerMaruyama, eta=0.0, grid=UniformLogSNR()),
    "deis": DEIS,
    "dpm_solver": DPMSolver,
    "dpm_solver_2": partial(DPMSolver, order=2),
    "dpmpp_2m": DPMSolverPP,
    "dpmpp_3m": partial(DPMSolverPP, order=3),
    "dpmpp_2s": partial(DPMSolver, order=2, prediction="data"),
    "unipc": UniPC,
    "unipc_noise": partial(UniPC, order=1, prediction="noise"),
    "flow_adams": FlowAdams,
}
STOCHASTIC = {
    "euler_maruyama": EulerMaruyama,
    "reverse_diffusion": ReverseDiffusion,
    "ancestral": Ancestral,
    "ancestral_half": partial(Ancestral, eta=0.5),
    "heun_churn": partial(Heun, churn=20.0),
    "deis_half": partial(DEIS, eta=0.5, order=2),
    "sde_dpmpp_2m": partial(DPMSolverPP, eta=1.0),
    "predictor_corrector": PredictorCorrector,
    "torchsde": TorchSDE,
}
LANGEVIN = {
    "annealed_langevin": partial(AnnealedLangevin, inner_steps=10, step_size=0.2),
    "corrector_only": partial(  # the same: 2 snr² = 0.2, but that it does not begin at t_max
        PredictorCorrector,
        predictor=NoPredictor(),
        corrector=LangevinCorrector(snr=math.sqrt(0.1)),
        corrections=10,
        grid=UniformLogSNR(),
    ),
}
ADAPTIVE = {"adaptive": lambda steps: AdaptiveODE()}
BY_STEPS = FLOW | STOCHASTIC | LANGEVIN


def of(samplers: dict[str, Make], name: str = "make") -> pytest.MarkDecorator:
    """Parametrize over the values of ``samplers``, named by their keys."""
    return pytest.mark.parametrize(name, samplers.values(), ids=samplers.keys())


@of({k: m for k, m in (FLOW | STOCHASTIC).items() if k != "euler"})
def test_every_sampler_conforms_on_every_process(make: Make, sde: SDE) -> None:
    check_sampler(make, sde, steps=100, bias=0.1)


@pytest.mark.parametrize(
    "make",
    [partial(Ancestral, eta=1.5), partial(ReverseDiffusion, eta=0.5)],
    ids=["ancestral_beyond", "reverse_diffusion_half"],
)
def test_any_amount_of_fresh_noise_conforms_on_every_process(make: Make, sde: SDE) -> None:
    check_sampler(partial(make, grid=UniformLogSNR()), sde, steps=400, bias=0.1)  # of first order


def test_euler_on_the_flow_conforms_on_every_process(sde: SDE) -> None:
    check_sampler(
        FLOW["euler"], sde, steps=400, bias=0.12
    )  # in t, the geometric sigma of VE costs it


@of(LANGEVIN)
def test_langevin_from_level_to_level_conforms_on_every_process(make: Make, sde: SDE) -> None:
    # frozen in: 1 / (10 inner steps * 0.2 * 5.5 levels a factor e of rho), 9 % on sub-VP
    check_sampler(make, sde, steps=100, bias=0.15)


def test_adaptive_solver_conforms_on_every_process(sde: SDE) -> None:
    check_sampler(ADAPTIVE["adaptive"], sde, bias=0.01, batch_tolerance=5e-3)


@of(FLOW | STOCHASTIC | ADAPTIVE)
def test_sampler_finds_both_modes_of_a_mixture(
    make: Make,
    mixture: GaussianMixture,
    seeded: SeededGenerator,
    assert_moments: Callable[..., None],
) -> None:
    sde, generator = VPSDE(), seeded(0)
    x = sde.prior_sample((4000, 2), generator=generator)

    x0 = make(100)(mixture.score(sde), sde, x, generator=generator)

    assert_moments(x0, mixture.mean(), mixture.variance(), bias=0.04)
    share = float(
        (x0[:, 0] > 0).double().mean()
    )  # of the right mode; the tails beyond 0 hold 1e-3
    assert abs(share - 0.7) < 5 * math.sqrt(0.21 / 4000) + 0.02


def zero(x: Tensor) -> Tensor:
    """No noise."""
    return torch.zeros_like(x)


def test_ancestral_on_a_ddpm_grid_draws_the_posterior_of_the_betas() -> None:
    """Ho et al. 2020, eq. 7, from the betas alone."""
    betas = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)
    sde = DiscreteSDE.from_betas(betas)
    alpha_bar = torch.cumprod(1 - betas, 0)
    x, x0_hat = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    plan = Ancestral(99, grid=Subsequence(UniformTime())).plan(sde)

    assert len(plan.moves) == 99
    for i, (move, now, nxt) in zip(range(99, 0, -1), plan, strict=True):  # level i + 1 -> level i

        def score(x: Tensor, t: Tensor, now: Level = now) -> Tensor:
            return (now.alpha * x0_hat - x) / now.sigma**2

        mean = move(score, x, now, nxt, partial(zero, x))
        fresh = move(score, x, now, nxt, partial(torch.ones_like, x)) - mean
        rest, before = 1 - alpha_bar[i], 1 - alpha_bar[i - 1]
        wanted = (
            alpha_bar[i - 1].sqrt() * betas[i] / rest * x0_hat
            + (1 - betas[i]).sqrt() * before / rest * x
        )
        assert_close(mean, wanted, rtol=1e-7, atol=1e-9)
        assert_close(fresh, (before / rest * betas[i]).sqrt().expand(6), rtol=1e-7, atol=1e-9)


def test_ancestral_of_eta_zero_is_ddim(sde: SDE, mixture: GaussianMixture) -> None:
    x = sde.prior_sample((16, 2), generator=torch.Generator().manual_seed(0))

    ddim = DDIM(20)(mixture.score(sde), sde, x)

    assert torch.equal(Ancestral(20, eta=0.0)(mixture.score(sde), sde, x), ddim)
    assert DDIM(20).stochastic is False


def test_ddim_is_euler_in_the_noise_ratio(sde: SDE, mixture: GaussianMixture) -> None:
    score, t = mixture.score(sde), torch.tensor([0.5, 0.4], dtype=torch.float64) * sde.t_max
    now, nxt = sde.level(t).rows()
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)

    eps_hat = -now.sigma * score(x, now.t)
    wanted = nxt.alpha * (
        x / now.alpha + (nxt.sigma / nxt.alpha - now.sigma / now.alpha) * eps_hat
    )

    assert_close(DDIM().step(score, x, now, nxt, None), wanted)


@of(FLOW)
def test_a_deterministic_sampler_draws_no_noise(make: Make, mixture: GaussianMixture) -> None:
    sde = VPSDE()
    x = sde.prior_sample((8, 2), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()

    first, second = (make(10)(mixture.score(sde), sde, x, generator=g) for g in (generator, None))

    assert torch.equal(first, second)
    assert torch.equal(generator.get_state(), before)
    assert make(10).stochastic is False


def test_corrections_of_zero_leave_the_predictor_alone(
    mixture: GaussianMixture, seeded: SeededGenerator
) -> None:
    sde = VPSDE()
    x, score = sde.prior_sample((8, 2), generator=seeded(0)), mixture.score(sde)

    corrected = PredictorCorrector(20, corrections=0)(score, sde, x, generator=seeded(1))

    assert torch.equal(corrected, ReverseDiffusion(20)(score, sde, x, generator=seeded(1)))


@of(FLOW | STOCHASTIC | LANGEVIN)
def test_sample_i_is_the_same_alone_and_in_a_batch_of_7_and_of_64(
    make: Make, mixture: GaussianMixture
) -> None:
    sde, results = VPSDE(), []
    for batch in (64, 7, 1):
        seeds = PerSample(range(batch))
        x = sde.prior_sample((batch, 2), generator=seeds)
        results.append(make(10)(mixture.score(sde), sde, x, generator=seeds))

    assert torch.equal(results[1], results[0][:7])
    assert torch.equal(results[2], results[0][:1])


@pytest.mark.parametrize(
    ("sampler", "nfe"),
    [
        (EulerMaruyama(10), 11),
        (ReverseDiffusion(10), 11),
        (Ancestral(10), 11),
        (DDIM(10), 11),
        (Heun(10), 21),
        (Heun(10, churn=5.0), 21),
        (Heun(10, denoise=False), 20),
        (PredictorCorrector(10), 21),
        (PredictorCorrector(10, corrections=3), 41),
        (PredictorCorrector(10, predictor=Heun()), 31),
        (PredictorCorrector(10, predictor=DPMSolverPP(eta=1.0)), 21),
        (DEIS(10), 11),
        (DPMSolver(9), 10),
        (DPMSolver(10), 11),
        (DPMSolver(11), 12),
        (DPMSolver(7, order=2), 8),
        (DPMSolverPP(10), 11),
        (UniPC(10), 11),
        (FlowAdams(10, grid=UniformLogSNR()), 11),
        (FlowAdams(10), 11 + 64),
        (AnnealedLangevin(10, inner_steps=5), 56),
        (Langevin(20), 21),
        (PredictorCorrector(10, predictor=NoPredictor(), corrections=3), 31),
        (TorchSDE(10), 12),
        (TorchSDE(10, method="heun"), 22),
        (TorchSDE(10, denoise=False), 11),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Sampler) else str(value),
)
def test_network_evaluations_are_what_the_docstring_says(
    sampler: Sampler, nfe: int, mixture: GaussianMixture, seeded: SeededGenerator
) -> None:
    sde, score = VPSDE(), Counted(mixture.score(VPSDE()))

    sampler(score, sde, sde.prior_sample((4, 2), generator=seeded(0)), generator=seeded(1))

    assert score.nfe == nfe


@of(BY_STEPS | ADAPTIVE)
def test_trajectory_runs_from_t_max_to_t_min_and_ends_in_the_result(
    make: Make, mixture: GaussianMixture, seeded: SeededGenerator
) -> None:
    sde = VPSDE()
    x, score = sde.prior_sample((4, 2), generator=seeded(0)), mixture.score(sde)

    with torch.no_grad():
        times, states = zip(*make(10).trajectory(score, sde, x, generator=seeded(1)), strict=True)

    assert times[0] == sde.t_max
    assert times[-1] == pytest.approx(sde.t_min, rel=1e-6)
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], make(10)(score, sde, x, generator=seeded(1)))


def test_the_end_is_denoised_unless_told_otherwise(sde: SDE, mixture: GaussianMixture) -> None:
    x = sde.prior_sample((4, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw, clean = (DDIM(10, denoise=choice)(mixture.score(sde), sde, x) for choice in (False, True))
    last = sde.level(torch.tensor(sde.t_min, dtype=torch.float64))

    assert_close(clean, last.denoised(raw, mixture.score(sde)(raw, last.t)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Heun(steps=0), "Heun needs steps to be a whole number >= 1; got steps=0"),
        (
            lambda: Ancestral(steps=2.5),
            "Ancestral needs steps to be a whole number >= 1; got steps=2.5",
        ),
        (lambda: TorchSDE(steps=-3), "TorchSDE needs steps to be a whole number >= 1"),
        (
            lambda: Ancestral(eta=math.inf),
            "Ancestral needs eta to be a finite number >= 0; got eta=inf",
        ),
        (lambda: DDIM(eta=-0.1), "DDIM needs eta"),
        (lambda: ReverseDiffusion(eta=-1.0), "ReverseDiffusion needs eta to be a finite number"),
        (lambda: EulerMaruyama(eta=-1.0), "EulerMaruyama needs eta to be a finite number >= 0"),
        (lambda: Heun(churn=-1.0), "Heun needs churn to be a finite number >= 0"),
        (
            lambda: LangevinCorrector(snr=0.0),
            "LangevinCorrector needs snr to be a finite number > 0 and < 0.7",
        ),
        (
            lambda: LangevinCorrector(scale="norm"),
            "LangevinCorrector needs scale to be one of batch, sample, sigma; got scale='norm'",
        ),
        (lambda: Langevin(0), "Langevin needs steps to be a whole number >= 1; got steps=0"),
        (lambda: Langevin(step_size=2.0), "step_size to be a finite number > 0 and < 2"),
        (lambda: Langevin(t=0.0), "Langevin needs t to be a finite number > 0"),
        (lambda: Langevin(t=2.0).check(VPSDE()), "between t_min=1e-05 and t_max=1 of VPSDE"),
        (lambda: AnnealedLangevin(step_size=2.0), "step_size to be a finite number > 0 and < 2"),
        (lambda: AnnealedLangevin(inner_steps=0), "inner_steps to be a whole number >= 1"),
        (lambda: PredictorCorrector(corrections=-1), "corrections to be a whole number >= 0"),
        (
            lambda: AdaptiveODE(rtol=0.0),
            "AdaptiveODE needs rtol to be a finite number >= 1e-12 and < 1; got rtol=0",
        ),
        (lambda: AdaptiveODE(atol=-1e-5), "AdaptiveODE needs atol to be"),
        (lambda: AdaptiveODE(rtol=1e-20), "AdaptiveODE needs rtol to be"),
        (
            lambda: AdaptiveODE(method="rk45"),
            "method to be one of adaptive_heun, bosh3, dopri5, .*got method='rk45'",
        ),
        (
            lambda: TorchSDE(method="rk4"),
            "TorchSDE needs method to be one of euler, .*; got method='rk4'",
        ),
        (lambda: TorchSDE(eta=0.0), "TorchSDE needs eta to be a finite number > 0"),
        (lambda: DDIM(grid=Karras), "DDIM needs a grid, .*got grid=<class"),
        (lambda: Ancestral(variance=PosteriorVariance), "needs variance to be one of"),
        (lambda: Ancestral(variance=[1]), "needs variance to be one of"),
        (lambda: PredictorCorrector(predictor=AdaptiveODE()), "and AdaptiveODE does not"),
        (lambda: PredictorCorrector(predictor=Langevin()), "and Langevin does not"),
        (lambda: PredictorCorrector(corrector=None), "needs a corrector with a step"),
        (lambda: Heun(grid=3), "Heun needs a grid, .*got grid=3"),
        (lambda: FlowAdams(grid=3), "FlowAdams needs a grid, .*got grid=3"),
        (lambda: FlowAdams(0), "FlowAdams needs steps to be a whole number >= 1"),
        (lambda: DEIS(order=5), "DEIS has orders 1 to 4; got order=5"),
        (lambda: DEIS(eta=-1.0), "DEIS needs eta to be a finite number >= 0"),
        (lambda: DPMSolverPP(order=4), "DPMSolverPP has orders 1 to 3"),
        (lambda: DPMSolverPP(lower_order_final=1), "lower_order_final to be true or false"),
        (lambda: UniPC(prediction="v"), "prediction to be one of data, noise; got prediction='v'"),
        (lambda: UniPC(corrector="yes"), "corrector to be true or false"),
        (lambda: DPMSolver(order=4), "DPMSolver has orders 1 to 3"),
        (lambda: DPMSolver(10, lower_order_final=False), "multiple of the order 3; got steps=10"),
        (lambda: FlowAdams(order=5), "FlowAdams has orders 1 to 4"),
        (lambda: PredictorCorrector(predictor=UniPC()), "and UniPC does not"),
        (lambda: PredictorCorrector(predictor=DPMSolver()), "and DPMSolver does not"),
    ],
)
def test_impossible_samplers_are_refused_with_the_reason(
    build: Callable[[], Sampler], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_step_counts_may_be_written_as_people_write_them() -> None:
    assert Heun(steps=1e2).steps == 100


@of({k: BY_STEPS[k] for k in ("heun", "ancestral", "torchsde")} | ADAPTIVE)
def test_a_score_of_nan_ends_in_a_sentence(make: Make) -> None:
    x = torch.ones(2, 2)

    with pytest.raises(SamplingError, match="NaN"):
        make(5)(lambda x, t: x * math.nan, VPSDE(), x)


@of({k: BY_STEPS[k] for k in ("ddim", "heun", "unipc", "flow_adams", "dpm_solver")})
def test_a_score_of_another_shape_is_refused_and_one_of_another_dtype_is_not(
    make: Make, mixture: GaussianMixture
) -> None:
    sde, x = VPSDE(), VPSDE().prior_sample((4, 2), generator=torch.Generator().manual_seed(0))
    score = mixture.score(sde)
    for wrong, got in ((lambda x, t: score(x, t)[:, :1], ", 1"), (lambda x, t: None, "NoneType")):
        with pytest.raises(ValueError, match="in the shape of x, .*; got .*" + got):
            make(5)(wrong, sde, x)
    other = make(5)(lambda x, t: score(x.double(), t), sde, x)
    assert other.dtype == torch.float32
    assert_close(other, make(5)(score, sde, x), rtol=1e-3, atol=1e-4)


@of({k: BY_STEPS[k] for k in ("ddim", "heun_churn", "unipc", "ancestral")})
def test_a_score_that_breaks_on_the_way_is_found_at_its_step(
    make: Make, mixture: GaussianMixture, seeded: SeededGenerator
) -> None:
    sde, score = VPSDE(), mixture.score(VPSDE())
    sampler = make(10)
    levels = sampler.levels(sde)
    third = float(levels.t[3])

    def breaking(x: Tensor, t: Tensor) -> Tensor:
        broken = torch.zeros_like(x)
        broken[1, 0] = math.nan if float(t) == third else 0.0
        return score(x, t) + broken

    x = sde.prior_sample((4, 2), generator=seeded(0))
    with pytest.raises(SamplingError, match="1 of 4 samples") as caught:
        sampler(breaking, sde, x, generator=seeded(1))
    step = int(str(caught.value).split("first at step ")[1].split(",")[0])
    assert levels.t[step - 1] >= third >= levels.t[step]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: the loop's waits cannot be seen"
)
@pytest.mark.parametrize("paths", [False, True], ids=["generator", "paths"])
@of({k: m for k, m in BY_STEPS.items() if k != "torchsde"})
def test_a_fixed_step_loop_never_waits_for_the_gpu(make: Make, paths: bool) -> None:
    device = torch.device("cuda")
    sde, generator = VPSDE(), torch.Generator(device).manual_seed(0)
    generator = BrownianPaths(range(64), device) if paths else generator
    x = sde.prior_sample((64, 8), generator=generator, device=device)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -x  # of unit-variance data

    sampler = make(20).fitted(score, sde, x)
    moves = sampler.trajectory(score, sde, x, generator=generator)
    next(moves)  # the levels have moved to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _, x in moves:  # noqa: B007, B020
                pass
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert bool(torch.isfinite(x).all())


def _times(*values: float) -> Callable[[SDE, int], Tensor]:
    return lambda sde, steps: torch.tensor(values)


@pytest.mark.parametrize(
    ("grid", "got"),
    [
        (_times(0.1, 0.3, 0.6, 1.0), "Got 0.1, 0.3, 0.6, 1"),
        (_times(2.0, 0.5, 0.2, 0.1), "Got 2, 0.5, 0.2, 0.1"),
        (_times(1.0, 0.5, 0.2, -1.0), "Got 1, 0.5, 0.2, -1"),
        (_times(0.5, 0.5, 0.5, 0.5), "Got 0.5, 0.5"),
        (_times(1.0, math.nan, 0.2, 0.1), "Got 1, nan, 0.2, 0.1"),
        (_times(1.0, 0.5), r"Got \(2,\)"),
        (lambda sde, steps: [1.0, 0.5, 0.2, 0.1], "Got list"),
    ],
)
@pytest.mark.parametrize("make", [DDIM, FlowAdams, DPMSolverPP, PredictorCorrector])
def test_grids_that_do_not_fall_from_noise_to_data_are_refused(make, grid, got) -> None:  # noqa: ANN001
    sampler, x = make(3, grid), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=f"strictly decrease from t_max=1 to .*{got}"):
        sampler(lambda x, t: -x, VPSDE(), x)
    with pytest.raises(ValueError, match="strictly decrease"):
        sampler.check(VPSDE())


@pytest.mark.parametrize("make", [AdaptiveODE, FixedODE, TorchSDE, DDIM, FlowAdams, AdaptiveSDE])
@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda x, t: x[:, :1], r"in the shape of x, \((4|32), 2\); got \((4|32), 1\)"),
        (lambda x, t: x[:1], r"in the shape of x, \((4|32), 2\); got \(1, 2\)"),
        (
            lambda x, t: torch.complex(x, x),
            "must return real floating-point numbers",
        ),
        (lambda x, t: x.long(), "must return real floating-point numbers; got torch.int64"),
        (lambda x, t: (x, x), "got tuple"),
    ],
)
def test_scores_of_another_shape_or_kind_are_refused(make, score, message) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        make()(score, VPSDE(), torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("make", [DDIM, Ancestral, AdaptiveSDE, TorchSDE])
@pytest.mark.parametrize(
    ("sde", "x", "generator", "message"),
    [
        (VPSDE(), torch.zeros(4, 2), 3, "needs generator to be a torch.Generator, a PerSample or"),
        (VPSDE(), torch.zeros(4, 2), PerSample([1, 2]), "got 2 seeds for a batch of 4"),
        (VPSDE(), torch.zeros(2, 2), PerSample([1, 2, 3]), "got 3 seeds for a batch of 2"),
        (VPSDE, torch.zeros(4, 2), None, "needs a process, such as VPSDE"),
        (lambda x, t: x, torch.zeros(4, 2), None, "needs a process, such as VPSDE"),
        (VPSDE(), torch.zeros(4, 2).long(), None, "floating-point numbers, as sde.prior_sample"),
        (VPSDE(), torch.tensor(1.0), None, r"starts from samples \[B, ...\]"),
        (VPSDE(), torch.zeros(0, 2), None, r"starts from samples \[B, ...\]"),
        (VPSDE(), [1.0], None, "got list"),
    ],
)
def test_a_start_that_is_none_is_refused(make, sde, x, generator, message) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        make()(lambda x, t: -x, sde, x, generator=generator)


def test_a_start_that_is_not_finite_is_told_as_such() -> None:
    with pytest.raises(SamplingError, match="the samples that it starts from are not finite"):
        DDIM(3)(lambda x, t: -x, VPSDE(), torch.full((2, 2), math.nan))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("eta", [3.0, 20.0, 50.0])
def test_much_fresh_noise_replaces_the_noise_and_nothing_else(order: int, eta: float) -> None:
    """With the data at one point the denoised data are constant, and each step is exact."""
    sde, point = VPSDE(), torch.tensor([1.0, -2.0], dtype=torch.float64)
    x = sde.prior_sample((5, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -(x - sde.alpha(t) * point) / sde.sigma(t) ** 2

    t_min = torch.tensor(sde.t_min, dtype=torch.float64)
    for steps in (1, 5, 20):
        sampler = DPMSolverPP(steps, order=order, eta=eta, denoise=False)
        noise = (sampler(score, sde, x) - sde.alpha(t_min) * point) / sde.sigma(t_min)
        assert float(noise.abs().max()) < 6  # all of it fresh, and normal
