"""Temporary directories of the benchmarks' commands."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def temporary_directory(prefix: str = "gen_dist-bench-") -> Iterator[Path]:
    """Within it, a directory that is gone afterwards, though the process is asked to end before (SIGTERM, SIGHUP).

    For the main thread alone: in others Python takes no handlers of signals.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    asking = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    before = {number: signal.signal(number, leave) for number in asking}
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as directory:
            yield Path(directory)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
