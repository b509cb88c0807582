"""mode=sample: what is shown of the way, under which names, and by which model."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_conf import exact_model
from torch.testing import assert_close

import run as entry
from experiment import sample as mode
from experiment.chosen import Label
from experiment.config import named
from experiment.data import Dataset
from experiment.sample import called, draw, sample
from experiment.seeds import sample_paths
from experiment.trackers import NoTracker
from experiment.way import Frame, frames, labels
from sde_lib import EDMSDE, VPSDE, Counted
from sde_lib.grids import UniformLogSNR
from sde_lib.samplers import DDIM, Ancestral, Heun, Langevin, PredictorCorrector

SDE = VPSDE(t_min=1e-3)


def way(sampler, sde=SDE):
    streams = sample_paths(0, "samples", range(2))
    return draw(Counted(exact_model(sde).score), exact_model(sde), sampler, (3,), streams)


@pytest.mark.parametrize("sde", [SDE, EDMSDE()], ids=repr)
@pytest.mark.parametrize("sampler", [Heun(60), PredictorCorrector(60)], ids=repr)
def test_frames_are_even_in_the_noise_and_not_in_the_steps(sampler, sde):
    shown = way(sampler, sde)

    clock = torch.tensor([math.log(frame.noise) for frame in shown])
    high, low = (-0.5 * float(u) for u in sde.log_snr_range())
    assert len(shown) == 11
    grid = sampler.levels(sde).noise_ratio.log()
    coarse = float(-grid.diff().min()) / 2  # no state is nearer to a mark than half a step
    assert_close(clock, torch.linspace(high, low, 11), rtol=0, atol=coarse + 1e-4)
    assert [frame.index for frame in shown] == sorted({frame.index for frame in shown})


def test_frames_are_the_states_of_those_levels_and_the_last_is_the_result():
    sampler = DDIM(30, UniformLogSNR())
    streams = sample_paths(0, "samples", range(2))
    start = SDE.prior_sample((2, 3), generator=streams)
    states = list(sampler.trajectory(exact_model(SDE).score, SDE, start, generator=streams))

    shown = frames(iter(states), SDE)

    assert [frame.index for frame in shown] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 31]
    for frame in shown:
        t, x = states[frame.index]
        assert frame.t == t and torch.equal(frame.x, x)
        level = SDE.level(torch.tensor(t, dtype=torch.float64))
        assert frame.noise == pytest.approx(float(level.sigma / level.alpha))


@pytest.mark.parametrize(("steps", "wanted"), [(1, 3), (3, 5), (500, 11)])
def test_few_states_are_all_shown_and_many_at_one_level_evenly(steps, wanted):
    shown = way(Langevin(steps - 1, t=0.5) if steps > 3 else DDIM(steps))

    indices = torch.tensor([frame.index for frame in shown])
    assert len(shown) == wanted
    assert int(indices[-1]) == steps + 1 and int(indices[0]) == 0
    assert int(indices.diff().max()) <= 1.4 * steps / 10 + 1  # of 40 kept, the nearest


def test_labels_are_the_noise_in_few_letters():
    noise = [152.3, 12.4, 1.26, 0.0451, 1e-5]

    found = labels([Frame(0, 0.0, value, None) for value in noise])

    assert found == ["152", "12", "1.3", "0.045", "samples"]


def values(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


IMAGES = Dataset("images", *(torch.randint(0, 4, (n, 1, 3, 3)) for n in (40, 30)), 4)
POINTS = Dataset("points", values(40, 2), values(30, 2))


@pytest.fixture
def sampling(tmp_path):
    """Runs mode=sample on an exact model, in a run directory."""

    def go(sampler, data, *overrides, **settings):
        parts = {"sampler": sampler, "data": data, "tracking": NoTracker()}
        run = SimpleNamespace(
            warn=lambda: None,
            config={"run": {"name": "a"}},
            conf=entry.CONF,
            overrides=overrides,
            path=tmp_path,
            fitted=tmp_path / "fitted",
            average=Label(),
            seed=0,
            build=parts.get,
            device=lambda: torch.device("cpu"),
        )
        (tmp_path / "weights.pt").write_bytes(b"these")
        run.trained = lambda: (run, exact_model(SDE), tmp_path / "weights.pt", 7)
        sample(run, **{"num_samples": 3, **settings})
        return tmp_path

    return go


def files(folder, pattern):
    return sorted(path.stem.partition("-")[2] for path in folder.glob(pattern))


def test_pictures_and_what_they_are_of_have_the_name_of_the_samples(sampling):
    for settings in ({}, {"temperature": 0.5}):
        folder = sampling(DDIM(4, eta=0.5), IMAGES, "sampler=analytic_ddim", **settings)

    names = files(folder / "samples", "samples-*.npz")
    assert len(names) == 2 and all(name.startswith("00000007-analytic_ddim-5-") for name in names)
    for pattern in ("grid-*.png", "strip-*.png", "samples-*.json"):
        assert files(folder / "samples", pattern) == names
    about = [json.loads(path.read_text()) for path in (folder / "samples").glob("*.json")]
    assert {one["temperature"] for one in about} == {1.0, 0.5}
    for one in about:
        assert (one["sampler"], one["steps"], one["nfe"]) == ("analytic_ddim", 4, 5)
        assert (one["iteration"], one["eta"], one["num_samples"]) == (7, 0.5, 3)
    with Image.open(folder / f"samples/strip-{names[0]}.png") as strip:
        assert strip.width == 6 * 50 + 2, "a column for each of six states"


def test_pictures_of_points_have_the_name_of_the_samples_too(sampling, monkeypatch):
    monkeypatch.setattr("experiment.plane.RESOLUTION", 4)

    folder = sampling(Heun(2), POINTS, num_samples=1)

    names = files(folder / "samples", "samples-*.npz")
    assert names[0].startswith("00000007-heun-5-")
    assert files(folder / "figures", "density-*.png") == names
    assert files(folder / "figures", "path-*.png") == names


def test_pictures_are_of_the_model_as_it_was_loaded(sampling, monkeypatch):
    given = []
    monkeypatch.setattr(mode, "draw_plane", lambda *args: given.append(args[2]))
    monkeypatch.setattr(torch, "compile", refusing_gradients)

    sampling(Heun(2), POINTS, precision="bfloat16", compile=True)

    ((model),) = given
    x = torch.ones(2, 2, requires_grad=True)
    assert torch.autograd.grad(model.score(x, torch.tensor(0.5)).sum(), x)[0].isfinite().all()
    assert "Autocast" not in repr(model)


def refusing_gradients(network):
    """What a compiled network does where its output is differentiated twice, and sooner."""

    class Compiled(torch.nn.Module):
        def forward(self, x, *rest):
            if x.requires_grad:
                raise RuntimeError("compiled with non-empty donated buffers")
            return network(x, *rest)

    return Compiled()


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["sampler=analytic_ddim", "sampler.steps=3"], "analytic_ddim"),
        (["sampler.steps=3"], "ancestral"),
        (["sampler=ddim,heun"], "ancestral"),  # of several runs it is not known which this is
        ([], "ancestral"),
    ],
)
def test_a_sampler_is_called_as_it_was_chosen(overrides, name):
    run = SimpleNamespace(overrides=overrides, conf=entry.CONF)

    assert called(run, Ancestral(3)) == name


def test_langevin_at_t_min_stays_where_it_begins_and_its_help_says_so():
    sampler = entry.instantiate(named(entry.CONF, "sampler", "langevin"))
    sde = VPSDE()
    start, end = (frame.x.flatten() for frame in (way(sampler, sde)[0], way(sampler, sde)[-1]))

    first, *_ = (entry.CONF / "sampler" / "langevin.yaml").read_text().splitlines()
    # a thousand steps of 0.2 sigma^2 go some twenty sigma, 0.001 each
    assert float((start - end).abs().max()) < 0.15
    assert "at t_min images stay noise: set sampler.t" in first
