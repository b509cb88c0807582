"""Two processes train what one does: the same loss curve, weights, averages and optimiser."""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_run import AVERAGES, one_of_them, what_it_holds
from test_training import leaves
from torch.testing import assert_close

from experiment.checkpoint import iteration_of, list_checkpoints, load_checkpoint
from experiment.errors import RunError
from experiment.processes import DDP, FSDP
from experiment.snapshots import Snapshots, Source
from score_models import DenoisingScoreMatching, SlicedScoreMatching


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(size: int, task: Callable[..., None], *arguments: Any) -> None:
    """``task`` in ``size`` processes, until all have ended well."""
    port, forks, started = free_port(), multiprocessing.get_context("fork"), []
    for rank in range(size):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        about = {name: str(value) for name, value in about.items()}
        started.append(forks.Process(target=task, args=(about, *arguments)))
        started[-1].start()
    for process in started:
        process.join(240)
    assert [process.exitcode for process in started] == [0] * size


def run(
    folder: Path, *, size: int = 2, kind: str = "ddp", batch=16, parts=1, stop=0, what="plain"
) -> dict:
    """What ``size`` processes have stored in the end."""
    start(size, one_of_them, kind, batch, parts, folder, stop, what)
    made = list_checkpoints(folder / "snapshots")
    snapshots = {iteration_of(path): load_checkpoint(path)["averages"] for path in made}
    return load_checkpoint(list_checkpoints(folder)[-1]) | {"snapshots": snapshots}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("alone"), size=1)


def assert_alike(a: dict, b: dict) -> None:
    """Two states agree but for the order in which float32 sums are taken."""
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if not isinstance(value, torch.Tensor | float):
            assert value == b[key], key
            continue
        assert_close(b[key], value, rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


# 15 rows: the two processes have shares of 7 and 8
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_loss_curve_weights_and_averages_of_one(tmp_path, alone, kind):
    assert_alike(alone, run(tmp_path, kind=kind))


def test_uneven_shares_in_parts_give_the_same_mean_over_the_batch(tmp_path):
    whole = run(tmp_path / "one", size=1, batch=15)
    assert_alike(whole, run(tmp_path / "two", batch=15, parts=3))


@pytest.mark.parametrize("kinds", [("ddp", "fsdp"), ("fsdp", "ddp")], ids="-".join)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, kinds):
    stopped = run(tmp_path, kind=kinds[0], stop=3)
    assert stopped["iteration"] == 3 and stopped["done"] is False
    assert run(tmp_path, size=1, stop=5)["iteration"] == 5
    ended = run(tmp_path, kind=kinds[1])
    for part in ("model", "ema", "averages", "optimizer"):
        assert_alike(alone[part], ended[part])


def test_the_shares_of_the_processes_are_the_rows_of_the_batch():
    for batch, size in ((16, 4), (15, 4), (4, 4), (7, 1)):
        rows = []
        for rank in range(size):
            together = DDP()
            together.rank, together.size = rank, size
            rows += together.share(batch)
        assert rows == list(range(batch))


def test_more_processes_than_rows_are_refused():
    together = DDP()
    together.size = 4
    with pytest.raises(RunError, match="batch_size=3 is of all processes together"):
        together.share(3)


def test_a_gradient_in_parts_is_that_of_the_whole(tmp_path):
    whole, parts = run(tmp_path / "1", size=1), run(tmp_path / "5", size=1, parts=5)
    assert_alike(whole, parts)
    assert any(not torch.equal(a, parts["model"][k]) for k, a in whole["model"].items())


@pytest.mark.parametrize(
    "what, kind",
    [
        ("conditional", "ddp"),
        ("conditional", "fsdp"),
        ("heads", "fsdp"),
        ("sliced", "ddp"),  # what fsdp names as the way out
    ],
)
def test_two_processes_train_other_networks_and_objectives_as_one_does(tmp_path, what, kind):
    alone = run(tmp_path / "one", size=1, what=what)
    assert_alike(alone, run(tmp_path / "two", kind=kind, what=what))


def test_by_fsdp_bfloat16_differs_from_one_process_by_its_rounding_alone(tmp_path, alone):
    """Losses are of the same rows, but gradients are rounded before their sum and not after it:
    that moves the curve by no more than what rounds all of them at all."""
    one = run(tmp_path / "one", size=1, what="bfloat16")
    two = run(tmp_path / "two", kind="fsdp", what="bfloat16")
    exact, half, parted = (torch.tensor(state["losses"]) for state in (alone, one, two))
    assert not torch.equal(exact, half)
    assert_close(parted[0], half[0], rtol=2e-4, atol=2e-5)
    assert float((parted - half).abs().max()) <= float((half - exact).abs().max())


def put_together(state: dict) -> dict:
    """The average of a width between those that were kept."""
    found = [Source(n, lambda kept=kept: kept) for n, kept in state["snapshots"].items()]
    snapshots = Snapshots(AVERAGES["power_ema"], found)
    return snapshots.put_together(snapshots.combination(0.07, state["iteration"]))


def test_an_average_put_together_from_snapshots_of_fsdp_is_that_of_one_process(tmp_path, alone):
    parted = run(tmp_path, kind="fsdp")
    assert list(parted["snapshots"]) == [2, 4, 6, 8]
    made = put_together(alone)
    assert_alike(made, put_together(parted))
    kept = alone["averages"]["power-0.1"]["model"]
    assert any(not torch.equal(value, kept[name]) for name, value in made["model"].items())


def test_a_process_of_fsdp_holds_its_share_and_only_the_first_is_told_the_whole(tmp_path):
    start(2, what_it_holds, tmp_path)
    (first, told), (second, none) = (
        json.loads((tmp_path / f"{n}.json").read_text()) for n in "01"
    )
    # weights, two numbers of AdamW and three averages, halved; a layer of few rows less evenly
    assert max(first, second) < 0.6 * (1 + 2 + 3) and first + second > 1 + 2 + 3
    assert told == 3 and none < 0.6 * 3


def test_weights_that_enter_no_loss_are_refused_by_ddp_and_told_by_name():
    network = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "idle": torch.nn.Linear(2, 1)})
    network["used"](torch.ones(3, 2)).sum().backward()
    together, weights = DDP(), list(network.parameters())
    together.collect(network, weights)  # alone it does not matter
    together.size = 2
    with pytest.raises(RunError, match="got none of 2, the first idle.weight. Freeze them"):
        together.collect(network, weights)
    network["idle"].requires_grad_(False)
    together.collect(network, weights)


def test_what_needs_second_derivatives_is_refused_by_fsdp():
    together = FSDP()
    together.check(SlicedScoreMatching())  # alone it is nothing special
    together.size = 2
    together.check(DenoisingScoreMatching())
    with pytest.raises(RunError, match="distributed=fsdp frees.*Take distributed=ddp"):
        together.check(SlicedScoreMatching())
