"""Conformance: everything that ``conf/`` names is built and passes the checks of its kind."""

from __future__ import annotations

import inspect
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from pydoc import locate
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import run
from experiment.batches import Batches
from experiment.config import check_targets, choices, fill_measured
from experiment.data import Dataset
from experiment.errors import RunError
from experiment.evaluation import evaluate
from score_models import EDM, ScoreModel, UniformTimes
from score_models.checks import check_network, check_objective
from sde_lib import VPSDE
from sde_lib.checks import check_sampler, check_sde
from sde_lib.oracles import Gaussian
from sde_lib.reverse_variance import AnalyticVariance
from sde_lib.sde import expand_like
from sde_lib.state_variance import (
    InterpolatedVariance,
    ResidualVariance,
    SecondMomentVariance,
)

GROUPS = choices(run.CONF)
EVERYTHING = [(group, choice) for group in GROUPS for choice in GROUPS[group]]
DOCS = sorted((run.CONF.parent / "docs").glob("*.md"))
STD = 0.6


def compose(*overrides: str) -> dict[str, Any]:
    """The configuration with these choices, what the data decide filled in."""
    with hydra.initialize_config_dir(str(run.CONF), version_base="1.3"):
        return fill_measured(run.compose(list(overrides)), data_std=STD)


class ExactOutput(nn.Module):
    """What a perfect network returns under ``parameterization`` for data N(0, STD²)."""

    def __init__(self, parameterization: Any) -> None:
        super().__init__()
        self.parameterization = parameterization
        self.weight = nn.Parameter(torch.zeros(()))  # evaluate() asks a model for its device

    def forward(self, x: Tensor, noise_level: Tensor, cond: Tensor | None = None) -> Tensor:
        p, rho = self.parameterization, noise_level.double().exp()
        scalars = (rho, p.input(rho), p.skip(rho), p.out(rho))
        rho, c_in, c_skip, c_out = (expand_like(c, x) for c in scalars)
        y = x / c_in
        return ((STD**2 / (STD**2 + rho**2) - c_skip) * y / c_out).to(x.dtype) + self.weight


def exact_model(sde: Any, parameterization: Any = None) -> ScoreModel:
    parameterization = parameterization or EDM(STD)
    return ScoreModel(ExactOutput(parameterization), sde, parameterization)


def check_process(node: dict[str, Any], tmp_path: Path) -> None:
    check_sde(run.instantiate(node), prior_bound=2e-4)


def unresolved(x: Tensor, t: Tensor) -> Tensor:
    """Var[eps | x_t] of the data of check_sampler, N(0.5, 0.8²)."""
    level = VPSDE().level(torch.as_tensor(t, dtype=torch.float64))
    return (0.64 / (0.64 + level.noise_ratio**2)).to(x).expand_as(x)


def second_moment(x: Tensor, t: Tensor) -> Tensor:
    level = VPSDE().level(torch.as_tensor(t, dtype=torch.float64))
    return level.noise(Gaussian(0.5, 0.8).score(VPSDE())(x.reshape(-1), t)).reshape(
        x.shape
    ).square() + unresolved(x, t)


# what would be found out about the exact model of these data
CLOCK = torch.linspace(-8, 6, 500, dtype=torch.float64)
KNOWN = {
    "analytic": AnalyticVariance(CLOCK, 0.64 / (0.64 + (2 * CLOCK).exp()), 1.0),
    "npr": ResidualVariance(unresolved),
    "sn": SecondMomentVariance(second_moment),
    "learned": InterpolatedVariance(lambda x, t: torch.ones_like(x)),  # at 200 steps nearly so
}


def check_sampling(node: dict[str, Any], tmp_path: Path) -> None:
    def make(steps: int) -> Any:
        made = run.instantiate(node | ({"steps": steps} if "steps" in node else {}))
        return made.given(KNOWN) if made.wanted else made

    adaptive = "steps" not in node
    # at t_min it stays where it begins; tests/test_langevin.py has it where it mixes
    alone = node["_target_"].endswith(".Langevin")
    bias = math.inf if alone else 0.06
    check_sampler(make, VPSDE(), bias=bias, batch_tolerance=1e-2 if adaptive else 0.0)


def check_conformity(node: dict[str, Any], tmp_path: Path) -> None:
    """The network of a choice, made small; its own size is looked at in tests/test_networks.py."""
    shapes = {"MLP": (3,), "DiT": (2, 8, 12)}
    shape = shapes.get(node["_target_"].rpartition(".")[2], (2, 9, 12))
    small = {"width": 8, "blocks": 1, "head_channels": 4, "features": 4, "multipliers": [1, 2]}
    small = {key: value for key, value in small.items() if node.get(key)}
    if "attention" in node:
        small["attention"] = [i for i in node["attention"] if i < 2]
    if "dropout" in node:
        small["dropout"] = 0.3
    cond = {"_target_": "score_models.Classes", "count": 3}
    network = run.instantiate(node | small | {"shape": shape, "cond": cond})
    check_network(network, shape, examples=torch.tensor([0, 2, 3]))


