"""Checkpoints: every bit comes back, damage is noticed, a crash costs one save at most."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from experiment import checkpoint
from experiment.checkpoint import (
    CheckpointError,
    Saver,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    load_weights,
    remove_partial_files,
    restoring,
    save_checkpoint,
    stored_config,
    write_atomically,
)
from experiment.errors import RunError

ROOT = Path(__file__).resolve().parents[1]


def example(seed: int = 0) -> dict:
    """A small state with all that a real one has: weights, averages, what optimiser and objective
    remember, text."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(16, 16)
    for weights in model.parameters():
        nn.init.normal_(weights, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 16, generator=generator)).square().sum().backward()
    optimizer.step()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {
        "config": json.dumps({"seed": seed, "sde": {"t_min": 1e-5}}),
        "model": weights,
        "ema": {name: 0.5 * value for name, value in weights.items()},
        "emas": {"0.99": {name: 0.9 * value for name, value in weights.items()}},
        "objective": {"history": torch.randn(8, 10, generator=generator), "counts": [1, 2]},
        "optimizer": optimizer.state_dict(),
    }


def same(a, b) -> bool:
    """Whether two states agree in type, and tensors in every bit, NaN and -0 included."""
    if isinstance(a, torch.Tensor):
        flat_a, flat_b = a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat_a, flat_b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def digest_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    state = example() | {
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64),
        "half": torch.tensor([1.0, 3e-7], dtype=torch.bfloat16),
        "nested": [{"count": torch.tensor(7), "flag": True}, "ünïcode", None, 0.1],
    }
    path = save_checkpoint(tmp_path / "made" / "on the way", 1200, state)

    loaded = load_checkpoint(path)
    assert path.name == "step-00001200.pt" and loaded["iteration"] == 1200
    assert same({key: loaded[key] for key in state}, state)
    assert stored_config(path, loaded) == {"seed": 0, "sde": {"t_min": 1e-5}}


def test_the_digest_beside_it_is_what_sha256sum_checks(tmp_path):
    path = save_checkpoint(tmp_path, 3, example())
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest_of(path).read_text() == f"{expected}  step-00000003.pt\n"
    if shutil.which("sha256sum"):
        command = ["sha256sum", "-c", digest_of(path).name]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
        flip(path, 100, 0)
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_with_their_digests_and_nothing_else(tmp_path, keep):
    for iteration in (5, 10, 100, 1000, 20_000):
        save_checkpoint(tmp_path, iteration, example(), keep=keep)
    kept = [f"step-{iteration:08d}.pt" for iteration in (5, 10, 100, 1000, 20_000)[-keep:]]
    assert [path.name for path in list_checkpoints(tmp_path)] == kept
    assert names(tmp_path) == sorted(kept + [f"{name}.sha256" for name in kept])


def test_two_are_kept_unless_told_otherwise(tmp_path):
    for iteration in (1, 2, 3):
        save_checkpoint(tmp_path, iteration, example())
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000002.pt",
        "step-00000003.pt",
    ]


def test_damaged_later_checkpoints_do_not_push_out_the_good_ones(tmp_path):
    good = save_checkpoint(tmp_path, 2, example())
    for iteration in (8, 9):
        save_checkpoint(tmp_path, iteration, example(), keep=9).write_bytes(b"damaged")
    written = save_checkpoint(tmp_path, 3, example())  # the run went on from 2
    assert load_newest(tmp_path)[0] == written
    assert good.is_file() and digest_of(good).is_file()


def test_the_newest_is_found_by_scanning_and_other_files_are_passed_over(tmp_path):
    assert load_newest(tmp_path) is None and load_newest(tmp_path / "nowhere") is None
    for iteration in (9, 10):  # by number, not by name or time
        save_checkpoint(tmp_path, iteration, example(iteration))
    for name in ("step-99999999.pt.partial", "step-9.pt", "step-00000011.pt.bak", "best.pt"):
        (tmp_path / name).write_bytes(b"no checkpoint")
    os.utime(tmp_path / "step-00000009.pt")
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["step-00000009.pt", "step-00000010.pt"]
    path, state = load_newest(tmp_path)
    assert path.name == "step-00000010.pt" and same(state["model"], example(10)["model"])


