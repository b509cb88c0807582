"""Snapshots on disk, and which average of the weights a mode gets."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from test_training import assert_same, small_state, train

from experiment.checkpoint import CheckpointError, list_checkpoints, save_checkpoint
from experiment.chosen import choose
from experiment.errors import RunError
from experiment.posthoc import Kept, combined, norm_of
from experiment.snapshots import Snapshots, Source, cut_snapshots, save_snapshot
from experiment.training import Training

WIDTHS = [0.05, 0.1]
STEPS = 160
SETTINGS = Training(
    steps=STEPS,
    batch_size=8,
    ema=[0.9, 0.99],
    power_ema=WIDTHS,
    snapshot_every=10,
    log_every=STEPS,
    checkpoint_every=STEPS,
)
STORED = {"power_ema": WIDTHS}


def snapped(state, folder, settings=SETTINGS, **options):
    """Train, with snapshots and checkpoints in the directory of a run."""

    def keep(state):
        save_snapshot(folder / "snapshots", state.iteration, state.snapshot())

    def save(state):
        save_checkpoint(folder / "checkpoints", state.iteration, state.state_dict())

    return train(state, folder, settings, on_snapshot=keep, on_checkpoint=save, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, with the path of all its weights [steps, weights] and of the average of 0.07."""
    folder = tmp_path_factory.mktemp("run")
    settings = replace(SETTINGS, power_ema=[*WIDTHS, 0.07])
    state, path, direct = small_state(settings), [], []

    def look():
        path.append(flat(state.model.state_dict()))
        direct.append(flat(state.average(4).model.state_dict()))
        return 0

    snapped(state, folder, settings, should_stop=look)
    return folder, torch.stack(path), torch.stack(direct)


def flat(weights) -> torch.Tensor:
    floats = [v.double().flatten() for v in weights.values() if v.is_floating_point()]
    return torch.cat(floats)


def chosen(folder, asked, training=STORED):
    (path,) = list_checkpoints(folder / "checkpoints")
    return choose(asked, path, torch.load(path, weights_only=True), training)


def test_without_a_choice_it_is_the_first_average_and_has_no_name(trained):
    (path,) = list_checkpoints(trained[0] / "checkpoints")
    stored = torch.load(path, weights_only=True)
    for asked in (None, 0.9):
        found = chosen(trained[0], asked)
        assert (found.label.name, found.label.suffix, found.iteration) == ("", "", STEPS)
        assert found.label.as_row() == {}
        assert_same(dict(found.weights), stored["ema"])


def test_what_was_kept_is_taken_as_it_is(trained):
    (path,) = list_checkpoints(trained[0] / "checkpoints")
    stored = torch.load(path, weights_only=True)["averages"]
    for asked, name in (
        (0.99, "ema-0.99"),
        ("power:0.05", "power-0.05"),
        ("power:.1", "power-0.1"),
    ):
        found = chosen(trained[0], asked)
        assert_same(dict(found.weights), stored[name]["model"])
        assert found.label.as_row() == {"average": name, "average_error": None}
    earlier = chosen(trained[0], "power:0.1@50")
    (snapshot,) = (trained[0] / "snapshots").glob("step-00000050.pt")
    kept = torch.load(snapshot, weights_only=True)["averages"]["power-0.1"]["model"]
    assert_same(dict(earlier.weights), kept)
    assert (earlier.iteration, earlier.label.name) == (50, "power-0.1@50")


@pytest.mark.parametrize("iteration", [STEPS, 100])
def test_an_unseen_width_is_that_of_training_within_the_stated_error(trained, iteration, capsys):
    folder, path, direct = trained
    found = chosen(folder, "power:0.07" + ("" if iteration == STEPS else f"@{iteration}"))
    wanted = Kept(0.07, iteration)
    along = [Kept(w, t) for t in range(10, STEPS + 1, 10) for w in WIDTHS]
    expected = combined(along, wanted)
    assert found.label.error == expected.error and 0 < expected.error < 0.01
    assert f"its profile is off by {expected.error:.2g}" in capsys.readouterr().out
    spread = norm_of(wanted) * math.sqrt(STEPS) * path.std(0, correction=0)
    # float32 averages: each of `iteration` updates rounds, and so does what is stored
    rounding = 2**-24 * path.abs().amax(0) * (iteration + expected.coefficients.abs().sum())
    error = (flat(found.weights) - direct[iteration - 1]).abs()
    assert bool((error <= expected.error * spread + rounding).all())
    assert float(error.mean()) < 0.05 * float((direct[iteration - 1] - path[-1]).abs().mean())


def test_counts_are_no_averages_and_come_from_the_latest():
    def parts(weight, count):
        there = {"w": torch.tensor([weight]), "count": torch.tensor(count)}
        return {"power-0.1": {"model": there, "objective": {"head": torch.tensor([-weight])}}}

    there = [Source(10, lambda: parts(1.0, 3)), Source(20, lambda: parts(2.0, 9))]
    snapshots = Snapshots([0.1], there)
    mix = combined(snapshots.kept, Kept(0.15, 20))
    both = snapshots.put_together(mix)
    found = both["model"]
    assert float(found["w"]) == pytest.approx(
        float(mix.coefficients @ torch.tensor([1, 2.0]).double())
    )
    assert int(found["count"]) == 9 and found["w"].dtype == torch.float32
    assert torch.equal(both["objective"]["head"], -found["w"])


