"""Averages from the command line: kept in training, put together after it, chosen by each mode."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from test_cli import refused, run

from experiment.checkpoint import list_checkpoints
from experiment.chosen import refuse_all
from experiment.errors import RunError
from experiment.exhibits import drawn_by

DATA = ["data=arrays", "data.path=gaussian.npy", "network=mlp", "likelihood=exact"]
SMALL = ["network.width=16", "network.blocks=1", "tracking=none", "run.name=g", "device=cpu"]
SPEED = ["likelihood.solver.nodes=8", "likelihood.max_samples=10", "sampler.steps=3"]
LENGTH = ["training=vectors", "training.steps=48", "training.batch_size=32", "training.warmup=5"]
EVERY = ["training.checkpoint_every=20", "training.evaluate_every=1000", "training.log_every=20"]
KEPT = ["training.ema=[0.95,0.5]", "training.power_ema=[0.05,0.1]", "training.snapshot_every=6"]
CHOICES = [*DATA, *SMALL, *SPEED]
TRAIN = [*CHOICES, *LENGTH, *EVERY, *KEPT, "mode=train"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    values = np.random.default_rng(0).normal(size=(400, 3)) * [2.0, 0.5, 1.0]
    np.save(folder / "gaussian.npy", values.astype(np.float32))
    result = run(*TRAIN, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def the_run(folder):
    return folder / "runs" / "g"


def rows(folder):
    return json.loads((the_run(folder) / "likelihood.json").read_text())


def test_two_widths_are_kept_and_a_third_is_put_together_and_scored(trained):
    names = [path.name for path in list_checkpoints(the_run(trained) / "snapshots")]
    assert names == [f"step-{n:08d}.pt" for n in range(6, 49, 6)]
    before = len(rows(trained))
    for asked in ("power:0.05", "power:0.07", "0.5", "power:0.07@30"):
        result = run("mode=likelihood", *CHOICES, f"average={asked}", cwd=trained)
        assert result.returncode == 0, result.stderr
    found = {row.get("average"): row for row in rows(trained)}
    assert len(rows(trained)) == before + 4 and set(found) == {
        None, "power-0.05", "power-0.07", "ema-0.5", "power-0.07@30",
    }  # fmt: skip
    assert found["power-0.07"]["average_error"] < 0.02 and "average_error" not in found[None]
    assert found["power-0.07@30"]["iteration"] == 30
    assert len({row["value"] for row in found.values()}) == 5
    files = {path.name for path in the_run(trained).glob("likelihood-*.npz")}
    assert len([name for name in files if "-power-0.07-" in name]) == 1
    page = (the_run(trained) / "report.html").read_text()
    headline = re.search(r'class="result">(.*?)<', page)[1]
    assert f"{found[None]['value']:.1f}" in headline, "that of the average of training"
    logged = (the_run(trained) / "metrics.jsonl").read_text()
    assert logged.count("eval/nll_stderr") == before, "nor do others enter the record"


def test_samples_and_what_is_fitted_belong_to_the_average(trained):
    drawn = {}
    for asked in ("0.95", "power:0.07", "power:0.1"):
        few = ["mode.num_samples=4", "sampler=flow_adams", "sampler.steps=8"]
        result = run("mode=sample", *CHOICES, *few, f"average={asked}", cwd=trained)
        assert result.returncode == 0, result.stderr
        notes = (the_run(trained) / "samples").glob("*.json")
        found = [(json.loads(note.read_text()), note) for note in notes]
        about, path = max(found, key=lambda pair: pair[0]["drawn"])
        drawn[about.get("average")] = np.load(path.with_suffix(".npz"))
    assert set(drawn) == {None, "power-0.07", "power-0.1"}
    assert {str(arrays["average"]) for arrays in drawn.values()} == {"", "power-0.07", "power-0.1"}
    assert len({arrays["samples"].tobytes() for arrays in drawn.values()}) == 3
    fitted = the_run(trained) / "fitted"
    grids = [path.relative_to(fitted).parent.name for path in fitted.rglob("grid*.json")]
    assert sorted(grids) == ["", "power-0.07", "power-0.1"]
    assert drawn_by(about).endswith("average power-0.1")


def test_the_likelihood_by_width_is_a_table_a_record_and_a_figure(trained):
    widths = "mode.widths=[0.1,0.001,0.07]"
    result = run("mode=averages", widths, "mode.max_samples=10", *CHOICES, cwd=trained)
    assert result.returncode == 0, result.stderr
    (record,) = (the_run(trained) / "averages").glob("averages-00000048-*.json")
    found = json.loads(record.read_text())
    small, made, kept = found["results"]
    assert small["width"] == 0.001 and "off by" in small["failed"]
    assert kept["average_error"] is None and 0 < made["average_error"] < 0.02
    assert found["num_samples"] == 10 and "power:0.07" in result.stdout
    for row in (made, kept):
        total = found["training"]["value"] + row["difference"]
        assert row["value"] == pytest.approx(total, abs=1e-9)
        assert 0 < row["difference_error"] < row["standard_error"], "the samples are the same"
    assert (the_run(trained) / "figures" / "averages-00000048.png").is_file()
    assert "Averages of the weights" in (the_run(trained) / "report.html").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mode=likelihood", "average=0.7"], ["0.95, 0.5, power:0.05, power:0.1, and"]),
        (["mode=sample", "average=power:0.005"], ["cannot be put together", "widths 0.04 to"]),
        (["mode=averages", "mode.widths=[0.5]"], ["each of widths", "<= 0.28"]),
        (["mode=averages", "mode.widths=0.1"], ["list of widths", "mode.widths=[0.05,0.1]"]),
        (["mode=averages", "average=0.5"], ["mode.widths", "average=0.5"]),
    ],
)
def test_what_cannot_be_is_said_in_one_line(trained, arguments, words):
    refused(run(*arguments, *CHOICES, cwd=trained), *words)


def test_where_no_width_can_be_had_nothing_is_scored(trained):
    result = run("mode=averages", "mode.widths=[0.001,0.002]", *CHOICES, cwd=trained)
    refused(result, "no width can be had, the first of them so: average=power:0.001")
    assert "test samples" not in result.stdout and "failed" not in result.stdout


def test_a_run_without_power_averages_is_told_once_how_to_have_them(tmp_path):
    state = {"iteration": 3, "averages": {}}
    with pytest.raises(RunError) as caught:
        refuse_all([0.05, 0.1], tmp_path / "checkpoints" / "step-00000003.pt", state, {})
    assert str(caught.value).count("this run kept none; train with training.power_ema=") == 1


def test_training_takes_no_average_and_snapshots_need_some(trained):
    refused(run(*TRAIN, "average=0.95", cwd=trained), "average=0.95 is for the modes", "first")
    without = [word for word in TRAIN if "power_ema" not in word]
    refused(run(*without, cwd=trained), "training.snapshot_every", "training.power_ema=[0.05,0.1]")


def test_a_width_that_was_not_kept_from_the_start_is_refused(trained):
    more = [word.replace("[0.05,0.1]", "[0.05,0.1,0.2]") for word in TRAIN]
    result = run(*more, "resume.allow_change=[training.power_ema]", cwd=trained)
    refused(result, "the width 0.2", "none up to iteration 48", "average=power:0.2", "run.fresh")


def test_a_killed_run_goes_on_and_has_the_same_snapshots(trained, tmp_path):
    (tmp_path / "gaussian.npy").write_bytes((trained / "gaussian.npy").read_bytes())
    stopped = run(*TRAIN, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    for path in (the_run(tmp_path) / "checkpoints").glob("step-00000048.pt*"):
        path.unlink()  # as after a SIGKILL between iterations 42 and 48
    left = the_run(tmp_path) / "snapshots" / "step-00000042.pt"
    left.write_bytes(left.read_bytes()[:100])  # of the path that was left behind
    again = run(*TRAIN, cwd=tmp_path)
    assert again.returncode == 0 and "iteration 40" in again.stdout, again.stderr
    ours, theirs = (list_checkpoints(the_run(f) / "snapshots") for f in (tmp_path, trained))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for one, other in zip(ours, theirs, strict=True):
        a, b = (torch.load(path, weights_only=True)["averages"] for path in (one, other))
        assert a.keys() == b.keys() == {"power-0.05", "power-0.1"}
        for name in a:
            assert all(
                torch.equal(value, b[name]["model"][key])
                for key, value in a[name]["model"].items()
            )
