"""What asks for a stop, and the exit code that it leaves with."""

from __future__ import annotations

import os
import signal
import time

import pytest

from experiment import stopping
from experiment.stopping import Stopping

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_the_first_signal_asks_and_the_second_leaves_with_its_code(number, code):
    with Stopping() as asked:
        assert not asked.wanted() and asked.exit_code == 0
        os.kill(os.getpid(), number)
        assert asked.wanted() and asked.exit_code == code and asked.reason == number.name
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGINT)
        assert left.value.code == 130, "that of the signal that it left by"


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_once_all_is_saved_the_first_signal_leaves(number, code):
    with Stopping() as asked:
        asked.saved = True
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), number)
        assert left.value.code == code


def test_behind_it_signals_are_handled_as_before():
    before = [signal.getsignal(number) for number in CODES]
    with pytest.raises(KeyError), Stopping():
        raise KeyError
    assert [signal.getsignal(number) for number in CODES] == before


def test_the_time_limit_is_by_a_clock_that_is_never_set_back(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    asked = Stopping(max_seconds=30)
    monkeypatch.setattr(time, "time", lambda: 1e12)  # the wall clock jumps: no matter
    now[0] = 129.9
    assert not asked.wanted()
    now[0] = 130.0
    assert asked.wanted() and asked.exit_code == 0 and asked.reason == "the time limit"


def test_the_code_for_a_requeue_is_the_schedulers():
    with Stopping(requeue_code=99) as asked:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked.exit_code == 99


@pytest.mark.parametrize("code", [0, 256, 1.5, "99"])
def test_an_exit_code_is_1_to_255(code):
    with pytest.raises(ValueError, match="requeue_code"):
        Stopping(requeue_code=code)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "60"])
def test_a_time_limit_is_a_positive_number(seconds):
    with pytest.raises(ValueError, match="training needs max_seconds to be a finite number > 0"):
        Stopping(max_seconds=seconds)
