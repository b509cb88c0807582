"""mode=diagnose as a whole: what it writes, what it proposes, and that the proposals work."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from torch import nn

import run as entry
from experiment.diagnosis.advice import basis, data_std, levels, sigma_max
from experiment.diagnosis.figure import plot_diagnosis
from experiment.diagnosis.levels import Wanted
from experiment.diagnosis.model import Errors
from experiment.diagnosis.page import diagnosis as section
from experiment.diagnosis.probes import Bases, measured_bases
from experiment.diagnosis.spread import Distance, PriorFit
from experiment.diagnosis.trained import ByLevel
from experiment.diagnosis.words import lines
from experiment.errors import RunError
from experiment.run import Run
from score_models import EDM, ScoreModel
from sde_lib import VPSDE

QUICK = ["mode.levels=8", "mode.loss_samples=4", "mode.gradient_samples=8"]
TINY = [
    "network=mlp", "training=vectors", "likelihood=hutchinson", "network.width=8",
    "network.blocks=1", "training.steps=4", "training.batch_size=2", "training.checkpoint_every=2",
    "training.evaluate_every=100", "likelihood.max_samples=2", "likelihood.solver.nodes=8",
    "sampler.steps=2",
]  # fmt: skip


UNSUITED = [
    "sde=ve", "sde.sigma_max=4000", "objective.times.mean=3", "data=arrays",
    "parameterization.data_std=9.5",
]  # fmt: skip


def made(folder: Path, *overrides: str) -> Run:
    """A run with these choices in ``folder``."""
    own = [*overrides, f"run.root={folder}", "run.name=own", "tracking=none", "device=cpu"]
    with hydra.initialize_config_dir(str(entry.CONF), version_base="1.3"):
        config = entry.compose(own)
    return Run(config, entry.instantiate, own, entry.CONF)


def saved(folder: Path, values: np.ndarray) -> str:
    np.save(folder / "own.npy", values)
    return f"data.path={folder / 'own.npy'}"


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def found_in(folder: Path) -> dict:
    return json.loads((folder / "own" / "diagnose.json").read_text())


@pytest.mark.parametrize(
    "values",
    [
        numbers(4, 3),
        numbers(40, 1),
        numbers(40, 2, 9),
        numbers(12, 1, 3, 4, 5),
        np.random.default_rng(0).integers(0, 8, (40, 1, 4, 4)).astype(np.uint8),
    ],
    ids=["two training samples", "one number", "1-D", "3-D", "levels"],
)
def test_data_of_every_shape_are_diagnosed_without_training(values, tmp_path, capsys) -> None:
    test_size = 2 if len(values) == 4 else 0.25
    made(
        tmp_path, "mode=diagnose", "data=arrays", saved(tmp_path, values), *TINY,
        f"data.test_size={test_size}",
    ).go()  # fmt: skip
    found, said = found_in(tmp_path), capsys.readouterr().out
    assert found["model"] is None and found["facts"]["sizes"]["train"] == len(values) - round(
        test_size if test_size > 1 else test_size * len(values)
    )
    assert found["facts"]["dims"] == math.prod(values.shape[1:])
    assert (tmp_path / "own/figures/diagnose.png").stat().st_size > 10_000
    for row in found["advice"]:
        assert row["fits"] or row["override"] in said
    assert all(row["low"] <= row["high"] for row in found["processes"])
    assert "What the data ask for" in (tmp_path / "own/report.html").read_text()


@pytest.mark.parametrize(
    "rows, said", [(15, "train on\n"), (64, "A larger mode.num_samples may tell")]
)
def test_of_too_few_samples_no_noise_levels_are_proposed(rows, said, tmp_path, capsys) -> None:
    train = numbers(rows, 3)
    train[::2] *= 1e-4  # every other sample: the scale that a half of them has
    np.savez(tmp_path / "own.npz", train=train, test=numbers(4, 3))
    choices = ["data=arrays", f"data.path={tmp_path / 'own.npz'}", "objective.times.mean=3"]
    made(tmp_path, "mode=diagnose", *choices, *TINY).go()
    out = capsys.readouterr().out
    assert "noise levels: the samples looked at are too few to tell which" in out
    assert said in out and "objective.times" not in out
    assert not any("times" in row["key"] for row in found_in(tmp_path)["advice"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model, on data of few levels, with settings that do not suit them."""
    folder = tmp_path_factory.mktemp("trained")
    values = np.random.default_rng(0).integers(0, 8, (60, 18)).astype(np.uint8)
    choices = [*UNSUITED, saved(folder, values)]
    made(folder, "mode=train", *choices, *TINY).go()
    made(folder, "mode=diagnose", *choices, *TINY, *QUICK).go()
    return folder