def check_parameterization(node: dict[str, Any], tmp_path: Path) -> None:
    sde = VPSDE()
    model = exact_model(sde, run.instantiate(node)).double()
    data, t = Gaussian(torch.zeros(3), STD), torch.tensor([1e-3, 0.2, 0.9], dtype=torch.float64)
    x = data.sample(3, sde=sde, t=t, generator=torch.Generator().manual_seed(0)).double()
    assert_close(model.score(x, t), data.score(sde)(x, t), rtol=1e-6, atol=1e-9)
    level = sde.level(t)
    assert_close(model.denoised(x, t), level.denoised(x, data.score(sde)(x, t)))


def check_training_objective(node: dict[str, Any], tmp_path: Path) -> None:
    """And of score matching the mean loss of the exact score is the floor, integrated over t."""
    objective, sde, n = run.instantiate(node), VPSDE(), 20_000
    check_objective(objective, sde)
    if not hasattr(objective, "weight"):
        return  # a bound: tests/test_objective_bound.py has its floor
    generator = torch.Generator().manual_seed(0)
    x0 = STD * torch.randn(n, 4, generator=generator)
    loss = objective(exact_model(sde), x0, generator).detach().double()
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, importance = objective.times.quantile(sde, u)
    level = sde.level(t)
    floor = (level.alpha * STD) ** 2 / ((level.alpha * STD) ** 2 + level.sigma**2)
    wanted = float((importance * objective.weight(level) / level.sigma**2 * floor).mean())
    assert abs(float(loss.mean()) - wanted) < 5 * float(loss.std()) / math.sqrt(n)
    if isinstance(objective.times, UniformTimes):
        assert float(importance.max()) == 1.0


def check_likelihood_settings(node: dict[str, Any], tmp_path: Path) -> None:
    """Continuous data N(0.5, 2²) under the exact model of the standardised data."""
    draw = 0.5 + 2 * torch.randn(264, 3, generator=torch.Generator().manual_seed(0))
    data = Dataset("normal", draw[:200], draw[200:])
    scale = data.units.scale
    model = exact_model(VPSDE(), EDM(STD))
    result = evaluate(model, data, run.instantiate(node), seed=0)
    x = data.units.encode(data.test).double()
    exact = Gaussian(torch.zeros(3, dtype=torch.float64), STD).log_prob(x)
    wanted = -exact + scale.double().log().sum()
    # noise sigma(t_min) = 1e-3 is on the data; the rest is the solver's tolerance and the probes
    solver = 10 * 3 * node["solver"].get("rtol", 1e-4)
    bound = 1e-3 + solver + 5 * result.probe_error * math.sqrt(len(wanted))
    assert float((result.per_sample - wanted).abs().max()) < bound


def check_data(node: dict[str, Any], tmp_path: Path) -> None:
    data = source(node, tmp_path)
    assert isinstance(data, Dataset)
    values = data.test[:64]
    x = data.units.encode(values, torch.Generator().manual_seed(0))
    assert_close(data.units.decode(x), values, rtol=1e-5, atol=1e-5)
    assert x.shape == values.shape and 0.1 < float(x.std()) < 2
    if data.entropy is not None:
        surprise = -data.log_density(data.test).double()
        error = float(surprise.std()) / math.sqrt(len(surprise))
        assert (
            abs(float(surprise.mean()) - data.entropy) < 5 * error + 1e-4
        )  # four digits are known


def source(node: dict[str, Any], tmp_path: Path) -> Dataset:
    """A data set, on files made here where it is the user's own, on real ones where they are."""
    name = node["_target_"].rpartition(".")[2]
    generator = np.random.default_rng(0)
    if name == "arrays":
        np.save(tmp_path / "own.npy", generator.standard_normal((50, 3, 7)).astype(np.float32))
        return run.instantiate(node | {"path": str(tmp_path / "own.npy")})
    if name == "image_folder":
        for i in range(12):
            pixels = generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        return run.instantiate(node | {"path": str(tmp_path)})
    if name == "huggingface":
        return run.instantiate(node | {"path": str(parquet(tmp_path))})
    if "root" in node:
        root = Path(__file__).resolve().parents[2] / "shared" / "data"
        if not (root / name.replace("_", "-")).exists():
            pytest.skip(f"no files of {name}; tests/test_data_*.py read small ones of its kind")
        return run.instantiate(node | {"root": str(root)})
    return run.instantiate(node)


