"""How SIGTERM and SIGINT ask a process to save and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNAL_ECHO_SECONDS = 3.0
"""A terminal signals all processes and launchers pass it on again: what follows so soon is the same wish."""


@contextlib.contextmanager
def stop_signals(stop: threading.Event, heard: Callable[[], None] | None = None) -> Iterator[threading.Event]:
    """Within it, SIGTERM and SIGINT set the event; one more, seconds later, acts as usual, for the impatient.

    Args:
        stop: the event, which is also given.
        heard: called when the first of them sets it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread alone; there the caller sees to them.
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    first_at = 0.0

    def request(number: int, _frame: FrameType | None) -> None:
        nonlocal first_at
        if not stop.is_set():
            stop.set()
            first_at = time.monotonic()
            if heard:
                heard()
        elif time.monotonic() - first_at > SIGNAL_ECHO_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