def test_what_is_proposed_can_be_pasted_and_fits_then(trained, tmp_path, capsys) -> None:
    proposed = [row for row in found_in(trained)["advice"] if not row["fits"]]
    assert [row["override"] for row in proposed] == ["data.levels=8"], "the units come first"
    choices = [*UNSUITED, f"data.path={trained / 'own.npy'}", *TINY, "data.levels=8"]
    made(tmp_path, "mode=diagnose", *choices).go()
    proposed = [row for row in found_in(tmp_path)["advice"] if not row["fits"]]
    assert {row["key"].rpartition(".")[2] for row in proposed} == {
        "sigma_max", "mean", "std", "data_std",
    }  # fmt: skip
    pasted = [row["override"] for row in proposed]
    assert f"to paste: {' '.join(pasted)}\n" in capsys.readouterr().out
    made(tmp_path / "anew", "mode=diagnose", *choices, *pasted).go()
    assert all(row["fits"] for row in found_in(tmp_path / "anew")["advice"])
    made(tmp_path / "anew", "mode=train", *choices, *pasted).go()


def test_a_trained_model_is_measured_at_every_level(trained) -> None:
    model, page = found_in(trained)["model"], (trained / "own/report.html").read_text()
    for name in ("test", "train", "gaussian", "own", "gradient_norm", "gradient_share", "wanted"):
        assert len(model[name]) == len(model["clock"]) == 8
    assert sum(model["gradient_share"]) == pytest.approx(1)
    assert model["iteration"] == 4 and model["gradient_samples"] == 8
    assert {*model["bases"]["error"]} == {"pixel", "cosine", "principal"}
    assert "test above training error" in page and "data:image/png" in page


def test_a_checkpoint_is_diagnosed_by_its_path_and_without_gradients(trained, capsys) -> None:
    (path,) = (trained / "own/checkpoints").glob("step-00000004.pt")
    data = ["data=arrays", f"data.path={trained / 'own.npy'}"]
    config = made(trained, "mode=diagnose", *data, *TINY, *QUICK, "mode.gradient_samples=0").config
    elsewhere = {**config, "checkpoint": str(path), "run": {**config["run"], "name": "own"}}
    Run(elsewhere, entry.instantiate, (), entry.CONF).go()
    model = found_in(trained)["model"]
    assert "gradient_norm" not in model and model["checkpoint"] == str(path)
    assert "gradient of one sample" not in capsys.readouterr().out


def test_a_model_of_other_data_and_numbers_out_of_range_are_refused(trained) -> None:
    data = ["data=arrays", f"data.path={trained / 'own.npy'}"]
    with pytest.raises(RunError, match="trained on other data"):
        made(trained, "mode=diagnose", "data.seed=7", *data, *TINY).go()
    with pytest.raises(ValueError, match="levels to be a whole number >= 8"):
        made(trained, "mode=diagnose", *data, *TINY, "mode.levels=2").go()
    with pytest.raises(ValueError, match="num_samples to be a whole number >= 4"):
        made(trained, "mode=diagnose", *data, *TINY, "mode.num_samples=0").go()


def test_advice_is_given_where_there_is_a_setting_and_fits_where_it_is_near() -> None:
    reach = Distance(9.0, 9.0, 100)
    prior = PriorFit(torch.zeros(2).double(), torch.ones(2).double())
    assert not list(sigma_max({"beta_max": 20}, reach, prior))
    fits = {given: next(sigma_max({"sigma_max": given}, reach, prior)) for given in (2, 12, 80)}
    assert [row.fits for row in fits.values()] == [False, True, False]
    assert fits[2].value == pytest.approx(9.0) and prior.matched() < 9
    far = PriorFit(torch.ones(2).double(), torch.ones(2).double())
    matched = next(sigma_max({"sigma_max": 12}, reach, far)).value
    assert matched == pytest.approx(math.sqrt(0.5 / 1e-4), rel=0.01), "the mean is of first order"

    wanted = Wanted(torch.linspace(-1, 1, 3).double(), torch.full((3,), 1 / 3).double())
    assert not list(levels({"times": {"stratified": True}}, wanted, 1.0))
    for efficiency, good in ((0.95, True), (0.5, False)):
        found = list(levels({"times": {"mean": -1, "std": 2}}, wanted, efficiency))
        assert [row.fits for row in found] == [good, good]
        assert [row.override for row in found] == [
            "objective.times.mean=0.0", "objective.times.std=0.82",
        ]  # fmt: skip
    assert [next(data_std({"data_std": s}, 0.5)).fits for s in (None, 0.52, 1.0)] == [1, 1, 0]
    assert not list(data_std({}, 0.5))