# fault 13: each way in which a file is no checkpoint, and what the message says of it
REFUSED = {
    "empty": (lambda good: b"", "the file is empty"),
    "random bytes": (lambda good: bytes(range(7, 251)) * 20, "no checkpoint or was cut short"),
    "cut to one byte": (lambda good: good[:1], "no checkpoint or was cut short"),
    "cut in half": (lambda good: good[: len(good) // 2], "no checkpoint or was cut short"),
    "cut by one byte": (lambda good: good[:-1], "no checkpoint or was cut short"),
}


@pytest.mark.parametrize("damage, words", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("digest", [True, False], ids=["with digest", "without"])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, damage, words, digest):
    path = save_checkpoint(tmp_path, 3, example())
    path.write_bytes(damage(path.read_bytes()))
    if not digest:
        digest_of(path).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert words in message or (digest and "SHA-256 differs" in message)
    assert "train again" in message


@pytest.mark.parametrize("digest", [b"", b"\xff\xfe\x00", b"0" * 64 + b"  step-00000003.pt\n"])
def test_a_digest_that_does_not_fit_is_damage_too(tmp_path, digest):
    path = save_checkpoint(tmp_path, 3, example())
    digest_of(path).write_bytes(digest)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load_checkpoint(path)


def test_a_missing_file_a_directory_and_a_path_through_a_file_are_told_apart(tmp_path):
    path = save_checkpoint(tmp_path, 3, example())
    for wrong, words in (
        (tmp_path / "step-00000004.pt", "no such file; run `python run.py mode=train`"),
        (tmp_path, "it is a directory; pass the .pt file inside it"),
        (path / "step-00000003.pt", "cannot be read"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(wrong)
        assert words in str(caught.value) and str(wrong) in str(caught.value)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_version_is_refused_the_future_one_too(tmp_path, version):
    path = save_checkpoint(tmp_path, 3, example() | {"version": version})
    with pytest.raises(CheckpointError, match=f"format version {version}, this program reads 1"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3), "text"])
def test_a_torch_file_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match="none of ours; pass a file written by mode=train"):
        load_checkpoint(tmp_path / "theirs.pt")


@pytest.mark.parametrize("state", [{}, {"config": None}, {"config": "{torn"}])
def test_a_checkpoint_without_its_configuration_says_so(tmp_path, state):
    path = save_checkpoint(tmp_path, 3, state)
    with pytest.raises(CheckpointError, match="configuration is missing or damaged"):
        stored_config(path, load_checkpoint(path))


def test_weights_of_another_architecture_are_listed_and_none_is_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 1, bias=False), nn.Tanh()).state_dict()
    weights["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, tmp_path / "other.pt")
    differences = str(caught.value).split("fit the network: ")[1].split("; rebuild")[0]
    assert differences.split("; ") == [
        "1.bias missing",
        "extra unknown",
        "0.weight (4, 2) where the model has (3, 2)",
        "0.bias (4,) where the model has (3,)",
    ]
    assert same(dict(model.state_dict()), before)


def test_eight_differences_are_listed_and_the_rest_is_counted(tmp_path):
    deep = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))
    with pytest.raises(CheckpointError) as caught:
        load_weights(deep, {}, tmp_path / "other.pt")
    assert str(caught.value).count("missing") == 8 and "and 12 more;" in str(caught.value)


def test_weights_that_fit_are_loaded_bit_for_bit(tmp_path):
    model, other = nn.Linear(16, 16), example()["ema"]
    load_weights(model, other, tmp_path / "fits.pt")
    assert same(dict(model.state_dict()), other)


def storage_positions(path: Path, count: int) -> list[int]:
    """Places drawn evenly over the bytes of all tensors in an archive: model, EMA, optimiser."""
    content, places = path.read_bytes(), []
    for member in zipfile.ZipFile(path).infolist():
        if "/data/" in member.filename:
            start = member.header_offset + 30  # then name and padding, whose lengths stand here:
            start += sum(
                int.from_bytes(content[start - i : start - i + 2], "little") for i in (4, 2)
            )
            places += range(start, start + member.file_size)
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:count]
    return [places[i] for i in chosen.tolist()]


@pytest.mark.parametrize("digest", [True, False], ids=["with digest", "by the CRC alone"])
def test_one_flipped_bit_is_noticed_and_the_checkpoint_before_it_is_taken(
    tmp_path, caplog, digest
):
    previous = save_checkpoint(tmp_path, 3, example(3))
    newest = save_checkpoint(tmp_path, 6, example(6))
    if not digest:
        digest_of(newest).unlink()
    assert load_newest(tmp_path)[0] == newest
    for place in storage_positions(newest, 40):
        flip(newest, place, place % 8)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            path, state = load_newest(tmp_path)
        assert path == previous and same(state["model"], example(3)["model"])
        (warning,) = caplog.messages
        assert str(newest) in warning and "damaged" in warning and "one before it" in warning
        flip(newest, place, place % 8)
    assert load_newest(tmp_path)[0] == newest, "each bit was put back"


