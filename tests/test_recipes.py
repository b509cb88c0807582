"""Recipes: the published sizes and schedules, a few iterations of each, a directory for each."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_conf import GROUPS, commands, compose

import run
from experiment.augment import augmentation
from experiment.config import fill_measured
from experiment.data import Dataset
from experiment.run import Run
from experiment.state import State
from experiment.training import Training, fit

sys.path.append(str(run.CONF.parent / "benchmarks"))
RECIPES = GROUPS["experiment"]
DOCS = (run.CONF.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
PUBLISHED = {  # M weights; M images; batch
    "cifar10_ddpm": (35.7, 102.4, 128),
    "cifar10_iddpm": (52.5, 64.0, 128),
    "cifar10_vp": (61.8, 166.4, 128),
    "cifar10_subvp": (61.8, 166.4, 128),
    "cifar10_scoreflow": (61.8, 166.4, 128),
    "cifar10_ve": (62.8, 166.4, 128),
    "cifar10_edm": (55.7, 200.0, 512),
}
SHAPES = {"cifar10": ((3, 8, 8), 256), "mnist": ((1, 8, 8), 256), "digits": ((1, 8, 8), 17)}
SHAPES |= {"fashion_mnist": SHAPES["mnist"], "two_moons": ((2,), None), "arrays": ((5,), None)}
SMALL = {"width": 8, "blocks": 1, "head_channels": 4, "multipliers": [1, 2]}


def weights_of(config: dict[str, Any], shape: tuple[int, ...]) -> float:
    with torch.device("meta"):  # their number alone
        network = run.instantiate(fill_measured(config, shape=shape)["network"])
    return sum(weights.numel() for weights in network.parameters()) / 1e6


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.startswith("cifar10")])
def test_cifar10_networks_and_schedules_have_the_published_size(recipe: str) -> None:
    config = compose(f"experiment={recipe}")
    weights, images, batch = PUBLISHED[recipe]
    training = config["training"]
    assert weights_of(config, (3, 32, 32)) == pytest.approx(weights, abs=0.06)
    assert training["batch_size"] == batch
    assert training["steps"] * batch / 1e6 == pytest.approx(images, rel=1e-6)
    settings = Training(**{k: v for k, v in training.items() if k != "_target_"})
    assert settings.lr_at(settings.steps - 1) == settings.lr, "constant after warm-up"
    assert settings.adam["betas"] == (0.9, 0.999) and settings.adam["weight_decay"] == 0


def test_edm_has_its_half_life_and_warm_up_in_images() -> None:
    training = compose("experiment=cifar10_edm")["training"]
    half_life = math.log(0.5) / math.log(training["ema"]) * training["batch_size"]
    assert half_life == pytest.approx(0.5e6, rel=0.01)
    assert training["warmup"] * training["batch_size"] == pytest.approx(10e6, rel=1e-3)


@pytest.mark.parametrize("recipe", ["cifar10_ddpm", "cifar10_iddpm", "ncsn"])
def test_levels_of_a_discrete_recipe_are_those_of_its_process(recipe: str) -> None:
    config = compose(f"experiment={recipe}")
    sde, times = run.instantiate(config["sde"]), run.instantiate(config["objective"]["times"])
    level = times.time(sde, torch.arange(times.levels))
    wanted = torch.arange(1, times.levels + 1, dtype=torch.float64) / times.levels
    # the cosine process ends at 0.9946, where the published one cuts its betas
    torch.testing.assert_close(level, wanted * sde.t_max, rtol=0.006, atol=2e-6)


def small(recipe: str) -> tuple[dict[str, Any], Dataset]:
    """The recipe with few weights, three iterations, and data of its kind."""
    config = compose(f"experiment={recipe}")
    shape, levels = SHAPES[config["data"]["_target_"].rpartition(".")[2]]
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(20, *shape, generator=generator)
    if levels is not None:
        draw = torch.randint(levels, (20, *shape), generator=generator)
    network = {key: value for key, value in SMALL.items() if config["network"].get(key)}
    if "attention" in config["network"]:
        network["attention"] = [i for i in config["network"]["attention"] if i < 2]
    config["network"] |= network
    config["training"] |= {"steps": 3, "batch_size": 4, "log_every": 1, "warmup": 1}
    config["data"].pop("path", None)  # a table is the user's own
    config["run"] |= {"root": "unused", "name": recipe}
    return config, Dataset(recipe, draw[:12], draw[12:], levels=levels)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_its_parts_together(recipe: str, tmp_path: Path) -> None:
    config, data = small(recipe)
    made = Run(config, run.instantiate).measured(data)
    torch.manual_seed(0)
    model, objective = made.build_model(), made.build("objective")
    settings: Training = made.build("training")
    objective.prepare(model, data.units.encode(data.train[:2]), None)
    made.build("likelihood").check(data)
    made.build("sampler").check(model.sde)
    state = State(model, objective, settings.profiles, settings.adam, speed=made.build("speed"))
    before = [weights.detach().clone() for weights in state.weights]
    logged: list[float] = []
    done = fit(
        state, data, settings, seed=0, failure_folder=tmp_path,
        on_log=lambda values, iteration: logged.append(values["train/loss"]),
        on_checkpoint=lambda s: None, on_evaluate=lambda s: None,
        augment=augmentation(made, data),
    )  # fmt: skip
    assert done and len(logged) == 3 and all(math.isfinite(loss) for loss in logged)
    moved = [not torch.equal(a, b) for a, b in zip(before, state.weights, strict=True)]
    assert sum(moved) >= 1 and all(bool(w.isfinite().all()) for w in state.weights)


@pytest.mark.parametrize(
    "overrides", [c for c in commands(DOCS) if "mode=sample" in c], ids=" ".join
)
def test_samplers_of_the_page_can_walk_the_processes_of_their_recipes(
    overrides: list[str],
) -> None:
    config = compose(*overrides)
    sde, sampler = run.instantiate(config["sde"]), run.instantiate(config["sampler"])
    sampler.check(sde)
    if "cifar10_ddpm" in " ".join(overrides):  # each level once
        times = sampler.grid(sde, sampler.steps)
        levels = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
        torch.testing.assert_close(times, levels, rtol=1e-9, atol=0)


def test_each_comparison_on_mnist_is_told_and_has_a_directory_of_its_own() -> None:
    name = compose("experiment=mnist")["run"]["name"]
    assert all(f"${{hydra:runtime.choices.{group}}}" in name for group in ("sde", "objective"))
    for sde in ("vp", "subvp"):
        for objective in ("noise", "maximum_likelihood"):
            assert f"experiment=mnist sde={sde} objective={objective} " in DOCS


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_its_row_and_its_name_in_the_benchmark(recipe: str) -> None:
    import recipes

    assert any(line.startswith(f"| `{recipe}` ") for line in DOCS.splitlines())
    assert f"experiment={recipe}" in (recipes.RECIPES | recipes.LONG)[recipe]
