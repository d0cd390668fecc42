"""Directories and processes of the benchmarks' commands that are gone when these end, though they are asked to."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
_held: list[int] | None = None
"""Within `uninterrupted`, the signals that came."""


def _leave(number: int, _frame: FrameType | None) -> None:
    if _held is not None:
        _held.append(number)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        sys.exit(128 + number)


@contextlib.contextmanager
def temporary_directory(prefix: str = "gen_dist-bench-") -> Iterator[Path]:
    """Within it, a directory that is gone afterwards, though the process is asked to end before (SIGTERM, SIGHUP).

    For the main thread alone: in others Python takes no handlers of signals.
    """
    asking = list(_ASKING)
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _leave):  # not where it is ignored
        asking.append(signal.SIGINT)
    before = {number: signal.signal(number, _leave) for number in asking}
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as directory:
            yield Path(directory)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it, in a `temporary_directory`, what asks the process to end is not heeded yet; at its end it is.

    For what must not be made and then forgotten, as a process that is started but has no name yet. It is not for long,
    and not within another.
    """
    global _held
    held: list[int] = []
    _held = held
    try:
        yield
    finally:
        _held = None
        if held:
            _leave(held[0], None)
