"""The record: nothing logged is lost, and a resumed run reads as one run."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiment.record import Record

ROOT = Path(__file__).resolve().parents[1]


def iterations(run_dir: Path) -> list[int]:
    return [row["train/iteration"] for row in Record.read(run_dir)]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_rows_come_back_as_they_were_logged(tmp_path: Path) -> None:
    record = Record(tmp_path / "a run ü" / "deeper")
    before = time.time()

    record.log({"train/loss": 0.1 + 0.2, "eval/nfe": 64}, 7)
    record.log({"train/loss": torch.tensor(0.5)}, 8)

    first, second = Record.read(record.run_dir)
    assert first["train/loss"] == 0.1 + 0.2
    assert (first["eval/nfe"], first["train/iteration"]) == (64, 7)
    assert before <= first["time"] <= time.time()
    assert second["train/loss"] == 0.5


def test_numbers_that_are_not_finite_come_back_and_leave_valid_json(tmp_path: Path) -> None:
    Record(tmp_path).log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}, 0)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["a"] is None
    (row,) = Record.read(tmp_path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1.0)


@pytest.mark.parametrize("value", ["fast", None, torch.zeros(2), [1.0]])
def test_what_is_no_number_is_refused_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="train/loss"):
        Record(tmp_path).log({"train/loss": value}, 0)
    assert Record.read(tmp_path) == []


def test_a_negative_or_broken_iteration_is_refused(tmp_path: Path) -> None:
    for iteration in (-1, 0.5):
        with pytest.raises(ValueError, match="iteration"):
            Record(tmp_path).log({}, iteration)


def test_no_record_reads_as_no_rows(tmp_path: Path) -> None:
    assert Record.read(tmp_path / "nowhere") == []
    assert Record(tmp_path).cut(10) == 0


@pytest.mark.parametrize(
    "torn", [b'{"train/iteration": 2, "train/lo', b"\xff\xfe", b"[1]", b"3", b'{"nonfinite": 1}']
)
def test_a_torn_line_costs_itself_and_no_other(tmp_path: Path, torn: bytes) -> None:
    record = Record(tmp_path)
    record.log({}, 1)
    with open(record.path, "ab") as file:
        file.write(torn)

    assert iterations(tmp_path) == [1]
    record.log({}, 3)
    assert iterations(tmp_path) == [1, 3]


def test_after_a_cut_iterations_increase_and_what_was_cut_is_kept(tmp_path: Path) -> None:
    record = Record(tmp_path)
    for iteration in (10, 20, 30, 40):
        record.log({"train/loss": float(iteration)}, iteration)
    with open(record.path, "ab") as file:
        file.write(b'{"train/loss": 5')

    assert record.cut(20) == 3
    record.log({"train/loss": 0.0}, 30)

    assert iterations(tmp_path) == [10, 20, 30]
    assert record.path.read_bytes().endswith(b"}\n")
    orphaned = (tmp_path / "metrics.jsonl.orphaned").read_text().splitlines()
    assert [json.loads(line)["train/iteration"] for line in orphaned[:2]] == [30, 40]
    assert orphaned[2] == '{"train/loss": 5'


def test_a_second_cut_at_the_same_place_changes_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path)
    for iteration in (1, 2, 3):
        record.log({}, iteration)
    record.cut(2)
    content = record.path.read_bytes()

    assert record.cut(2) == 0
    assert record.path.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "metrics.jsonl.orphaned"]


def test_a_crash_within_a_cut_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path)
    for iteration in (1, 2, 3):
        record.log({}, iteration)

    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        record.cut(1)
    assert iterations(tmp_path) == [1, 2, 3]


def test_a_killed_run_keeps_every_line_it_reported(tmp_path: Path) -> None:
    script = (
        "import itertools, sys\nfrom experiment.record import Record\n"
        "record = Record(sys.argv[1])\nfor i in itertools.count():\n"
        "    record.log({'train/loss': 1 / 3}, i)\n    print(i, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    reported = process.stdout.read().split("\n")[-2:]  # the last may be torn, the one before not
    process.wait()

    found = iterations(tmp_path)
    assert found == list(range(len(found)))
    assert len(found) > max(200, int(reported[0]) if reported[0] else 0) - 1


def test_on_a_full_disk_rows_wait_for_room_and_none_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record, limit = Record(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    record.log({"train/loss": 0.5}, 1)
    size = record.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))  # room for half a line
    try:
        for iteration in (2, 3):
            record.log({"train/loss": 0.5}, iteration)
        assert record.path.stat().st_size == size, "no half line"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert iterations(tmp_path) == [1]
    record.log({"train/loss": 0.5}, 4)
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("lines wait for room") == 1


def test_a_record_that_cannot_be_written_at_all_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / Record.FILE).mkdir()
    with pytest.raises(IsADirectoryError):
        Record(tmp_path).log({}, 1)
    monkeypatch.setattr(Record, "PATIENCE", 2)
    full = Record(tmp_path / "full")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        full.log({}, 1)
        full.log({}, 2)
        with pytest.raises(OSError, match="too large|No space"):
            full.log({}, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
