"""Trackers: they show what the record holds, and nothing they do ends a run."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from wandb_server import Server

from experiment.errors import RunError
from experiment.figures import save_grid
from experiment.metrics import with_limits
from experiment.trackers import NoTracker, Safe, Tracker, WandbTracker, wandb_id

ROOT = Path(__file__).resolve().parents[1]
KEY = "0123456789" * 4
RUN = """
import sys, types
bare = types.ModuleType("sde_lib")  # the real one imports torch: seconds for nothing used here
bare.__path__ = [sys.argv.pop(1) + "/sde_lib"]
sys.modules["sde_lib"] = bare
from experiment.errors import RunError
from experiment.trackers import Safe, WandbTracker
if "without-workspaces" in sys.argv:
    sys.modules["wandb_workspaces"] = None
if "lost" in sys.argv:
    WandbTracker.TIMEOUTS = WandbTracker.TIMEOUTS | {"finish_timeout": 1.0}
tracker = Safe(WandbTracker(mode=sys.argv[2], dashboard="dashboard" in sys.argv))
try:
    tracker.start(sys.argv[1], {"sde": {"beta_max": 20.0}}, "a name")
except RunError as error:
    sys.exit(f"RunError: {error}")
for i in range(1, 4):
    tracker.log({"train/loss": 1 / i, "eval/nfe": 64}, 10 * i)
    if "kill" in sys.argv:
        import os, signal, time
        me = os.getpid()
        own = open(f"/proc/{me}/task/{me}/children").read().split()
        assert own or i > 1
        [os.kill(int(child), signal.SIGKILL) for child in own]
        time.sleep(0.5)
    if "lost" in sys.argv and i == 2:
        import os, urllib.request
        urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/leave").read()
print(tracker.describe())
tracker.finish()
print("the end")
"""


class Broken(NoTracker):
    """Raises in each call and counts them."""

    calls = 0

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        Broken.calls += 1
        raise OSError("the wire was cut")

    start = image = curve = finish = describe = abandon = log


class Silent(threading.Thread):
    """A server on this machine that notes every request and refuses it with 401."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.requests: list[bytes] = []

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(4096))
                connection.sendall(
                    b"HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )


@pytest.fixture
def server() -> Iterator[Silent]:
    server = Silent()
    server.start()
    yield server
    server.socket.close()


def environment(home: Path, **extra: str) -> dict[str, str]:
    """No account, no settings of whoever runs the tests."""
    ours = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("WANDB", "XDG", "NETRC")) and not k.lower().endswith("_proxy")
    }
    return ours | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | extra


def run(
    tmp_path: Path,
    *arguments: str,
    preexec_fn: Callable[[], None] | None = None,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """A run of three rows in a fresh process, in the directory ``run ü``."""
    command = [sys.executable, "-c", RUN, str(ROOT), str(tmp_path / "run ü"), *arguments]
    return subprocess.run(
        command,
        env=environment(tmp_path / "home", **extra),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=preexec_fn,
    )


def inspect(run_dir: Path, home: Path) -> list[dict]:
    """The records of an offline run, read by wandb's own tool."""
    (folder,) = run_dir.glob("wandb/*run-*-*")
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)],
        env=environment(home, WANDB_ERROR_REPORTING="false"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]


def test_a_tracker_that_raises_in_each_call_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Broken.calls = 0
    tracker = Safe(Broken())
    with caplog.at_level(logging.INFO):
        for iteration in range(5):
            tracker.log({"train/loss": 1.0}, iteration)
            tracker.image("samples/grid", tmp_path / "no.png", iteration)
            tracker.curve("diagnose/loss", [1.0], [2.0], iteration)
        tracker.finish()
        assert tracker.describe() == ""

    (message,) = caplog.messages
    assert "Broken" in message and "the wire was cut" in message
    assert Broken.calls == 1  # describe and abandon fail by their signature, before they count


def test_a_start_that_fails_is_survived_unless_the_user_insisted(tmp_path: Path) -> None:
    class Insists(NoTracker):
        def start(self, run_dir: str | Path, config: Mapping, name: str) -> None:
            raise RunError("no credentials")

    class Fails(NoTracker):
        def start(self, run_dir: str | Path, config: Mapping, name: str) -> None:
            raise OSError("disk full")

    with pytest.raises(RunError, match="no credentials"):
        Safe(Insists()).start(tmp_path, {}, "x")
    Safe(Fails()).start(tmp_path, {}, "x")