def test_a_resumed_run_writes_the_same_snapshots_and_cuts_those_of_a_path_left_behind(tmp_path):
    settings = replace(SETTINGS, steps=40, checkpoint_every=15)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    snapped(small_state(settings), straight, settings)

    with pytest.raises(KeyboardInterrupt):
        snapped(small_state(settings), killed, settings, should_stop=Killer(27))
    names = [path.name for path in list_checkpoints(killed / "snapshots")]
    assert names == ["step-00000010.pt", "step-00000020.pt"]
    state = small_state(settings, seed=3)
    state.load(torch.load(list_checkpoints(killed / "checkpoints")[-1], weights_only=True))
    assert state.iteration == 15 and cut_snapshots(killed / "snapshots", 15) == 1
    assert [path.name for path in (killed / "snapshots").iterdir() if "20" in path.name] == []
    snapped(state, killed, settings)
    for ours, theirs in zip(
        *(sorted((f / "snapshots").iterdir()) for f in (killed, straight)), strict=True
    ):
        assert ours.name == theirs.name
        if ours.suffix == ".pt":
            assert_same(*(torch.load(path, weights_only=True) for path in (ours, theirs)))
    assert len(list_checkpoints(straight / "snapshots")) == 4, "none is dropped"


class Killer:
    """Ends the process, as it were, after an iteration."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> int:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return 0


def test_a_snapshot_is_on_disk_before_the_checkpoint_of_its_iteration(tmp_path):
    order = []
    settings = replace(SETTINGS, steps=20, checkpoint_every=10)
    train(
        small_state(settings),
        tmp_path,
        settings,
        on_snapshot=lambda state: order.append(("snapshot", state.iteration)),
        on_checkpoint=lambda state: order.append(("checkpoint", state.iteration)),
    )
    assert order == [(what, n) for n in (10, 20) for what in ("snapshot", "checkpoint")]


@pytest.mark.parametrize(
    "asked, words",
    [
        (
            0.5,
            [
                "average=0.5 is not in checkpoint",
                "there are 0.9, 0.99, power:0.05, power:0.1, and",
            ],
        ),
        (True, ["average=True is not in"]),
        (1.5, ["average=1.5 is not in"]),
        ("powr:0.1", ["average=powr:0.1 is not in", "power:WIDTH by its snapshots"]),
        ("power:wide", ["power:wide needs a width > 0 and <= 0.28"]),
        ("power:0.3", ["power:0.3 needs a width"]),
        ("power:0.1@161", ["not seen; it is of iteration 160"]),
        ("power:0.1@0", ["not seen"]),
        (
            "power:0.01",
            [
                "off by",
                "widths 0.05, 0.1 at 16 iterations give widths 0.03 to 0.25",
                "this width at no iteration",
                "training.snapshot_every=N",
            ],
        ),
        ("power:0.05@155", ["iteration 155", "this width at iterations 10, 20, 30, ..., 160"]),
    ],
)
def test_a_choice_that_is_not_there_is_answered_with_those_there_are(trained, asked, words):
    with pytest.raises(RunError) as caught:
        chosen(trained[0], asked)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_run_without_power_averages_says_how_to_train_with_them(trained):
    with pytest.raises(RunError, match=r"kept none; train with training.power_ema=\[0.05,0.1\]"):
        chosen(trained[0], "power:0.1", training={})


def test_a_checkpoint_on_its_own_has_what_is_in_it_and_no_more(trained, tmp_path):
    (path,) = list_checkpoints(trained[0] / "checkpoints")
    state = torch.load(path, weights_only=True)
    alone = choose("power:0.1", tmp_path / "copy.pt", state, STORED)
    assert_same(dict(alone.weights), state["averages"]["power-0.1"]["model"])
    with pytest.raises(RunError, match="at 1 iteration give widths 0.04 to 0.12 "):
        choose("power:0.2", tmp_path / "copy.pt", state, STORED)


@pytest.mark.parametrize("damage", ["bit", "other"])
def test_a_damaged_snapshot_is_named_and_may_be_moved_away(tmp_path, damage):
    settings = replace(SETTINGS, steps=40, snapshot_every=5, checkpoint_every=40)
    snapped(small_state(settings), tmp_path, settings)
    path = tmp_path / "snapshots" / "step-00000030.pt"
    if damage == "bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        save_checkpoint(path.parent, 30, {"averages": {"power-0.2": {}}}, keep=None)
    with pytest.raises(CheckpointError, match=f"{path.name}: it is damaged, or no .*move it away"):
        chosen(tmp_path, "power:0.08")
    path.unlink()
    assert chosen(tmp_path, "power:0.08").label.error < 0.1


def test_snapshots_of_no_averages_are_refused():
    with pytest.raises(ValueError, match=r"snapshot_every is about .* add training.power_ema"):
        Training(snapshot_every=10)
    with pytest.raises(ValueError, match="snapshot_every to be a whole number >= 1"):
        Training(power_ema=[0.1], snapshot_every=0)
    assert json.dumps(Training(power_ema=[0.1], snapshot_every=1e3).snapshot_every) == "1000"