def test_a_flipped_bit_in_the_index_of_the_archive_is_refused_or_without_effect(tmp_path):
    path = save_checkpoint(tmp_path, 3, example())
    digest_of(path).unlink()
    state, good = load_checkpoint(path), path.read_bytes()
    start = zipfile.ZipFile(path).start_dir
    entries = [i for i in range(start, len(good)) if good[i : i + 4] == b"PK\x01\x02"]
    marks = [(8, 0), (10, 3), (38, 4)]  # encrypted, deflated, a directory: torch reads no data
    special = [(entry + offset, bit) for entry in entries for offset, bit in marks]
    for position, bit in [*special, *((i, i % 8) for i in range(start, len(good), 5))]:
        flip(path, position, bit)
        try:
            assert same(load_checkpoint(path), state), (position - start, bit)
        except CheckpointError:
            pass
        path.write_bytes(good)


def test_if_all_are_damaged_training_does_not_start_over_unasked(tmp_path, caplog):
    for iteration in (3, 6):
        save_checkpoint(tmp_path, iteration, example()).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="nor can any other of the 2 .* run.fresh=true"):
        load_newest(tmp_path)
    tried = ["trying the one before it" in record.message for record in caplog.records]
    assert tried == [True, False], "before the oldest there is none"


class Bomb:
    """Runs code when it is unpickled: makes the directory ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def in_the_state(path: Path, bomb: Bomb) -> None:
    save_checkpoint(path.parent, 3, example() | {"optimizer": bomb})


def in_the_old_format(path: Path, bomb: Bomb) -> None:
    torch.save({"model": bomb}, path, _use_new_zipfile_serialization=False)


def bare(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps(bomb, protocol=2))


@pytest.mark.parametrize("digest", [True, False], ids=["with digest", "without"])
@pytest.mark.parametrize("plant", [in_the_state, in_the_old_format, bare])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(tmp_path, plant, digest):
    marker, path = tmp_path / "marker", tmp_path / "step-00000003.pt"
    plant(path, Bomb(marker))
    digest_of(path).unlink(missing_ok=True)
    if digest:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest_of(path).write_text(f"{content}  {path.name}\n")
    with pytest.raises(CheckpointError, match="could run code; refused|no checkpoint"):
        load_checkpoint(path)
    assert not marker.exists()
    if plant is not bare:
        torch.load(path, weights_only=False)
        assert marker.exists(), "it was live"


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.mark.parametrize("moment", ["before the digest", "before the file"])
def test_a_crash_within_a_save_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch, moment):
    save_checkpoint(tmp_path, 3, example(3))
    before = names(tmp_path)
    replace = os.replace

    def die(source, target):
        if Path(target).suffix == (".sha256" if moment == "before the digest" else ".pt"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", die)
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 6, example(6))
    monkeypatch.undo()

    path, state = load_newest(tmp_path)
    assert path.name == "step-00000003.pt" and same(state["model"], example(3)["model"])
    assert names(tmp_path) != before
    remove_partial_files(tmp_path)
    assert names(tmp_path) == before, "at the next start what the killed writer left is removed"
    assert load_newest(tmp_path)[0] == path
    save_checkpoint(tmp_path, 6, example(6))
    assert load_newest(tmp_path)[0].name == "step-00000006.pt"


def test_left_over_files_are_removed_by_exact_pattern(tmp_path):
    kept = [
        "step-1.pt.partial",
        "step-00000001.pt.partial.txt",
        "step-00000001.pt.backup.partial",
        "my-step-00000001.pt.partial",
        "thesis.partial",
        "step-1.pt.sha256",
        "step-00000003.pt",
        "step-00000003.pt.sha256",
    ]
    gone = [
        "step-00000001.pt.partial",
        "step-00000001.pt.sha256.partial",
        "step-00000002.pt.sha256",
    ]
    for name in kept + gone:
        (tmp_path / name).write_bytes(b"x")
    remove_partial_files(tmp_path)
    assert names(tmp_path) == sorted(kept)
    remove_partial_files(tmp_path / "nowhere")


def test_on_a_full_disk_the_old_checkpoint_stays_and_no_partial_file(tmp_path):
    before = save_checkpoint(tmp_path, 3, example())
    listing = names(tmp_path)
    script = (
        "import resource, sys\nfrom pathlib import Path\nimport torch\n"
        "from experiment.checkpoint import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    save_checkpoint(Path(sys.argv[1]), 6, {'model': torch.zeros(10_000)})\n"
        "except OSError as error:\n    print('refused:', error.strerror)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("refused: File too large"), result.stderr
    assert names(tmp_path) == listing
    assert load_newest(tmp_path)[0] == before


def test_writing_replaces_the_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["config.yaml"]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*config.yaml"):
        write_atomically(path, b"newer, but torn")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize("iteration", [None, "7", 1.5, -1])
def test_a_checkpoint_whose_iteration_is_no_number_of_iterations_is_refused(tmp_path, iteration):
    path = save_checkpoint(tmp_path, 3, example() | {"iteration": iteration})
    with pytest.raises(CheckpointError, match=f"its iteration is {iteration!r}, no whole number"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (5, "weight int where the model has"),
        (torch.ones(16, 16, dtype=torch.int64), r"\(16, 16\) torch.int64 where the model has"),
        (None, "weight NoneType where"),
    ],
    ids=["a number", "whole numbers", "nothing"],
)
def test_weights_that_are_no_real_numbers_are_refused(tmp_path, spoiled, words):
    model = nn.Linear(16, 16)
    with pytest.raises(CheckpointError, match=words):
        load_weights(model, example()["ema"] | {"weight": spoiled}, tmp_path / "odd.pt")


def test_weights_of_another_precision_fit(tmp_path):
    model = nn.Linear(16, 16)
    half = {name: value.to(torch.bfloat16) for name, value in example()["ema"].items()}
    load_weights(model, half, tmp_path / "half.pt")
    assert torch.equal(model.weight, half["weight"].float())


@pytest.mark.parametrize("part", ["state", "param_groups"])
def test_what_does_not_fit_a_run_is_told_as_damage_of_the_file(tmp_path, part):
    state = example()["optimizer"]
    del state[part]
    optimizer = torch.optim.AdamW(nn.Linear(16, 16).parameters())
    with pytest.raises(
        CheckpointError, match=f"does not fit this run .KeyError: .*{part}"
    ) as told:
        with restoring(tmp_path / "a.pt"):
            optimizer.load_state_dict(state)
    assert "\n" not in str(told.value) and "run.fresh=true" in str(told.value)


def test_errors_of_ours_pass_and_bugs_of_other_kinds_too(tmp_path):
    for error in (RunError("as it is"), ZeroDivisionError()):
        with pytest.raises(type(error)) as caught:
            with restoring(tmp_path / "a.pt"):
                raise error
        assert caught.value is error


def test_a_full_disk_costs_checkpoints_until_patience_ends(tmp_path, monkeypatch, capsys):
    save = Saver(tmp_path, patience=2)
    assert save(1, example(1))
    replace = os.replace

    def full(source, target):
        if Path(target).suffix == ".pt":
            raise OSError(28, "No space left on device")
        replace(source, target)

    for again in range(2):  # a save that works is a fresh start
        monkeypatch.setattr(checkpoint.os, "replace", full)
        for iteration in (2, 3):
            assert not save(iteration, example())
            assert "No space left on device" in capsys.readouterr().out
        assert load_newest(tmp_path)[0].name == f"step-0000000{1 + 4 * again}.pt"
        monkeypatch.undo()
        assert save(5, example(5))
    monkeypatch.setattr(checkpoint.os, "replace", full)
    assert not save(6, example()) and not save(7, example())
    with pytest.raises(RunError, match="iteration 8 .*last of 3 in a row.*from .*00000005.pt"):
        save(8, example())
    assert load_newest(tmp_path)[0].name == "step-00000005.pt"
    assert not list(tmp_path.glob("*.partial"))


def test_the_first_and_the_last_checkpoint_have_to_be_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(RunError, match="make room on the disk.*goes on from the beginning"):
        Saver(tmp_path)(1, example())
    monkeypatch.undo()
    Saver(tmp_path)(1, example())
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(RunError, match="goes on from .*step-00000001.pt"):
        Saver(tmp_path)(2, example(), last=True)