def test_safe_passes_everything_on_to_a_tracker_that_works(tmp_path: Path) -> None:
    heard = []

    class Hears(NoTracker):
        def log(self, values: Mapping[str, float], iteration: int) -> None:
            heard.append((dict(values), iteration))

        def image(self, name: str, path: str | Path, iteration: int) -> None:
            heard.append((name, path, iteration))

        def curve(self, name: str, x: list, y: list, iteration: int) -> None:
            heard.append((name, x, y, iteration))

        def finish(self, exit_code: int = 0) -> None:
            heard.append(exit_code)

        def describe(self) -> str:
            return "here"

    tracker = Safe(Hears())
    tracker.log({"a": 1.0}, 2)
    tracker.image("samples/grid", tmp_path, 3)
    tracker.curve("diagnose/loss", [1.0], [2.0], 4)
    tracker.finish(143)
    curve = ("diagnose/loss", [1.0], [2.0], 4)
    assert heard == [({"a": 1.0}, 2), ("samples/grid", tmp_path, 3), curve, 143]
    assert tracker.describe() == "here"


def test_an_offline_run_holds_every_number_and_picture_and_says_why_it_has_no_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "run ü"
    run_dir.mkdir()
    picture = save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), run_dir / "grid.png")
    rows = {
        10: {"train/loss": 0.5, "train/lr": 1e-3},
        20: {"eval/bits_per_dim": 1.81, "eval/bits_per_dim_stderr": 0.013},
        15: {"train/loss": 0.25},
    }  # 15: logged again

    tracker = WandbTracker(mode="offline", dashboard=True)
    tracker.start(run_dir, {"sde": {"beta_max": 20.0}}, "a name")
    for iteration, values in rows.items():
        tracker.log(values, iteration)
    tracker.image("samples/grid", picture, 20)
    tracker.curve("diagnose/loss", [0.1, 1.0, 10.0], [1.0, 2.0, 3.0], 20)
    tracker.finish(143)

    (message,) = caplog.messages
    assert "tracking.dashboard=true needs a run that is online" in message
    records = inspect(run_dir, tmp_path / "home")
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [{key: item[key] for key in item if "/" in key} for item in history[:3]] == [
        {**with_limits(values), "train/iteration": iteration} for iteration, values in rows.items()
    ]
    assert history[4]["diagnose/loss_table._type"] == "table-file"
    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/diagnose/*.json")
    assert json.loads(table.read_text())["data"] == [[0.1, 1.0], [1.0, 2.0], [10.0, 3.0]]
    assert history[3]["samples/grid._type"] == "image-file"
    assert len(list(run_dir.glob("wandb/offline-run-*/files/media/images/samples/*.png"))) == 1
    (begun,) = [record["run"] for record in records if record["type"] == "run"]
    assert begun["run_id"] == (run_dir / "wandb-id").read_text().strip()
    assert (begun["project"], begun["display_name"]) == ("score-sde", "a name")
    assert begun["config"]["update"]["sde"] == {"beta_max": 20.0}
    axes = [
        record["metric"].get("step_metric") for record in records if record["type"] == "metric"
    ]
    assert "train/iteration" in axes
    assert [r["exit"]["exit_code"] for r in records if r["type"] == "exit"] == [143]
    assert "wandb leet" in tracker.describe() and "wandb sync" in tracker.describe()


def test_without_credentials_auto_is_offline_and_asks_no_network(
    tmp_path: Path, server: Silent
) -> None:
    proxies = {name: server.url for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy")}
    done = run(tmp_path, "auto", WANDB_BASE_URL=server.url, **proxies)
    assert done.returncode == 0 and done.stdout.endswith("the end\n")
    assert "wandb leet" in done.stdout
    assert done.stderr == ""
    assert server.requests == []


def test_offline_asks_no_network_even_with_credentials(tmp_path: Path, server: Silent) -> None:
    proxies = {name: server.url for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy")}
    done = run(tmp_path, "offline", WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url, **proxies)
    assert done.returncode == 0 and "wandb leet" in done.stdout
    assert server.requests == []


@pytest.mark.parametrize("key", [KEY, "short"])
def test_refused_credentials_go_offline_with_one_line(
    tmp_path: Path, server: Silent, key: str
) -> None:
    done = run(tmp_path, "auto", WANDB_API_KEY=key, WANDB_BASE_URL=server.url)
    assert done.returncode == 0 and "wandb leet" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "tracking offline" in line
    assert key not in line
    assert bool(server.requests) == (key == KEY)


def test_without_a_network_credentials_are_no_use_and_the_run_is_offline(tmp_path: Path) -> None:
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_HTTP_TIMEOUT": "1"}
    done = run(tmp_path, "auto", WANDB_API_KEY=KEY, **nobody)
    assert done.returncode == 0 and done.stdout.endswith("the end\n")
    (line,) = done.stderr.splitlines()
    assert "tracking offline" in line and "wandb leet" in done.stdout


def test_a_network_that_is_lost_costs_neither_the_run_nor_a_record(tmp_path: Path) -> None:
    server = Server()
    done = run(tmp_path, "online", "lost", WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert done.returncode == 0 and done.stdout.endswith("the end\n"), done.stderr
    records = inspect(tmp_path / "run ü", tmp_path / "home")
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["train/iteration"] for item in history] == [10, 20, 30]


def test_a_closed_stdout_costs_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "offline", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list((tmp_path / "run ü").glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize(
    "extra, reason",
    [({}, "no wandb credentials"), ({"WANDB_API_KEY": "short"}, "cannot go online")],
)
def test_online_insists_with_the_reason(
    tmp_path: Path, extra: dict[str, str], reason: str
) -> None:
    done = run(tmp_path, "online", **extra)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("RunError") and reason in line and "tracking=auto" in line


def test_a_terminal_is_never_asked(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", RUN, str(ROOT), str(tmp_path / "run ü"), "auto"]
    process = subprocess.Popen(
        command,
        env=environment(tmp_path / "home"),
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        assert process.wait(timeout=60) == 0
        assert b"the end" in os.read(ours, 65536)
    finally:
        process.kill()
        os.close(ours)


def test_a_killed_service_costs_one_warning(tmp_path: Path) -> None:
    done = run(tmp_path, "offline", "kill")
    assert done.returncode == 0 and done.stdout.endswith("the end\n")
    (line,) = done.stderr.splitlines()
    assert "switched off" in line
    assert "wandb sync" in done.stdout  # where the files are is still known


def test_a_home_that_cannot_be_written_is_survived(tmp_path: Path) -> None:
    done = run(tmp_path, "auto", HOME="/proc/nowhere")
    assert done.returncode == 0 and done.stdout.endswith("the end\n")


def test_disabled_by_the_environment_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = WandbTracker()
    tracker.start(tmp_path, {}, "x")
    tracker.log({"a": 1.0}, 0)
    assert "WANDB_MODE" in tracker.describe()
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_auto_goes_on_and_online_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = WandbTracker()
    tracker.start(tmp_path, {}, "x")
    tracker.log({"a": 1.0}, 0)
    tracker.image("samples/grid", tmp_path / "x.png", 0)
    tracker.finish()
    assert "pip install wandb" in tracker.describe()
    with pytest.raises(RunError, match="pip install wandb"):
        WandbTracker(mode="online").start(tmp_path, {}, "x")


def test_a_resumed_run_keeps_its_id_and_a_damaged_id_is_replaced(tmp_path: Path) -> None:
    first = wandb_id(tmp_path)
    assert wandb_id(tmp_path) == first
    (tmp_path / "wandb-id").write_bytes(b"\xff\x00")
    second = wandb_id(tmp_path)
    assert second != first and wandb_id(tmp_path) == second


def test_an_unknown_mode_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="auto, offline, online"):
        WandbTracker(mode="onlin")
    with pytest.raises(ValueError, match="dashboard to be true or false; got dashboard='yes'"):
        WandbTracker(dashboard="yes")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf" / "tracking").glob("*.yaml")), ids=lambda path: path.stem
)
def test_each_choice_of_tracking_builds_a_tracker(path: Path) -> None:
    arguments = yaml.safe_load(path.read_text())
    module, _, name = arguments.pop("_target_").rpartition(".")
    tracker = getattr(importlib.import_module(module), name)(**arguments)
    assert isinstance(tracker, Tracker)
    modes = {"auto": "auto", "wandb": "online", "offline": "offline"}
    assert getattr(tracker, "mode", None) == modes.get(path.stem)
    assert getattr(tracker, "dashboard", False) is False
