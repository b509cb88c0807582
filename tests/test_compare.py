"""mode=compare: budgets that are counted, ends that are exact, one noise for all, what fails."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from test_conf import GROUPS, KNOWN, STD, compose, exact_model
from torch.testing import assert_close

import run as entry
from experiment import compare_figure
from experiment.bench import Asked, Bench
from experiment.chosen import Label
from experiment.compare import compare, measured, refuse_all
from experiment.compare_figure import TITLES, plot_comparison
from experiment.conditions import Conditions
from experiment.config import named, walk
from experiment.contenders import Trial, contenders, evaluations, spending, trials
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.run import Run
from experiment.sample import draw
from experiment.seeds import sample_paths
from experiment.trackers import NoTracker
from experiment.variants import named_grids
from sde_lib import VESDE, VPSDE, Counted, DiscreteSDE
from sde_lib.distances import energy_distance, median_bandwidths
from sde_lib.grids import Subsequence, UniformLogSNR
from sde_lib.oracles import Gaussian
from sde_lib.samplers import (
    DDIM,
    AdaptiveODE,
    Ancestral,
    DPMSolver,
    FlowAdams,
    Heun,
    LangevinCorrector,
    OneStepSampler,
)

SDE = VPSDE(t_min=1e-3)
ASKED = Asked(["heun"], [10], [1e-3], 60, 25, 16, 100)


@pytest.fixture
def bench(tmp_path):
    """The exact model of N(0, STD²) in three dimensions, and samples of that."""
    data = Gaussian(torch.zeros(3), STD)
    train, test = (data.sample(n, generator=torch.Generator().manual_seed(n)) for n in (60, 40))
    about = SimpleNamespace(
        seed=5, fitted=tmp_path / "fitted", average=Label(), device=lambda: torch.device("cpu")
    )
    (tmp_path / "weights.pt").write_bytes(b"these")
    return Bench(
        about,
        exact_model(SDE),
        tmp_path / "weights.pt",
        ASKED,
        Conditions(SimpleNamespace(cond=None), 5),
        train,
        test,
        median_bandwidths(test),
    )


@dataclass(frozen=True)
class Breaks(OneStepSampler):
    """Euler of some kind, not finite from ``limit`` steps on."""

    limit: int = 4
    stochastic = False

    def step(self, score, x, now, nxt, noise):
        moved = nxt.alpha / now.alpha * x + 0 * score(x, now.t)
        return moved / 0 if self.steps >= self.limit else moved


def by_steps(choice):
    return "steps" in named(entry.CONF, "sampler", choice)


@pytest.mark.parametrize("choice", filter(by_steps, GROUPS["sampler"]))
def test_steps_are_the_most_that_the_evaluations_buy(choice):
    sampler = entry.instantiate(named(entry.CONF, "sampler", choice))
    sampler = sampler.given(KNOWN).fitted(exact_model(SDE).score, SDE, torch.zeros(1, 3))

    def spent(steps):
        score = Counted(exact_model(SDE).score)
        x = torch.zeros(2, 3)
        replace(sampler, steps=steps)(score, SDE, x, generator=torch.Generator().manual_seed(0))
        return score.nfe

    found = spending(sampler, SDE, 23)

    assert spent(found.steps) <= 23 < spent(found.steps + 1)


def test_without_a_denoise_every_evaluation_is_a_step():
    assert spending(DDIM(denoise=False), SDE, 7).steps == 7


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=repr)
def test_evaluations_are_counted_as_the_sampler_spends_them(sde):
    for sampler, wanted in (
        (Heun(9), 19),
        (Heun(9, denoise=False), 18),
        (entry.instantiate(named(entry.CONF, "sampler", "annealed_langevin")), 1011),
        (entry.instantiate(named(entry.CONF, "sampler", "predictor_corrector")), 401),
    ):
        assert evaluations(sampler, sde) == wanted


def test_a_budget_below_one_step_says_what_a_step_costs_and_equal_ones_are_tried_once():
    found = trials("heun", Heun(), SDE, [2, 10, 11, 12], [1e-2])

    assert [(t.asked, getattr(t.sampler, "steps", t.refused)) for t in found] == [
        ("2 evaluations", "takes 3 evaluations at least"),
        ("10 evaluations", 4),
        ("11 evaluations", 5),
    ]


def test_a_sampler_without_steps_is_tried_at_each_tolerance():
    found = trials("adaptive", AdaptiveODE(), SDE, [5, 10], [1e-2, 1e-5])

    assert [(t.asked, t.sampler.rtol, t.sampler.atol) for t in found] == [
        ("tolerance 0.01", 1e-2, 1e-2),
        ("tolerance 1e-05", 1e-5, 1e-5),
    ]


@pytest.mark.parametrize("choice", GROUPS["sampler"])
def test_a_choice_read_off_its_file_is_the_one_that_is_composed(choice):
    assert named(entry.CONF, "sampler", choice) == compose(f"sampler={choice}")["sampler"]


def test_a_file_that_names_a_class_outside_the_project_is_refused(tmp_path):
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text("# mine\n_target_: os.system\ncommand: true\n")

    with pytest.raises(RunError, match="mine.yaml: _target_=os.system .* refused"):
        named(tmp_path, "sampler", "mine")


def test_the_reference_is_where_the_exact_flow_of_a_gaussian_ends(bench):
    streams = sample_paths(5, "samples", range(16))
    z = SDE.prior_sample((16, 3), generator=streams) / SDE.prior_std()
    data = Gaussian(torch.zeros(3, dtype=torch.float64), STD)
    # the prior has sigma(t_max), the marginal a little more: on one path with z scaled by it
    ratio = SDE.prior_std() / float(data.push(SDE, torch.ones(1, 3).double(), SDE.t_max)[0, 0])
    x, t = data.push(SDE, z.double() * ratio, SDE.t_min), torch.tensor(SDE.t_min).double()
    wanted = SDE.level(t).denoised(x, data.score(SDE)(x, t))

    found = bench.solved()

    assert float((found.truth - wanted).square().mean().sqrt()) < 1e-5  # of float32, 300 steps
    assert found.about_truth["samples"] == 16 and "steps=200" in found.about_truth["sampler"]
    assert found.about_truth["good_to"] < 1e-5


def test_an_endpoint_error_is_the_distance_from_the_reference_and_falls_at_the_order(bench):
    bench = bench.solved()
    rows = [bench.row(Trial("heun", "", Heun(n))) for n in (32, 64)]

    samples, _ = bench.draw(Heun(32), 60)
    by_hand = float((samples[:16] - bench.truth).double().square().mean().sqrt())
    errors = [row["endpoint_error"]["value"] for row in rows]
    assert errors[0] == pytest.approx(by_hand, rel=1e-6)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)


def test_numbers_of_steps_that_are_refused_are_passed_over():
    few = DiscreteSDE.linear_betas(num_levels=20)
    assert spending(DDIM(grid=Subsequence(), denoise=False), few, 40).steps == 19
    assert spending(DPMSolver(3, lower_order_final=False), VPSDE(), 11).steps == 9
    with pytest.raises(ValueError, match="multiple of the order 3"):
        spending(DPMSolver(3, lower_order_final=False), VPSDE(), 2)


def test_only_what_is_deterministic_has_an_endpoint_error(bench):
    bench = bench.solved()
    drawn, followed = (bench.row(Trial("", "", s)) for s in (Ancestral(8), DDIM(8)))

    assert drawn["stochastic"] and "endpoint_error" not in drawn
    assert not followed["stochastic"] and "endpoint_error" in followed


@pytest.mark.parametrize("sampler", [Heun(4), Ancestral(9)], ids=lambda s: type(s).__name__)
def test_samples_are_those_of_mode_sample_whatever_the_batch(bench, sampler):
    whole, nfe = bench.draw(sampler, 30)
    parts, _ = replace(bench, asked=replace(ASKED, batch_size=7)).draw(sampler, 30)
    streams = sample_paths(5, "samples", range(30))
    score = Counted(bench.model.score)
    drawn = draw(score, bench.model, sampler, (3,), streams)[-1].x

    assert torch.equal(whole, parts) and torch.equal(whole, drawn)
    assert nfe == score.nfe


def test_distances_are_from_the_test_set_and_the_floor_is_the_training_set(bench):
    row, about = bench.row(Trial("heun", "", Heun(20))), bench.about()

    samples, _ = bench.draw(Heun(20), 60)
    found = energy_distance(samples, bench.test)
    assert row["energy_distance"] == {"value": found.value, "low": found.low, "high": found.high}
    assert bench.distances(samples)["sliced_w2"] == row["sliced_w2"], "along the same directions"
    floor = energy_distance(bench.train, bench.test)
    assert about["floor"]["energy_distance"]["value"] == floor.value
    assert about["reference"] is None and about["num_samples"] == 60
    assert about["test_samples"] == 40


@pytest.mark.parametrize("dequantize", [True, False])
def test_levels_are_compared_as_the_model_was_trained_on_them(bench, dequantize):
    values = torch.arange(4).repeat(30)[:, None]
    about = SimpleNamespace(
        seed=0, device=bench.run.device, config={"training": {"dequantize": dequantize}}
    )
    asked = replace(ASKED, num_samples=50)

    made = Bench.of(about, bench.model, Dataset("levels", values, values, 4), bench.path, asked)

    centres = -1 + 0.5 * (values[:50] + 0.5)  # four bins from -1 to 1
    off = (made.test - centres).abs()
    assert float(off.max()) <= 0.25 + 1e-6 and made.train.shape == made.test.shape == (50, 1)
    assert (float(off.max()) > 0.1) == dequantize
    assert torch.equal(made.train, made.test) != dequantize, "noise of its own"


def test_a_sampler_that_fails_at_one_price_is_reported_and_the_others_go_on(
    bench, tmp_path, capsys
):
    planned = [Trial("breaks", f"{n} steps", Breaks(n)) for n in (2, 4)]
    planned += [Trial("none", "2 evaluations", None, "takes 9"), Trial("heun", "", Heun(3))]

    found = measured(bench, planned, {"seed": 5}, tmp_path / "compare" / "record.json")

    good, broken, never, last = found["results"]
    assert "energy_distance" in good and last["nfe"] == 7
    assert "60 samples are not finite" not in broken["failed"]  # of a batch, 25
    assert "25 of 25 samples are not finite at the end, first at step 1" in broken["failed"]
    assert never == {"sampler": "none", "asked": "2 evaluations", "failed": "takes 9"}
    assert json.loads((tmp_path / "compare" / "record.json").read_text()) == found
    shown = capsys.readouterr().out
    assert "breaks               failed at 4 steps" in shown and "heun" in shown


def test_if_every_sampler_fails_there_is_one_reason_given(bench, tmp_path):
    planned = [Trial("breaks", "4 steps", Breaks(4)), Trial("none", "1", None, "takes 9")]

    with pytest.raises(RunError, match="every sampler failed.*breaks at 4 steps: Breaks"):
        measured(bench, planned, {}, tmp_path / "record.json")
    assert len(json.loads((tmp_path / "record.json").read_text())["results"]) == 2


def test_a_model_that_breaks_costs_the_reference_and_what_looks_at_it_beforehand(bench, capsys):
    broken = exact_model(SDE)
    broken.network.weight.data.fill_(math.nan)
    bench = replace(bench, model=broken)

    assert bench.solved() is bench
    assert "no endpoint errors, for want of a reference" in capsys.readouterr().out
    pilot, heun = bench.planned({"flow_adams": FlowAdams(), "heun": Heun()})
    assert pilot.sampler is None and "32 of 32 samples are not finite" in pilot.refused
    assert heun.sampler == Heun(4)  # asked for 10 evaluations


def asking(*overrides, mode=()):
    """mode=compare of a composed configuration, up to the first refusal."""
    config = compose("mode=compare", *overrides, *mode)
    config["run"]["name"] = "none"
    given = Run(config, entry.instantiate, overrides, entry.CONF)
    given.build("mode")(given)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mode.samplers=[]"], r"list of samplers.*mode.samplers=\[flow_adams,heun\]; got \[\]"),
        (["mode.samplers=heun"], "list of samplers with one entry or more.*got 'heun'"),
        (
            ["mode.samplers=[heun,huen]"],
            r"unknown sampler 'huen'; choose one of heun, .*adaptive, .*unipc",
        ),
        (["mode.samplers=[heun,ddim,heun]"], "names heun more than once"),
        (["mode.samplers=['ddim eta']"], "'eta' in 'ddim eta' is no setting; write key=value"),
        (
            ["mode.samplers=['ddim etta=1']"],
            "'etta' cannot be set in 'ddim etta=1', since there is no such key; there are: "
            "eta, grid.",
        ),
        (
            ["mode.samplers=['corrector_only corrector=1']"],
            "no such key; there are: corrections, corrector.snr, corrector.scale, grid.",
        ),
        (["mode.samplers=['ddim steps=9']"], "since steps are what mode.nfe buys; there are: eta"),
        (["mode.samplers=['ddim denoise=no']"], "since every sampler ends denoised"),
        (["mode.samplers=['adaptive rtol=1']"], "are those of mode.tolerances; there are: method"),
        (["mode.samplers=['ddim _target_=os.system']"], "there is no such key"),
        (["mode.samplers=['ddim grid=karras']"], "unknown grid 'karras' .*choose of Karras, Qua"),
        (["mode.samplers=['ddim eta=[']"], r"'\[' in 'ddim eta=\[' is no YAML value"),
        (["mode.samplers=['ddim eta=-1']"], "eta.* >= 0"),
        (["mode.samplers=['ddim eta=1','ddim  eta=1']"], "names ddim eta=1 more than once"),
        (["mode.nfe=[]"], "list of nfe"),
        (["mode.nfe=[5,0]"], "each nfe to be a whole number >= 1; got each nfe=0"),
        (["mode.nfe=[5,7.5]"], "each nfe to be a whole number >= 1; got each nfe=7.5"),
        (["mode.tolerances=[2]"], "each of tolerances to be a finite number > 0 and < 1"),
        (["mode.num_samples=19"], "num_samples to be a whole number >= 20"),
        (["mode.num_samples=2000"], "num_samples=2000 .*digits has 1437; use mode.num_samples="),
        (["mode.endpoints=1"], "endpoints to be a whole number >= 2"),
        (["mode.reference_steps=9"], "reference_steps to be a whole number >= 10"),
        (["mode.batch_size=0"], "batch_size to be a whole number >= 1"),
        (["sampler=heun"], r"samplers=\['ddim eta=1'\]; leave out sampler=heun"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(overrides, words):
    with pytest.raises((RunError, ValueError), match=words):
        asking(*overrides)


def test_too_small_a_test_set_is_refused():
    data = SimpleNamespace(name="few", train=torch.zeros(500, 2), test=torch.zeros(19, 2))

    with pytest.raises(RunError, match="20 test samples or more.*few has 19"):
        ASKED.check(data)


def test_processes_of_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(RunError, match="mode=compare runs in one process; got 2"):
        asking()


def test_samplers_end_denoised_whatever_their_file_says(tmp_path):
    node = named(entry.CONF, "sampler", "heun") | {"denoise": False}
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "plain.yaml").write_text(yaml.safe_dump(node))
    given = SimpleNamespace(conf=tmp_path, instantiate=entry.instantiate)

    assert contenders(given, ["plain"])["plain"].denoise


def given(*entries):
    return contenders(SimpleNamespace(conf=entry.CONF, instantiate=entry.instantiate), entries)


def test_settings_after_a_name_are_those_of_the_command_line():
    entries = {
        "ddim": DDIM(50),
        "ddim eta=1": DDIM(50, eta=1.0),
        "ancestral variance=forward grid=UniformLogSNR": Ancestral(
            200, UniformLogSNR(), variance="forward"
        ),
        "flow_adams grid=null order=2": FlowAdams(20, order=2),
        "corrector_only corrector.snr=1e-1": replace(
            given("corrector_only")["corrector_only"], corrector=LangevinCorrector(snr=0.1)
        ),
    }

    assert given(*entries) == entries


@pytest.mark.parametrize("choice", GROUPS["sampler"])
def test_every_number_of_a_file_can_be_set_to_what_it_is(choice):
    node = named(entry.CONF, "sampler", choice)
    set_here = {"steps", "denoise"} | ({"rtol", "atol"} if "steps" not in node else set())
    words = [
        f"{key}={'null' if value is None else value}"
        for key, value in walk(node)
        if not isinstance(value, dict) and "_target_" not in key
        and not key.startswith("grid.") and key not in set_here
    ]  # fmt: skip

    (one,) = given(choice).values()
    (other,) = given(" ".join([choice, *words])).values()
    assert repr(one) == repr(other)


def test_a_grid_is_named_and_every_one_that_needs_nothing_can_be():
    assert named_grids() == ["Karras", "Quadratic", "Subsequence", "UniformLogSNR", "UniformTime"]
    for name in named_grids():
        (sampler,) = given(f"heun grid={name}").values()
        assert type(sampler.grid).__name__ == name


def test_variants_have_rows_of_their_own_with_their_grids(bench, tmp_path, capsys):
    label = "ancestral variance=forward grid=UniformLogSNR"
    planned = bench.planned(given("ddim", "ddim eta=1", label, "adaptive"))

    found = measured(bench, planned[:4], {}, tmp_path / "record.json")

    names = [row["sampler"] for row in found["results"]]
    assert names == ["ddim", "ddim eta=1", label, "adaptive"]
    grids = [row.get("grid") for row in found["results"]]
    assert grids == ["Karras(power=7.0)"] * 2 + ["UniformLogSNR()", None]
    lines = [line for line in capsys.readouterr().out.splitlines() if "±" in line][1:]
    assert len(lines) == 5 and len(set(map(len, lines))) == 1, "one table, the floor first"


def test_what_can_be_known_beforehand_is_refused_before_anything_is_drawn(bench, monkeypatch):
    monkeypatch.setattr(Bench, "draw", lambda *_: pytest.fail("drawn"))
    monkeypatch.setattr(FlowAdams, "fit", lambda *_: pytest.fail("a pilot"))

    with pytest.raises(RunError, match="needs the analytic variance of .*mode=calibrate"):
        bench.planned(given("flow_adams", "analytic_ddpm"))
    bench = replace(bench, asked=replace(ASKED, nfe=[1, 2]))
    heun, ddim = (bench.planned(given(name)) for name in ("heun", "ddim"))
    assert [trial.refused for trial in heun] == ["takes 3 evaluations at least"] * 2
    refuse_all([trial.refused for trial in heun + ddim])  # with two evaluations DDIM makes a step


def test_a_comparison_without_a_sampler_ends_before_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "solved", lambda _: pytest.fail("the reference"))
    normal = Gaussian(torch.zeros(3), STD)
    train, test = (normal.sample(n, generator=torch.Generator().manual_seed(n)) for n in (60, 40))
    run = SimpleNamespace(
        warn=lambda: None,
        overrides=(),
        conf=entry.CONF,
        instantiate=entry.instantiate,
        config={"run": {"name": "a"}, "training": {}},
        seed=0,
        path=tmp_path,
        fitted=tmp_path / "fitted",
        average=Label(),
        device=lambda: torch.device("cpu"),
        build={"data": Dataset("normal", train, test), "tracking": NoTracker()}.get,
    )
    (tmp_path / "weights.pt").write_bytes(b"these")
    run.trained = lambda: (run, exact_model(SDE), tmp_path / "weights.pt", 7)

    with pytest.raises(RunError, match="every sampler failed.*heun at 1 evaluations: takes 3"):
        compare(run, samplers=["heun"], nfe=[1], num_samples=40)


def test_a_record_is_complete_when_all_is_tried_and_not_before(bench, tmp_path, monkeypatch):
    planned = [Trial("heun", "", Heun(3)), Trial("ddim", "", DDIM(3))]
    record, row = tmp_path / "record.json", Bench.row

    def killed(self, trial):
        seen.append(json.loads(record.read_text()))
        if trial.name == "ddim":
            raise KeyboardInterrupt
        return row(self, trial)

    seen = []
    monkeypatch.setattr(Bench, "row", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(bench, planned, {}, record)
    assert [(one["complete"], len(one["results"])) for one in seen] == [(False, 0), (False, 1)]
    assert json.loads(record.read_text()) == seen[-1]

    monkeypatch.setattr(Bench, "row", row)
    assert measured(bench, planned, {}, record)["complete"]
    assert json.loads(record.read_text())["complete"]


def estimate(value):
    return {"value": value, "low": 0.8 * value, "high": 1.3 * value}


def found_of(*results):
    floor = {"value": 0.001, "low": -0.02, "high": 0.03}
    measures = {name: floor for name in TITLES if name != "endpoint_error"}
    return {"results": list(results), "floor": measures, "reference": {"good_to": 1e-9}}


def result(name, nfe, value, stochastic=False):
    measures = {measure: estimate(value) for measure in TITLES}
    if stochastic:
        measures.pop("endpoint_error")
    return {"sampler": name, "nfe": nfe, "stochastic": stochastic} | measures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn; they are not written."""
    figures = []

    @contextmanager
    def collect(path, width, height):
        figures.append(Figure(figsize=(width, height), layout="constrained"))
        yield figures[-1]

    monkeypatch.setattr(compare_figure, "new_figure", collect)
    return figures


