"""What the benchmarks' commands make for a while, and leave nothing of when they are asked to end."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


@contextlib.contextmanager
def temporary_directory(prefix: str = "gen_dist-bench-") -> Iterator[Path]:
    """Within it, a directory that is gone afterwards, though the process is asked to end before (SIGTERM, SIGHUP).

    For the main thread alone: in others Python takes no handlers of signals.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in ASKING}
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as directory:
            yield Path(directory)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it, what asks the process to end, or Ctrl-C, is not heeded yet; at its end it is.

    For what must not be made and then forgotten, as a process that is started but has no name yet.
    """
    came: list[int] = []
    # One that is ignored stays so: what is started within inherits that, and would not inherit a handler.
    numbers = [number for number in [signal.SIGINT, *ASKING] if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
