"""SIGTERM, SIGINT and SIGHUP as requests to save and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNAL_ECHO_SECONDS = 3.0
"""A second signal within this time is the same request: a terminal and a launcher both signal all processes."""

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def stop_signals(stop: threading.Event, heard: Callable[[], None] | None = None) -> Iterator[threading.Event]:
    """Context manager in which SIGTERM, SIGINT and SIGHUP set the event, e.g. when a terminal is closed.

    A second signal, seconds later, has its usual effect. A signal that was ignored stays so: nohup ignores SIGHUP.

    Args:
        stop: the event, which is also yielded.
        heard: called when the first signal sets the event.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only, where the caller handles them.
        return
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
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