def parquet(tmp_path: Path) -> Path:
    """A folder with pictures as the package ``datasets`` writes them."""
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 8, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels]}, features=features
    )
    (tmp_path / "hub").mkdir()
    table.to_parquet(str(tmp_path / "hub" / "train.parquet"))
    return tmp_path / "hub"


def check_augment(node: dict[str, Any], tmp_path: Path) -> None:
    """Of images their rows are kept, of a batch mates do not matter, vectors are refused."""
    augment, x = run.instantiate(node), torch.arange(64 * 24).reshape(64, 2, 3, 4)
    made = augment(x, torch.Generator().manual_seed(0))
    assert made.dtype == x.dtype and torch.equal(made.sort(-1).values, x.sort(-1).values)
    assert 0 < int((made != x).flatten(1).any(1).sum()) < 64
    with pytest.raises(ValueError, match="no images"):
        augment.check((7,))


def check_training(node: dict[str, Any], tmp_path: Path) -> None:
    settings = run.instantiate(node)
    rates = [settings.lr_at(i) for i in range(settings.steps)]
    assert 0 < min(rates) and 0.9 * settings.lr < max(rates) <= settings.lr
    assert len(Batches(1437, settings.batch_size, 0)(7).unique()) == settings.batch_size


def check_tracking(node: dict[str, Any], tmp_path: Path) -> None:
    tracker = run.instantiate(node)
    if node.get("mode") in ("auto", "online"):
        return  # talk to a server: tests/test_trackers.py gives them one
    try:
        tracker.check()
    except RunError as error:
        assert "pip install" in str(error)
        pytest.skip(str(error))
    tracker.start(tmp_path, {"sde": "vp"}, "conformance")
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    assert isinstance(tracker.describe(), str)


def check_speed(node: dict[str, Any], tmp_path: Path) -> None:
    speed, device = run.instantiate(node), torch.device("cpu")
    assert speed.accumulate >= 1 and speed.batches_ahead(device) >= 0


def check_distributed(node: dict[str, Any], tmp_path: Path) -> None:
    together, module = run.instantiate(node), torch.nn.Linear(2, 2)
    together.join()  # alone: nobody to meet
    assert together.spread(module, torch.device("cpu")) is module
    assert len(together.weights(module)) == 2
    assert together.share(7) == range(7) and together.largest(3) == 3


def check_mode(node: dict[str, Any], tmp_path: Path) -> None:
    assert callable(run.instantiate(node))


CHECKS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "sde": check_process,
    "sampler": check_sampling,
    "network": check_conformity,
    "parameterization": check_parameterization,
    "objective": check_training_objective,
    "likelihood": check_likelihood_settings,
    "data": check_data,
    "augment": check_augment,
    "training": check_training,
    "tracking": check_tracking,
    "speed": check_speed,
    "distributed": check_distributed,
    "mode": check_mode,
}


def test_every_group_has_a_suite() -> None:
    assert set(GROUPS) == {*CHECKS, "experiment"}


@pytest.mark.parametrize(
    ("group", "choice"), [pair for pair in EVERYTHING if pair[0] != "experiment"]
)
def test_every_choice_conforms(
    group: str, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    CHECKS[group](compose(f"{group}={choice}")[group], tmp_path)


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_composes_and_its_parts_are_built(experiment: str) -> None:
    config = compose(f"experiment={experiment}")
    check_targets({k: v for k, v in config.items() if k != "run"}, experiment)
    assert experiment in config["run"]["name"], "its own directory, beside the default run's"
    shape = (1, 8, 8) if config["network"]["_target_"].endswith("UNet") else (2,)
    for part in ("sde", "network", "parameterization", "objective", "training", "sampler"):
        run.instantiate(fill_measured(config, shape=shape)[part])


def commands(text: str) -> list[list[str]]:
    """The overrides of each ``run.py`` command in the code blocks of a page."""
    blocks = "".join(text.split("```")[1::2])
    found = re.findall(r"^(?:python run\.py|\./dev run) ([^#\n]*)", blocks, re.MULTILINE)
    return [shlex.split(words) for words in found if not words.startswith("-")]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in DOCS)])
def test_the_commands_of_the_pages_compose(page: str) -> None:
    text = (run.CONF.parent / page).read_text(encoding="utf-8")
    assert commands(text) or page != "README.md"
    for overrides in commands(text):
        compose(*overrides)


def test_the_library_example_of_the_readme_runs() -> None:
    text = (run.CONF.parent / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    assert names["noisy"].shape == (1000, 2)
    assert names["result"].log_prob.shape == (1000,)


@pytest.mark.parametrize("choice", GROUPS["network"])
def test_every_network_that_can_spare_memory_has_the_key_for_it(choice):
    node = compose(f"network={choice}")["network"]
    takes = inspect.signature(locate(node["_target_"])).parameters
    assert ("checkpointing" in node) == ("checkpointing" in takes)
