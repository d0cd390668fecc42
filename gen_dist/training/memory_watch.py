"""Watch over this process's memory on a CPU: the system ends a process that needs more than there is without a word."""

from __future__ import annotations

import contextlib
import sys
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from gen_dist.limits import free_memory_bytes, resident_bytes
from gen_dist.parallel.processes import Processes

_GIB = 2**30
_SECONDS = 0.1
"""Seconds between two looks at the process's own memory, which take microseconds."""
_MOST_LOOKS = 10
"""Looks after which free memory is looked at as well, which takes half a millisecond."""
_GROWTH_BYTES = 2**24
"""Growth of the process since the last look for which free memory is looked at at once."""
_LEAST_FREE = 0.1
"""Free memory, as a share of what the process has, that is too little."""
_LOOKS_AHEAD = 2
"""Looks for which free memory has to last at the present rate."""


@dataclass
class Looks:
    """Sizes that the last looks at the memory saw."""

    own: int | None = None
    """Bytes that the process had at the last look."""
    free: int = 0
    """Bytes that were free when they were last looked at, less what the process has taken since."""
    since: int = _MOST_LOOKS
    """Looks since then."""
    free_before: int | None = None
    """Bytes that were free when they were last looked at."""
    ended: bool = False
    """True if the system gives no numbers."""

    def look(self) -> tuple[int, int] | None:
        """Look again; returns the bytes that the process has and those that are free, if these are too few."""
        own = resident_bytes()
        if own is None:
            self.ended = True
            return None
        grown = 0 if self.own is None else own - self.own
        self.own, self.free, self.since = own, self.free - grown, self.since + 1
        if self.since < _MOST_LOOKS and grown < _GROWTH_BYTES and self.free >= _enough(own, grown):
            return None
        free = free_memory_bytes()
        if free is None:
            self.ended = True
            return None
        # Others may take memory, too, such as the other processes of this run.
        fallen = 0.0 if self.free_before is None else (self.free_before - free) / self.since
        self.free = self.free_before = free
        self.since = 0
        return (own, free) if free < _enough(own, max(grown, fallen)) else None


def _enough(own: int, taken: float) -> float:
    """Least bytes of free memory that are enough for a process.

    Args:
        own: bytes that it has.
        taken: bytes that are taken between two looks.
    """
    return max(_LEAST_FREE * own, _LOOKS_AHEAD * taken)


class MemoryWatch:
    """Context manager that warns once if the process comes near the end of memory, with the options that need less.

    Linux kills such a process (signal 9) before any allocation fails, so no other line names the cause, and a line has
    to be written by another thread in the middle of a step. On a GPU it watches nothing: steps need the GPU's own
    memory, whose lack is an error.

    It looks every tenth of a second. A process that takes all that is free within two looks ends without a warning. So
    does one where a library keeps Python's lock while memory grows.
    """

    ways_out = ""
    """Options that need less memory, in words; empty while none are known."""

    def __init__(self, processes: Processes, screen: TextIO | None) -> None:
        """Watch nothing before the context is entered.

        Args:
            processes: the processes of the run. Each has a watch of its own.
            screen: where the main process shows its lines. None is standard error, which all others use.
        """
        self._processes = processes
        self._screen = screen if processes.is_main else None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._processes.device.type == "cpu":
            self._thread = threading.Thread(target=self._watch, name="gen_dist-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        looks = Looks()
        while not (self._ended.wait(_SECONDS) or looks.ended):
            if found := looks.look():
                who = f"rank {self._processes.rank}" if self._processes.world_size > 1 else "this process"
                _show(memory_line(who, *found, self.ways_out), self._screen)
                return


def memory_line(who: str, own: int, free: int, ways_out: str) -> str:
    """Warning that a process has nearly all memory.

    Args:
        who: the process.
        own: bytes that the process has.
        free: bytes that are left.
        ways_out: options that need less, in words; empty if none are known.
    """
    return (
        f"warning: {who} has {own / _GIB:.1f} GiB of memory and {free / _GIB:.1f} GiB is left; if it needs more, the "
        f"system ends it without a word (signal 9){f': use {ways_out}' if ways_out else ''}"
    )


def _show(line: str, screen: TextIO | None) -> None:
    """Print a line on a stream, else on standard error; above the progress bar if there is one on a terminal."""
    stream = screen or sys.stderr
    # The terminal hung up, the stream was closed, or tqdm fails: the run goes on.
    with contextlib.suppress(Exception):
        if stream is not None:
            tqdm.write(line, file=stream)
            stream.flush()