def curves(axes):
    """Points of each sampler by colour, as (nfe, value), and whether the line is broken."""
    return {
        bars[0].get_color(): (bars[0].get_xydata().tolist(), bars[0].get_linestyle())
        for bars in axes.containers
    }


def test_the_figure_shows_each_measure_with_one_colour_a_sampler(drawn):
    rows = [result("b", 20, 0.3), result("a", 5, 0.5), result("b", 5, 2.0)]
    rows += [result("c", 9, 0.7, stochastic=True), {"sampler": "a", "asked": "", "failed": "x"}]

    plot_comparison(found_of(*rows), "nowhere.png")

    panels = drawn[0].axes
    assert [axes.get_title(loc) for axes in panels for loc in ("left", "center")].count("") == 4
    first, *others = (curves(axes) for axes in panels)
    assert len(first) == 2 and all(len(other) == 3 for other in others)
    for other in others:
        assert {colour: other[colour] for colour in first} == first
        (broken,) = (line for line in other.values() if line[1] == "--")
        assert broken[0] == [[pytest.approx(9, rel=0.05), 0.7]]
    (b, a) = (points for points, _ in first.values())
    assert b == [[pytest.approx(5, rel=0.05), 2.0], [pytest.approx(20, rel=0.05), 0.3]]
    assert a == [[pytest.approx(5, rel=0.05), 0.5]]
    shown = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert shown == ["b", "a", "c", "training set"]


