"""SIGTERM and SIGINT as requests to save and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNAL_ECHO_SECONDS = 3.0
"""A second signal within this time is the same request: a terminal and a launcher both signal all processes."""


@contextlib.contextmanager
def stop_signals(stop: threading.Event, heard: Callable[[], None] | None = None) -> Iterator[threading.Event]:
    """Context manager in which SIGTERM and SIGINT set the event. A second signal, seconds later, has its usual effect.

    Args:
        stop: the event, which is also yielded.
        heard: called when the first signal sets the event.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only, where the caller handles them.
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
