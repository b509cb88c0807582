"""Sweeps: every job in a directory of its own, and what became of each."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_cli import TINY, refused, run

import run as entry
from experiment import last_words
from experiment.errors import LostError, RunError
from experiment.rehearsal import rehearse
from experiment.sweep import LONGEST, Job, Sweep, jobs, suffix, table

TEMPLATE = "${hydra:runtime.choices.data}-${hydra:runtime.choices.sde}"


def parsed(*overrides):
    return OverridesParser.create().parse_overrides([*overrides])


def launchers(name):
    """Whether a launcher of hydra is installed."""
    try:
        return find_spec(f"hydra_plugins.hydra_{name}_launcher") is not None
    except ModuleNotFoundError:
        return False


def named(*overrides, constant=(), checkpoint=None, mode="experiment.train.train"):
    job = Job("folder", 0, overrides, constant)
    config = {"checkpoint": checkpoint, "mode": {"_target_": mode}}
    return job.name("digits-vp", TEMPLATE, config)


def test_jobs_are_all_combinations_in_the_order_in_which_hydra_numbers_them():
    given = ["seed=3,4", "sde=vp,ve,edm", "training.lr=1e-3,3e-3", "mode=train", "seed=range(2)"]
    asked = parsed(*given)
    (batch,) = BasicSweeper.split_arguments(asked, max_batch_size=None)
    assert jobs(asked) == batch and len(batch) == 12


def test_an_interval_is_no_list_of_values():
    with pytest.raises(RunError, match="write training.lr=A,B,C"):
        jobs(parsed("training.lr=interval(0,1)"))


def test_a_name_tells_what_is_swept_and_is_not_told_already():
    swept = ("sde=ve", "training.lr=0.003", "training.steps=5", "seed=1")
    assert named(*swept, constant=["training.steps"]) == "digits-vp-lr_0.003-seed_1"
    assert named("sde=ve", "mode=train") == "digits-vp"
    assert named("run.name=a") == "digits-vp"
    config = {"checkpoint": None, "mode": {"_target_": "experiment.train.train"}}
    assert Job("folder", 0, ["sde=ve"], ()).name("mine", "mine", config) == "mine-sde_ve"


def test_other_modes_find_the_runs_of_a_sweep_by_what_was_trained():
    by = {"mode": "experiment.sample.sample"}
    swept = ("training.lr=0.003", "sampler=heun", "sampler.steps=3", "mode.num_samples=2")
    assert named(*swept, **by) == "digits-vp-lr_0.003"
    assert named("training.lr=0.003", checkpoint="a.pt", **by) == "digits-vp"
    assert named("sampler=heun", "speed.precision=bfloat16") == (
        "digits-vp-sampler_heun-precision_bfloat16"
    )


def test_names_of_jobs_differ_and_need_no_quotes_whatever_the_values():
    values = ["[1,2]", "[1,2,2]", "'a b'", "a_b", '"a b"', "x" * 200, "x" * 201, "é", "1/2", "12"]
    chosen = [{"network.a": a, "training.a": b} for a, b in product(values, values)]
    names = [suffix(one) for one in chosen]
    assert len({*names}) == len(chosen)
    assert all(len(name) <= LONGEST and re.fullmatch(r"-[\w.+-]+", name, re.A) for name in names)
    assert suffix({}) == ""


def test_a_sweep_over_places_is_refused(tmp_path):
    with pytest.raises(RunError, match="run.root is one place"):
        Sweep(tmp_path, parsed("run.root=a,b"))


def test_the_last_of_two_choices_of_a_key_decides_whether_it_is_swept(tmp_path):
    assert Sweep(tmp_path, parsed("seed=1", "seed=1,2", "mode=train")).constant == ["mode"]
    assert Sweep(tmp_path, parsed("seed=1,2", "seed=1")).constant == ["seed"]


CONFIG = {"mode": {"_target_": "experiment.sample.sample"}}


def leave(code):
    raise SystemExit(code)


def test_what_became_of_each_job_is_noted_and_the_exit_code_tells(tmp_path, capsys):
    sweep = Sweep(tmp_path, [])
    sweep.folder.mkdir(parents=True)
    actions = [lambda: None, lambda: 1 / 0, lambda: leave(0), lambda: open("/nowhere/at/all")]
    with pytest.raises(SystemExit) as left, sweep:
        for number, action in enumerate(actions):
            job = Job(sweep.folder, number, [f"seed={number}"], ())
            job.carry_out(action, CONFIG, tmp_path)
    assert left.value.code == 1
    notes = [json.loads(p.read_text()) for p in sorted(sweep.folder.glob("job-*.json"))]
    assert [note["good"] for note in notes] == [True, False, True, False]
    printed = capsys.readouterr()
    assert "1    failed: ZeroDivisionError" in printed.out and "2    stopped" in printed.out
    assert "error: job 3: [Errno 2]" in printed.err


def test_a_signal_stops_the_sweep_and_a_job_that_died_is_told(tmp_path):
    job = Job(tmp_path, 0, [], ())
    with pytest.raises(SystemExit):
        job.carry_out(lambda: leave(143), CONFIG, tmp_path)
    assert json.loads((tmp_path / "job-0000.json").read_text())["result"] == "stopped"

    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.carry_out(die, CONFIG, tmp_path)
    note = json.loads((tmp_path / "job-0000.json").read_text())
    assert note["result"] == "died" and "died" in table([note])


def test_a_sweep_from_the_command_line(tmp_path):
    asked = ["mode=train", *TINY, "training.steps=1", "-m", "training.batch_size=8000,8"]
    result = run(*asked, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    name = "digits-vp-unet-batch_size_8"
    assert runs == {name, "sweeps"}, "a job that is refused leaves nothing and stops no other"
    command = json.loads((tmp_path / "runs" / name / "run.json").read_text())["command"]
    assert command.startswith("python run.py mode=train") and f"run.name={name}" in command
    report = result.stdout.splitlines()[-3:]
    assert report[0].split() == ["job", "result", "directory", "choices"]
    assert "failed: training.batch_size=8000" in report[1] and "bits/dim" in report[2]


def test_what_any_job_would_be_refused_for_without_data_is_told_before_the_first(tmp_path):
    swept = ["training.clip=1,-1", "seed=0,1", "speed.accumulate=1,9"]
    result = run("mode=train", *TINY, "--multirun", *swept, cwd=tmp_path)
    refused(result, "6 of 8 jobs cannot begin")
    first, second = result.stderr.splitlines()[:2]
    assert first.startswith("job 1: training.clip=1 seed=0 speed.accumulate=9 (and 1 more): ")
    assert "speed.accumulate=9 is more than the 8 samples" in first
    assert second.startswith("job 4: training.clip=-1 seed=0 speed.accumulate=1 (and 3 more): ")
    assert "training needs clip" in second
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("seed", -1, "seed must be a whole number"),
        ("threads", 0, "threads"),
        ("checkpoint", "a.pt", "for mode=likelihood and mode=sample"),
        ("sampler", {"_target_": "sde_lib.samplers.DDIM", "steps": 0}, "steps"),
        ("objective", {"_target_": "score_models.UniformTimes", "zzz": 0}, "zzz"),
        ("augment", {"_target_": "experiment.augment.HorizontalFlip", "probability": 2}, "prob"),
        ("tracking", {"_target_": "experiment.trackers.WandbTracker", "mode": "x"}, "mode"),
        ("tracking", {"_target_": "experiment.trackers.TrackioTracker"}, "needs the package"),
    ],
)
def test_the_rehearsal_of_a_job_makes_every_part_that_needs_no_data(
    key, value, told, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with hydra.initialize_config_dir(str(entry.CONF), version_base="1.3"):
        config = entry.compose(["mode=train", "tracking=none"], resolve=True)
    config["data"] = {"_target_": "experiment.data.digits", "no_such_argument": 1}
    rehearse([config], ["all"], entry.instantiate)
    with pytest.raises(RunError, match="1 of 2 jobs cannot begin"):
        rehearse([config, config | {key: value}], ["first", "second"], entry.instantiate)
    said = capsys.readouterr().err
    assert said.startswith("job 1: second: ") and told in said


def test_a_typo_in_any_value_of_a_sweep_is_told_before_the_first_job(tmp_path):
    refused(run("-m", "sde=vp,vee", cwd=tmp_path), "unknown sde=vee")
    refused(run("-m", "seed=0,1", "hydra/launcher=nobody", cwd=tmp_path), "pip install '.[sweep]'")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not launchers("joblib"), reason="needs the extra sweep")
def test_jobs_of_joblib_run_beside_each_other(tmp_path):
    asked = ["-m", "mode=train", *TINY, "training.steps=2", "seed=0,1"]
    result = run(*asked, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", cwd=tmp_path, env={})
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "digits-vp-unet-seed_0",
        "digits-vp-unet-seed_1",
        "sweeps",
    }


def test_of_many_processes_with_one_failure_one_says_it_and_a_lost_one_only_if_nobody_did(
    monkeypatch,
):
    import torch.distributed as dist

    kept = {}

    def add(key, number):
        kept[key] = kept.get(key, 0) + number
        return kept[key]

    monkeypatch.setattr(dist, "TCPStore", lambda *a, **k: None)
    monkeypatch.setattr(dist, "PrefixStore", lambda *a: SimpleNamespace(add=add))
    for name, value in {"WORLD_SIZE": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    said = last_words.last_words(LostError(RuntimeError("Connection closed")))
    assert said.startswith("error: another process of this run has ended")
    assert last_words.last_words(LostError(RuntimeError("Broken pipe"))) == 1
    assert last_words.last_words(RunError("a")) == "error: a"
    assert last_words.last_words(RunError("a")) == 1
    assert last_words.last_words(RunError("b")) == "error: b"
    kept.clear()
    assert last_words.last_words(RunError("a")) == "error: a"
    assert last_words.last_words(LostError(RuntimeError("gloo"))) == 1