def test_the_figure_has_the_intervals_the_floor_and_a_scale_for_what_changes_sign(drawn):
    plot_comparison(found_of(result("a", 5, 0.5), result("a", 10, 0.1)), "nowhere.png")

    error, sliced, energy, mmd = drawn[0].axes
    bars = sliced.containers[0][2][0].get_segments()
    assert_close([float(end) for _, end in bars[0]], [0.4, 0.65])
    for axes in (sliced, energy, mmd):
        low, high = axes.patches[0].get_extents().transformed(axes.transData.inverted()).intervaly
        assert high == pytest.approx(0.03)
    assert low == pytest.approx(-0.02) and not error.patches
    assert [axes.get_yscale() for axes in (error, sliced, energy, mmd)] == [
        "log", "log", "symlog", "symlog",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [1e-4, 0.012, 0.05, 0.4, 30.0, 2000.0])
@pytest.mark.parametrize("floor", [(-0.02, 0.03), (-0.077, 0.016), (0.01, 0.02)])
def test_two_ticks_at_least_are_labelled_and_the_linear_part_is_marked(drawn, value, floor):
    found = found_of(result("a", 10, value), result("b", 20, value))
    ends = dict(zip(("low", "high"), floor, strict=True))
    found["floor"] = {name: {"value": 0.0, **ends} for name in found["floor"]}

    plot_comparison(found, "nowhere.png")

    for axes in drawn[0].axes[2:]:
        drawn[0].canvas.draw()
        low, high = axes.get_ylim()
        shown = [
            (tick, label.get_text())
            for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
            if low <= tick <= high
        ]
        edge = max(floor[1], -floor[0])
        assert {(0.0, "0"), (edge, f"{edge:.2g}")} <= set(shown)
        assert not any("e+" in label for _, label in shown)
        assert edge in [line.get_ydata()[0] for line in axes.get_lines() if len(line.get_ydata())]
        assert axes.yaxis.get_transform().linthresh == edge
        places = axes.yaxis.get_transform().transform([tick for tick, _ in shown])
        high, low = (float(axes.yaxis.get_transform().transform([end])[0]) for end in (high, low))
        gaps = torch.as_tensor(places).sort().values.diff() / (high - low)
        assert float(gaps.min()) > 0.03, "labels of 10 points in a panel of 3 inches do not touch"


