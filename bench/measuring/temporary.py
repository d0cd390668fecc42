"""Temporary directories and processes of the benchmarks' commands, removed even if a signal ends the command."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
_held: list[int] | None = None
"""Signals that arrived within `uninterrupted`."""


def _leave(number: int, _frame: FrameType | None) -> None:
    if _held is not None:
        _held.append(number)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        sys.exit(128 + number)


@contextlib.contextmanager
def temporary_directory(prefix: str = "gen_dist-bench-") -> Iterator[Path]:
    """Context with a temporary directory, which is removed even if SIGTERM or SIGHUP ends the process.

    It works in the main thread alone, because Python sets signal handlers there alone.
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
    """Context within a `temporary_directory` that holds signals back until its end.

    It protects the moment between starting something, such as a process, and registering its removal. Keep it short,
    and do not nest it.
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
