"""TensorBoard: its own reader finds what was logged, once, and nothing that it does ends a run."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import local_trackers
import pytest
import torch
from test_trackers import Silent, server  # noqa: F401

from experiment import metrics
from experiment.errors import RunError
from experiment.figures import save_grid
from experiment.record import Record
from experiment.trackers import Safe, TensorBoardTracker
from experiment.trackers.first_process import in_first_process
from experiment.trackers.tensorboard_tracker import layout


def read(run_dir: Path) -> Any:
    """The events of a run, as TensorBoard loads them, all of them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "images": 0}
    )
    return events.Reload()


def test_without_the_package_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(RunError, match=r"pip install '.\[tensorboard\]' in .*tracking=auto"):
        in_first_process(TensorBoardTracker)
    assert list(tmp_path.iterdir()) == []


def test_before_a_start_nothing_is_written() -> None:
    tracker = TensorBoardTracker()
    tracker.log({"train/loss": 1.0}, 1)
    tracker.image("samples/grid", "no.png", 1)
    tracker.curve("diagnose/loss", [1.0], [1.0], 1)
    tracker.finish()


def test_the_charts_show_every_metric_and_estimates_with_their_band() -> None:
    charts = {tuple(series): kind for page in layout().values() for kind, series in page.values()}
    assert charts == {m.series: "Margin" if m.estimate else "Multiline" for m in metrics.NUMBERS}
    assert list(layout()) == [s for s in metrics.SECTIONS if s != metrics.SAMPLES]


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("tensorboard")

    def test_every_number_picture_and_curve_is_read_back_and_nothing_is_printed(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        picture = save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), tmp_path / "grid.png")
        values = {"eval/nll": 2.0, "eval/nll_stderr": 0.25, "eval/nfe": 64}
        tracker = TensorBoardTracker()
        tracker.start(tmp_path, {"sde": {"beta_max": 20.0}}, "a name")
        tracker.log(values, 20)
        tracker.image("samples/grid", picture, 20)
        tracker.curve("diagnose/loss", [0.1, 1.0], [1.0, 2.0], 20)
        tracker.finish(143)
        assert capfd.readouterr() == ("", "")

        events = read(tmp_path)
        for name, value in metrics.with_limits(values).items():
            assert [(e.step, e.value) for e in events.Scalars(name)] == [(20, value)]
        assert set(events.Tags()["images"]) == {"samples/grid", "diagnose/loss"}
        (shown,) = events.Images("samples/grid")
        assert (shown.step, shown.encoded_image_string[:4]) == (20, b"\x89PNG")
        (config,) = events.Tensors("config/text_summary")
        assert b'"beta_max": 20.0' in config.tensor_proto.string_val[0]
        (charts,) = events.Tensors("custom_scalars__config__")
        assert b"eval/nll_low" in charts.tensor_proto.string_val[0]
        (state,) = events.Tensors("state/text_summary")
        assert state.tensor_proto.string_val[0] == b"failed (143)"
        assert str(tmp_path) in tracker.describe() and "tensorboard --logdir" in tracker.describe()

    def test_a_run_that_goes_on_hides_what_it_writes_again(self, tmp_path: Path) -> None:
        record, tracker = Record(tmp_path), TensorBoardTracker()
        tracker.start(tmp_path, {}, "x")
        for iteration in (10, 20, 30, 40):  # killed: no finish
            record.log({"train/loss": 1.0}, iteration)
            tracker.log({"train/loss": 1.0}, iteration)

        record.cut(20)  # the checkpoint
        again = TensorBoardTracker()
        again.start(tmp_path, {}, "x")
        for iteration in (30, 40, 50):
            again.log({"train/loss": 0.5}, iteration)
        again.finish()

        curve = [(event.step, event.value) for event in read(tmp_path).Scalars("train/loss")]
        assert curve == [(10, 1.0), (20, 1.0), (30, 0.5), (40, 0.5), (50, 0.5)]

    def test_a_full_disk_costs_one_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def full(*_: object) -> None:
            raise OSError("no space left on device")

        before, tracker = set(threading.enumerate()), Safe(TensorBoardTracker())
        tracker.start(tmp_path, {}, "x")
        (thread,) = set(threading.enumerate()) - before
        monkeypatch.setattr(threading, "excepthook", lambda _: None)  # what that thread prints
        monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        for iteration in range(5):
            tracker.log({"train/loss": 1.0}, iteration)
        tracker.finish()
        thread.join(10)
        (message,) = caplog.messages
        assert "TensorBoardTracker failed in log (OSError: no space left on device)" in message
        assert "tensorboard --logdir" in tracker.describe()

    def test_a_closed_stdout_costs_nothing_and_no_network_is_asked(
        self,
        tmp_path: Path,
        server: Silent,  # noqa: F811
    ) -> None:
        done = local_trackers.run("TensorBoardTracker", tmp_path, server=server)
        assert done.returncode == 0
        (line,) = done.stderr.splitlines()
        assert line == f"tensorboard, look:  tensorboard --logdir '{tmp_path}/run ü/tensorboard'"
        assert server.requests == []