@pytest.mark.parametrize("nfe", [[7], [13, 17], [5, 10, 20, 50], [3, 2000], [5, 4000]])
def test_evaluations_have_labels_that_do_not_touch_and_nothing_warns(drawn, nfe):
    rows = [result(name, n, 0.3) for name in "abcdefghijk" for n in nfe]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_comparison(found_of(*rows), "nowhere.png")
        drawn[0].canvas.draw()

    for axes in drawn[0].axes:
        boxes = [
            label.get_window_extent()
            for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]
        ]
        assert len(boxes) >= min(2, len(nfe))
        for one, other in itertools.pairwise(boxes):
            assert other.x0 - one.x1 > 0.5 * one.height


def test_long_names_leave_the_legend_within_the_figure(drawn):
    name = "ancestral variance=forward grid=UniformLogSNR"
    plot_comparison(found_of(*(result(name + i, 5, 0.5) for i in "abcde")), "nowhere.png")

    drawn[0].canvas.draw()
    box = drawn[0].legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= drawn[0].bbox.width


def test_the_doubt_of_the_reference_is_drawn_where_it_matters(drawn):
    for good_to, lines in ((0.05, 1), (1e-9, 0)):
        found = found_of(result("a", 5, 0.5), result("a", 10, 0.1))
        found["reference"]["good_to"] = good_to
        plot_comparison(found, "nowhere.png")
        dotted = [line for line in drawn[-1].axes[0].get_lines() if line.get_linestyle() == ":"]
        assert len(dotted) == lines


def test_without_endpoint_errors_there_are_three_panels_and_without_results_none(drawn):
    found = found_of(result("c", 9, 0.7, stochastic=True))
    plot_comparison(found | {"reference": None}, "nowhere.png")
    assert len(drawn[0].axes) == 3

    with pytest.raises(ValueError, match="needs a result; every sampler failed"):
        plot_comparison(found_of({"sampler": "a", "asked": "", "failed": "x"}), "nowhere.png")
