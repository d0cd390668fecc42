"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
import threading

import pytest

from gen_dist.training.stopping import stop_signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_asks_to_save_and_stop(name: str) -> None:
    number, heard = signal.Signals[name], []
    # A test run in the background, or under nohup, has inherited that it ignores some signals.
    inherited = signal.signal(number, signal.SIG_DFL)
    try:
        with stop_signals(threading.Event(), lambda: heard.append(name)) as stop:
            signal.raise_signal(number)
            assert stop.is_set()
            signal.raise_signal(signal.SIGTERM)  # a terminal and a launcher both signal
        assert heard == [name]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_nohup_still_ignores_a_closed_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(threading.Event()) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
