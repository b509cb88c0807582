"""Progress bars: seen on a terminal, silent elsewhere, and without effect on the loop."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from experiment.progress import Progress, progress, say

ROOT = Path(__file__).resolve().parents[1]
LOOP = """
import random, sys
from experiment.progress import progress
random.seed(0)
bar = progress(7, "training")
for i in bar:
    bar.note(f"loss {i}")
    print(i, random.random())
"""
NESTED = """
from experiment.progress import progress, say
for i in progress(2, "training"):
    say(f"iteration {i}")
    for j in progress(["a", "b", "c"], "likelihood of a part"):
        print(i, j)
"""
SILENT = {
    "pipe": dict(stderr=subprocess.PIPE),
    "closed": dict(preexec_fn=lambda: os.close(2)),
}


def environment(**changes: str | None) -> dict[str, str]:
    """This one with the changes; as bare of settings about terminals as possible."""
    base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TQDM_DISABLE")}
    changed = {**base, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **changes}
    return {k: v for k, v in changed.items() if v is not None}


def on_terminal(
    script: str, *, both: bool = False, columns: int = 100, **changes: str | None
) -> tuple[str, str]:
    """stdout, and what a terminal got that stderr (or ``both``) is connected to."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(**changes),
        stdout=end if both else subprocess.PIPE,
        stderr=end,
    )
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # Linux: the other end was closed
        pass
    os.close(terminal)
    stdout = b"" if both else process.stdout.read()
    assert process.wait() == 0, shown.decode()
    return stdout.decode(), shown.decode()


def without_terminal(script: str, where: str) -> tuple[str, str]:
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        **SILENT[where],
    )
    return result.stdout, result.stderr or ""


def screen(shown: str) -> list[str]:
    """The lines a terminal shows: a carriage return goes back, what follows overwrites."""
    lines = []
    for line in shown.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


@pytest.mark.parametrize("columns", [100, 0], ids=["sized", "unsized"])
def test_a_bar_is_drawn_on_a_terminal(columns):
    shown = on_terminal(LOOP, columns=columns)[1]

    last = screen(shown)[-2]
    assert last.startswith("training: 100%")
    assert "7/7" in last and last.endswith("loss 6]")
    assert "\r" in shown.rstrip("\r\n")


@pytest.mark.parametrize("where", SILENT)
def test_nothing_is_drawn_into(where):
    assert without_terminal(LOOP, where)[1] == ""


def test_nothing_is_drawn_into_a_file(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(
            [sys.executable, "-c", LOOP],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=log,
            check=True,
        )
    assert (tmp_path / "log").read_bytes() == b""


def test_nothing_is_drawn_on_a_dumb_terminal():
    assert on_terminal(LOOP, TERM="dumb")[1] == ""


def test_nothing_is_drawn_without_tqdm():
    assert on_terminal("import sys; sys.modules['tqdm'] = None" + LOOP)[1] == ""


@pytest.mark.parametrize("no_color", [None, "1"])
@pytest.mark.parametrize("script", [LOOP, NESTED], ids=["one", "nested"])
def test_bars_move_by_carriage_returns_and_hold_no_escape_codes(script, no_color):
    shown = on_terminal(script, NO_COLOR=no_color)[1]

    assert "100%" in shown and "\r" in shown.rstrip("\r\n")
    assert "\x1b" not in shown


@pytest.mark.parametrize("changes", [{"NO_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_plain_terminal_gets_plain_characters(changes):
    shown = on_terminal(LOOP, **changes)[1]

    assert "100%|###" in shown
    assert shown.isascii() and "\\" not in shown


def test_the_loop_gives_the_same_with_and_without_a_bar():
    watched = on_terminal(LOOP)[0]

    assert len(watched.splitlines()) == 7
    for where in SILENT:
        assert without_terminal(LOOP, where)[0] == watched


def test_nested_loops_give_the_same_with_and_without_bars():
    watched = on_terminal(NESTED)[0]

    assert len(watched.splitlines()) == 8
    assert without_terminal(NESTED, "pipe")[0] == watched


def test_a_terminal_that_goes_away_does_not_end_the_loop():
    script = LOOP.replace("print(i", "i or (print('first', flush=True), input()); print(i")
    script = script.replace("progress(7", "progress(3000")
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "import time\n" + script + "    time.sleep(0.0003)\n"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
    )
    os.close(end)
    assert process.stdout.readline() == "first\n"
    os.close(terminal)

    printed, _ = process.communicate("\n")

    assert process.returncode == 0
    assert [int(line.split()[0]) for line in printed.splitlines()] == list(range(3000))


def test_what_is_said_stands_on_a_line_of_its_own():
    shown = screen(on_terminal(NESTED.replace("print(i, j)", "pass"), both=True)[1])

    assert {"iteration 0", "iteration 1"} <= set(shown)


@pytest.mark.parametrize("hidden", ["", "import sys; sys.modules['tqdm'] = None\n"])
def test_what_is_said_is_a_plain_line_where_nobody_watches(hidden):
    script = hidden + "from experiment.progress import say\nsay('iteration 7: loss 0.1')"

    assert without_terminal(script, "pipe") == ("iteration 7: loss 0.1\n", "")


def test_a_letter_that_a_terminal_does_not_have_becomes_a_question_mark():
    script = "import sys\nfrom experiment.progress import say\n"
    script += "sys.stdout.reconfigure(encoding='ascii')\nsay('1.8 ± 0.1')\nsay('2')"

    assert without_terminal(script, "pipe") == ("1.8 ? 0.1\n2\n", "")


def test_a_full_disk_behind_stdout_costs_the_line_and_not_the_run():
    script = "import sys\nfrom experiment.progress import say\n"
    script += "sys.stdout = open('/dev/full', 'w')\nsay('1')\nsay('2')\nprint(3, file=sys.stderr)"

    assert without_terminal(script, "pipe") == ("", "3\n")


@pytest.mark.parametrize(
    "work",
    [4, range(4), [0, 1, 2, 3], iter(range(4))],
    ids=["number", "range", "list", "iterator"],
)
def test_a_number_or_any_iterable_is_gone_through(work):
    assert list(progress(work, "samples")) == [0, 1, 2, 3]


class Bar:
    """What tqdm offers, noting what is asked of it."""

    def __init__(self):
        self.calls = []

    def update(self):
        self.calls.append("update")

    def close(self):
        self.calls.append("close")


def test_an_item_counts_once_its_work_is_done():
    bar = Bar()
    counted = [bar.calls.count("update") for _ in Progress("abc", bar)]

    assert counted == [0, 1, 2]
    assert bar.calls == ["update"] * 3 + ["close"]


def test_the_bar_is_closed_when_the_loop_ends_early():
    bar = Bar()
    with pytest.raises(ZeroDivisionError):
        [1 // item for item in Progress([1, 0, 2], bar)]
    assert bar.calls == ["update", "close"]

    bar = Bar()
    for item in Progress(range(9), bar):
        if item == 2:
            break
    assert bar.calls == ["update", "update", "close"]


def test_the_bar_stays_silent_where_stderr_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)

    assert list(progress(3, "samples")) == [0, 1, 2]
    say("still here")
    assert re.fullmatch("still here\n", capsys.readouterr().out)
