"""The wandb workspace as code: what the server is told to keep, and what costs no run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_trackers import KEY, ROOT, environment, run
from wandb_server import Server

from experiment import metrics
from experiment.trackers.dashboard import within

workspaces = pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None,
    reason="needs wandb-workspaces, of the extra dashboard",
)
RUNS = """
import sys, types, urllib.request
bare = types.ModuleType("sde_lib")
bare.__path__ = [sys.argv[1] + "/sde_lib"]
sys.modules["sde_lib"] = bare
from experiment.trackers import Safe, WandbTracker
for name in sys.argv[3:]:
    if name.startswith("/"):
        urllib.request.urlopen(sys.argv[2] + name).read()
        continue
    tracker = Safe(WandbTracker(mode="online", dashboard=True))
    tracker.start(name, {"sde": {"beta_max": 20.0}}, name)
    tracker.log({"train/loss": 1.0}, 10)
    print(tracker.describe())
    tracker.finish()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Any, Path]]:
    """A server that has seen run a twice, b beside it, the view deleted, a again, a refusal."""
    server, folder = Server(), tmp_path_factory.mktemp("runs ü")
    steps = ["a", "a", "b", "/forget", "a", "/refuse", "b"]
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(ROOT), server.url, *steps],
        env=environment(folder / "home", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    yield server, done, folder
    server.leave()


def shown(saved: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The panels of each section of a saved view."""
    sections = saved["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


@workspaces
def test_the_workspace_has_every_section_and_every_metric_over_the_iteration(told) -> None:
    first = told[0].saved[0]
    assert (first["entityName"], first["projectName"]) == ("me", "score-sde")
    panels = shown(first)
    assert tuple(panels) == metrics.SECTIONS
    for metric in metrics.NUMBERS:
        lines = [p["config"] for p in panels[metric.section] if "metrics" in p["config"]]
        (line,) = [config for config in lines if config["metrics"][0] == metric.name]
        assert line["metrics"] == list(metric.series)
        assert line["xAxis"] == "train/iteration"
    for section, there in panels.items():
        media = [key for p in there for key in p["config"].get("mediaKeys", ())]
        own = [picture.name for picture in metrics.PICTURES if picture.section == section]
        assert media == own
    charts = json.dumps([p["config"] for p in panels[metrics.LOSS] if p["viewType"] == "Vega2"])
    assert all(f'"{curve.name}_table"' in charts for curve in metrics.CURVES)


@workspaces
def test_runs_of_a_project_share_one_workspace_that_is_made_anew_where_it_was_deleted(
    told,
) -> None:
    server, done, folder = told
    made, resumed, beside, anew = server.saved
    assert "id" not in made and made["displayName"] == "score-sde"
    assert resumed["id"] == beside["id"] == "Vmlldw=="
    assert resumed["name"] == beside["name"] == made["name"]
    assert "id" not in anew and anew["name"] != made["name"]
    address = (folder / "a" / "wandb-dashboard").read_text().strip()
    assert address.startswith(f"{server.url}/me/score-sde?nw=")
    assert f"dashboard: {address}" in done.stdout


@workspaces
def test_a_section_that_a_person_has_added_stays(told) -> None:
    for saved in told[0].saved[1:3]:
        assert list(shown(saved)) == [*metrics.SECTIONS, "Mine"]


@workspaces
def test_a_server_that_refuses_the_workspace_costs_one_line(told) -> None:
    _, done, _ = told
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "no dashboard" in line and "not today" in line and "goes on" in line
    assert done.stdout.splitlines()[-1].startswith("wandb: http")  # of the run, as ever


def test_a_server_that_never_answers_is_not_waited_for() -> None:
    with pytest.raises(TimeoutError, match="within 0.01 s"):
        within(0.01, lambda: time.sleep(10) or "")
    assert within(10, lambda: "address") == "address"
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: str(1 / 0))


def test_without_the_package_one_line_names_the_extra_and_the_run_goes_on(tmp_path) -> None:
    server = Server()
    there = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    done = run(tmp_path, "online", "dashboard", "without-workspaces", **there)
    server.leave()
    assert done.returncode == 0 and done.stdout.endswith("the end\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert "wandb-workspaces" in line and "pip install '.[dashboard]' in " in line
    assert server.saved == [] and f"wandb: {server.url}/me/" in done.stdout
