"""Fixtures that several test files share: the processes, a mixture, and generators."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sde_lib import EDMSDE, VESDE, VPSDE, CosineSDE, DiscreteSDE, MarginalSDE, SubVPSDE
from sde_lib.oracles import GaussianMixture

torch.set_num_threads(1)

PROCESSES = {
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(),
    "edm": EDMSDE(),
    "cosine": CosineSDE(),
}


def _sine(t: Tensor) -> Tensor:
    return torch.sin(1.5 * t)


def _cosine(t: Tensor) -> Tensor:
    return torch.cos(1.5 * t)


DERIVED = {
    "ddpm": DiscreteSDE.linear_betas(),
    "ncsn": DiscreteSDE.geometric_sigmas(),
    "marginal": MarginalSDE(_cosine, _sine),
}
ALL_PROCESSES = PROCESSES | DERIVED


@pytest.fixture(params=PROCESSES.values(), ids=PROCESSES.keys())
def sde(request: pytest.FixtureRequest):  # noqa: ANN201
    """Each of the five continuous processes."""
    return request.param


@pytest.fixture(params=ALL_PROCESSES.values(), ids=ALL_PROCESSES.keys())
def any_sde(request: pytest.FixtureRequest):  # noqa: ANN201
    """Each process, the derived ones too."""
    return request.param


@pytest.fixture
def no_data_by_chance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the variable nor the folder ``data`` of the place the tests are started from."""
    monkeypatch.delenv("SCORE_SDE_DATA", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture
def mixture() -> GaussianMixture:
    """Two uneven modes in two dimensions; a sampler that loses mass between them shows."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    return GaussianMixture(means, torch.tensor([0.5, 0.7]), torch.tensor([0.3, 0.7]))


@pytest.fixture
def seeded() -> Callable[[int], torch.Generator]:
    """A CPU generator with the given seed."""
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture
def assert_moments() -> Callable[..., None]:
    """Hold mean and variance of samples [n, ...] to exact ones, five standard errors and a bias.

    The bias is relative to the standard deviation (mean) and to the variance; the standard error
    of the variance takes the fourth moment from the samples.
    """

    def check(samples: Tensor, mean: Tensor, variance: Tensor, bias: float = 0.0) -> None:
        samples = samples.double()
        n, std = len(samples), variance.sqrt()
        error = (samples.mean(0) - mean).abs() / std
        assert bool((error <= 5 / math.sqrt(n) + bias).all()), f"means off by {error.tolist()}"
        squares = ((samples - mean) / std).square()
        error, noise = (squares.mean(0) - 1).abs(), 5 * squares.std(0) / math.sqrt(n)
        assert bool((error <= noise + bias).all()), f"variances off by {error.tolist()}"

    return check
