"""trackio: what it is given, by a module of the same surface and, where it is there, by itself."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import local_trackers
import pytest
import torch
from test_trackers import ROOT, Silent, environment, server  # noqa: F401

from experiment import metrics
from experiment.errors import RunError
from experiment.figures import save_grid
from experiment.trackers import TrackioTracker
from experiment.trackers.first_process import in_first_process

real = pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="needs trackio, of the extra trackio"
)
ROWS = """
import json, sys
from experiment.trackers import TrackioTracker
for first, exit_code in ((1, 143), (2, 0)):  # the second goes on with the first
    tracker = TrackioTracker()
    tracker.start(sys.argv[1], {"sde": {"beta_max": 20.0}}, "a name")
    for i in range(first, first + 2):
        tracker.log({"eval/nll": 2.0 * i, "eval/nll_stderr": 0.5}, 10 * i)
    tracker.image("samples/grid", sys.argv[2], 10)
    tracker.curve("diagnose/loss", [0.1, 1.0], [1.0, 2.0], 10)
    tracker.finish(exit_code)
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("score-sde")
rows = SQLiteStorage.get_logs("score-sde", run.name)
alerts = SQLiteStorage.get_alerts("score-sde")
print(json.dumps({"name": run.name, "config": run.config, "rows": rows, "alerts": alerts}))
"""


class Heard:
    """A run that notes what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.said.append((values, step))

    def alert(self, *, title: str, text: str, level: str) -> None:
        self.said.append((title, text, level))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """A trackio that talks on stdout, and a hub that knows whether it may be asked."""
    run, hub = Heard(), types.ModuleType("huggingface_hub")
    hub.constants = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    module = types.ModuleType("trackio")

    def init(**arguments: Any) -> Heard:
        print("\033[1mtrackio is here\033[0m")
        run.said.append(arguments | {"hub is asked": not hub.constants.HF_HUB_OFFLINE})
        return run

    module.init = init
    module.finish = lambda: (print("please wait"), run.said.append("finish"))
    module.Image = lambda path: ("picture", Path(path).read_bytes()[:4])
    module.AlertLevel = types.SimpleNamespace(ERROR="error")
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for name in ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.setenv(name, "")  # so that what is set in here is undone
        monkeypatch.delenv(name)
    return run


def test_every_number_picture_and_curve_is_passed_on_and_nothing_is_printed(
    tmp_path: Path, heard: Heard, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run ü"
    run_dir.mkdir()
    picture = save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), run_dir / "grid.png")
    values = {"eval/nll": 2.0, "eval/nll_stderr": 0.25}
    for exit_code in (143, 0):  # the second goes on with the first
        tracker = TrackioTracker()
        tracker.start(run_dir, {"sde": {"beta_max": 20.0}}, "a name")
        tracker.log(values, 20)
        tracker.image("samples/grid", picture, 20)
        tracker.curve("diagnose/loss", [0.1, 1.0], [1.0, 2.0], 20)
        tracker.finish(exit_code)

    begun, *failed, ended = heard.said[:6]
    name = f"a name-{(run_dir / 'trackio-id').read_text().strip()}"
    assert (begun["project"], begun["name"], begun["resume"]) == ("score-sde", name, "allow")
    assert begun["config"] == {"sde": {"beta_max": 20.0}} and not begun["hub is asked"]
    assert failed == [
        (metrics.with_limits(values), 20),
        ({"samples/grid": ("picture", b"\x89PNG")}, 20),
        ({"diagnose/loss": ("picture", b"\x89PNG")}, 20),
        ("failed", "exit code 143", "error"),
    ]
    assert ended == "finish"
    assert heard.said[6]["name"] == name and len(heard.said) == 11  # no alert the second time
    look = f"trackio, look:  TRACKIO_DIR={tmp_path}/.trackio trackio show --project score-sde"
    assert tracker.describe() == look
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / ".trackio")
    assert capfd.readouterr() == ("", "")


def test_a_server_that_was_asked_for_is_named_without_its_address_or_token(
    tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=secret")
    tracker = TrackioTracker()
    tracker.start(tmp_path, {}, "x")
    assert tracker.describe() == "trackio: sent to where TRACKIO_SERVER_URL says"
    assert heard.said[0]["hub is asked"]


def test_without_the_package_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RunError, match=r"pip install '.\[trackio\]' in .*tracking=auto"):
        in_first_process(TrackioTracker)
    assert list(tmp_path.iterdir()) == []


def test_before_a_start_nothing_is_written() -> None:
    tracker = TrackioTracker()
    tracker.log({"train/loss": 1.0}, 1)
    tracker.image("samples/grid", "no.png", 1)
    tracker.curve("diagnose/loss", [1.0], [1.0], 1)
    tracker.finish()
    assert tracker.describe() == ""


@real
def test_trackio_itself_keeps_one_run_of_two_parts(tmp_path: Path) -> None:
    picture = save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), tmp_path / "grid.png")
    done = subprocess.run(
        [sys.executable, "-c", ROWS, str(tmp_path / "run ü"), str(picture)],
        env=environment(tmp_path / "home"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["config"]["sde"] == {"beta_max": 20.0}
    assert found["name"] == f"a name-{(tmp_path / 'run ü' / 'trackio-id').read_text().strip()}"
    values = [(row["step"], row["eval/nll"]) for row in found["rows"] if "eval/nll" in row]
    assert values == [(10, 2.0), (20, 4.0), (20, 4.0), (30, 6.0)]  # 20: logged again
    assert math.isclose(found["rows"][0]["eval/nll_high"], 2.5)
    pictures = [row for row in found["rows"] if "samples/grid" in row or "diagnose/loss" in row]
    assert len(pictures) == 4 and "trackio.image" in json.dumps(pictures[0])
    assert [alert["title"] for alert in found["alerts"]] == ["failed"]


@real
def test_trackio_itself_prints_nothing_and_asks_no_network(
    tmp_path: Path,
    server: Silent,  # noqa: F811
) -> None:
    done = local_trackers.run("TrackioTracker", tmp_path, server=server)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"trackio, look:  TRACKIO_DIR={tmp_path}/.trackio trackio show")
    assert server.requests == []
    assert (tmp_path / ".trackio").is_dir() and not (tmp_path / "home").exists()