def test_principal_axes_are_proposed_where_a_model_shows_them_better_alone() -> None:
    better = Bases({"pixel": 1.0, "cosine": 2.0, "principal": 0.1}, {})
    worse = Bases({"pixel": 1.0, "cosine": 2.0, "principal": 1.5}, {})
    node = {"basis": "auto"}
    assert next(basis(node, better, True)).override == "likelihood.basis=auto"
    assert next(basis(node, better, False)).override == "likelihood.basis=principal"
    assert next(basis(node, worse, False)).fits
    assert not next(basis({"basis": "principal"}, worse, False)).fits
    assert not list(basis({}, better, True)) and not list(basis(node, None, True))


class Tied(nn.Module):
    """A linear network, which under EDM has a Jacobian that is the same everywhere."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x, noise_level, cond=None):
        return x @ self.matrix.T


def test_the_measured_noise_of_probes_is_that_of_the_jacobian() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, s = torch.randn(4, 4, generator=generator), 0.7
    model = ScoreModel(Tied(matrix), VPSDE(), EDM(s)).requires_grad_(False).eval()
    n, clock = 4000, torch.tensor([-1.0, 0.0, 1.0]).double()
    x0, noise = (torch.randn(n, 4, generator=generator) for _ in range(2))
    found = measured_bases(model, (x0, noise, None), clock, x0.double(), generator)
    exact = []
    for u in clock.tolist():
        rho = math.exp(u)
        # rho eps_hat = y - x0_hat has the slope (1 - skip) I - out in F in y
        j = -(rho * s / math.sqrt(rho**2 + s**2)) / math.sqrt(rho**2 + s**2) * matrix
        symmetric = (j + j.T) / 2
        exact.append(2 * float((symmetric - symmetric.diag().diag()).square().sum()))
    wanted = float(torch.trapezoid(torch.tensor(exact).double(), clock))
    # a variance of 4 probes is off by its own size at most, of 4000 samples by a 63rd of that
    assert found.variance["pixel"] == pytest.approx(wanted, rel=5 / math.sqrt(n))
    assert measured_bases(model, (x0[:, :1], noise[:, :1], None), clock, x0, generator) is None


def test_gap_and_excess_are_integrals_over_the_levels() -> None:
    clock = torch.tensor([0.0, 1.0, 3.0]).double()
    train, test = (torch.full((5, 3), value).double() for value in (0.5, 0.7))
    floor = torch.tensor([math.nan, 0.4, 0.4]).double()
    found = ByLevel(Errors(clock, train), Errors(clock, test), floor, floor, None, None, None)
    assert found.gap() == pytest.approx((0.2 * 3, 0.0))
    assert found.excess() == pytest.approx((0.3 * 2, 0.0)), "where the floor is known"
    assert found.as_row()["floor"][0] is None


def test_the_page_leaves_out_what_it_cannot_read(tmp_path) -> None:
    assert section(tmp_path) == ""
    (tmp_path / "diagnose.json").write_text('{"said": []}')
    assert section(tmp_path) == ""


def test_the_figure_is_drawn_with_a_floor_that_has_gaps(trained, tmp_path) -> None:
    found = found_in(trained)
    found["levels"]["floor"] = [None, *found["levels"]["best"][1:]]
    found["levels"]["own"], found["metric"] = None, "nll"
    assert plot_diagnosis(found, tmp_path / "a.png").stat().st_size > 10_000
    assert any("nats" in line for line in lines(found))


def test_the_model_counts_where_it_is_surely_better_than_a_line() -> None:
    clock = torch.linspace(-3, 3, 13).double()
    gaussian = torch.sigmoid(-2 * clock)
    spread = 0.01 * torch.tensor([[-1.0], [1.0]]).double().expand(2, 13)
    worse, better = (Errors(clock, spread + shift * gaussian) for shift in (1.5, 0.5))
    wanted = [
        ByLevel(each, each, gaussian, floor, None, None, None).wanted().density
        for each, floor in ((worse, None), (better, None), (worse, gaussian), (better, gaussian))
    ]
    assert torch.equal(wanted[0], wanted[2]) and torch.equal(wanted[2], wanted[3])
    assert not torch.allclose(wanted[1], wanted[3], atol=1e-2)
