"""What binds a run to its choices survives damage, and what may change is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_config import config_of, instantiate, measured, run_in, saved
from test_kills import the_run, trained, with_data

from experiment import identity
from experiment.checkpoint import CheckpointError
from experiment.errors import RunError
from experiment.ledger import evaluated
from experiment.run import Run
from experiment.side_files import read_json

DAMAGE = {
    "empty": b"",
    "torn": b'{"name": "a-r',
    "no text": b"\xff\xfe\x00\x01",
    "a number": b"5",
    "null": b"null",
}


def begun(root: Path, **changes) -> Run:
    """A run with a directory, a configuration and one whole checkpoint."""
    run = measured(run_in(root, **changes))
    run.path.mkdir()
    run.write_config()
    saved(run)
    return run


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_config_yaml_is_written_again_from_the_newest_checkpoint(
    tmp_path, capsys, content
):
    run = begun(tmp_path)
    path = run.path / "config.yaml"
    path.write_bytes(content)
    other = replace(run, config={**run.config, "seed": 4})
    with pytest.raises(RunError, match="holds a run with other choices .seed: 0 -> 4."):
        other.write_config()
    assert yaml.safe_load(path.read_text()) == run.config
    assert (run.path / "config.yaml.damaged").read_bytes() == content
    assert "written again from step-00000007.pt" in capsys.readouterr().out


def test_without_config_yaml_a_run_is_still_bound_to_its_choices(tmp_path):
    run = begun(tmp_path)
    (run.path / "config.yaml").unlink()
    with pytest.raises(RunError, match="seed: 0 -> 4"):
        replace(run, config={**run.config, "seed": 4}).write_config()
    run.write_config()
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == run.config


def test_without_any_whole_file_nothing_is_taken_for_granted(tmp_path):
    run = begun(tmp_path)
    (run.path / "config.yaml").write_bytes(b"")
    (run.checkpoints / "step-00000007.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="run.fresh=true, which keeps the files"):
        run.write_config()


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("kind", [dict, list])
def test_a_damaged_json_file_is_kept_aside_and_reads_as_empty(tmp_path, capsys, content, kind):
    path = tmp_path / "some.json"
    assert read_json(path, kind) == kind(), "none is no damage"
    path.write_bytes(content)
    assert read_json(path, kind) == kind()
    assert not path.exists() and (tmp_path / "some.json.damaged").read_bytes() == content
    assert "is damaged; it is kept as some.json.damaged" in capsys.readouterr().out


def test_rows_of_a_ledger_that_are_no_rows_are_passed_over(tmp_path):
    row = {"iteration": 3, "checkpoint": "step-00000003.pt", "num_samples": 8}
    (tmp_path / "likelihood.json").write_text(json.dumps([1, "x", None, row]))
    assert evaluated(tmp_path, 3, 8) and not evaluated(tmp_path, 4, 8)


def test_allowed_changes_are_said_noted_and_from_then_on_the_runs_own(tmp_path, capsys):
    run = begun(tmp_path)
    wanted = {**run.config, "training": {"steps": 10, "lr": 0.2}}
    with pytest.raises(RunError, match=r'go on with the new values by "resume.allow_change=\[tr'):
        replace(run, config=wanted).check_config()
    changed = replace(run, config=wanted | {"resume": {"allow_change": ["training.lr"]}})
    changed.check_config()
    assert not capsys.readouterr().out
    changed.write_config()
    assert "going on with other choices: training.lr: 0.1 -> 0.2" in capsys.readouterr().out
    run.write_config()  # nothing was trained with it yet: the run is what it was
    changed.set_state("failed")
    run.write_config()

    changed.write_config()
    changed.set_state("stopped")
    replace(run, config=wanted).write_config()
    with pytest.raises(RunError, match="training.lr: 0.2 -> 0.1"):
        run.write_config()
    notes = json.loads((run.path / "run.json").read_text())
    assert ["training.lr: 0.1 -> 0.2"] in notes.values() and notes["state"] == "stopped"


@pytest.mark.parametrize("allowed", ["training.lr", ["training.lrr"], [3], [None], 5])
def test_what_is_allowed_to_change_is_a_list_of_keys_that_exist(tmp_path, allowed):
    run = begun(tmp_path)
    with pytest.raises(RunError, match=r'as in "resume.allow_change=\[training.lr\]"; got '):
        replace(run, config={**run.config, "resume": {"allow_change": allowed}}).write_config()


def test_going_on_with_another_torch_is_said_to_be_the_same_statistically(
    tmp_path, capsys, monkeypatch
):
    run = begun(tmp_path)
    run.write_config()
    assert "versions" not in capsys.readouterr().out
    now = identity.versions()
    monkeypatch.setattr(identity, "versions", lambda: now | {"torch": "99.1"})
    run.write_config()
    said = capsys.readouterr().out
    assert f"torch {torch.__version__} -> 99.1" in said and "statistically the same" in said
    run.write_config()
    assert "versions" not in capsys.readouterr().out, "once a change"


def test_a_run_with_all_its_side_files_damaged_goes_on_from_the_command_line(tmp_path):
    with_data(tmp_path)
    assert trained(tmp_path, "training.steps=3").returncode == 0
    run = the_run(tmp_path)
    for name in ("run.json", "config.yaml", "likelihood.json"):
        (run / name).write_bytes(b"[torn")
    (run / "metrics.jsonl").write_bytes(b"\x00\xff{\n" + (run / "metrics.jsonl").read_bytes())
    result = trained(tmp_path, "training.steps=6")
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout and result.stdout.count("is damaged") == 3
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert len(json.loads((run / "likelihood.json").read_text())) == 1
    assert len(list(run.glob("*.damaged"))) == 3
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    trace = [row["train/iteration"] for row in rows if "train/loss" in row]
    assert trace == list(range(1, 7))
    assert b"\xff{" in (run / "metrics.jsonl.orphaned").read_bytes()


def test_a_seed_may_be_written_1e3(tmp_path):
    assert Run(config_of(tmp_path, seed=1e3), instantiate).seed == 1000
    assert isinstance(Run(config_of(tmp_path, seed=np.float64(7)), instantiate).seed, int)
