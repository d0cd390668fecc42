"""Watch over this process's memory on a CPU: the system ends a process that needs more than there is without a word."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

import psutil

from gen_dist.config import TrainConfig
from gen_dist.limits import free_memory_bytes
from gen_dist.parallel.processes import Processes

_GIB = 2**30
_SECONDS = 0.5
"""Seconds between two looks. New memory is zeroed first, at 2 GiB a second at most with one thread."""
_GROWTH_BYTES = 2**25
"""Growth of the process after which free memory is looked at again, which takes longer."""
_LEAST_FREE = 0.1
"""Free memory, as a share of what the process has, below which it is told."""


@contextlib.contextmanager
def memory_watched(config: TrainConfig, processes: Processes, announce: Callable[[str], None]) -> Iterator[None]:
    """Context manager that announces once if the process comes near the end of memory, with the options that need less.

    Linux kills such a process (signal 9) before any allocation fails, so no other line tells the cause. On a GPU it
    watches nothing: steps need the GPU's own memory, whose lack is an error.
    """
    if processes.device.type != "cpu":
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(config, announce, ended), name="gen_dist-memory", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(config: TrainConfig, announce: Callable[[str], None], ended: threading.Event) -> None:
    """Look at the memory until the run has ended, or the line is told."""
    process, seen = psutil.Process(), 0
    while not ended.wait(_SECONDS):
        own = process.memory_info().rss
        if own < seen + _GROWTH_BYTES:
            continue
        seen, free = own, free_memory_bytes()
        if free is None:
            return
        if free < _LEAST_FREE * own:
            on_bar = sys.stderr is not None and sys.stderr.isatty()  # a progress bar may stand on this line
            announce("\n" * on_bar + memory_line(config, own, free))
            return


def memory_line(config: TrainConfig, own: int, free: int) -> str:
    """Warning that a process has nearly all memory, with the options that need less.

    Args:
        config: config of the run.
        own: bytes that the process has.
        free: bytes that are left.
    """
    ways = [] if config.shards else [f"--accumulation {2 * config.accumulation} or more (the same batch in parts)"]
    if getattr(config.network, "checkpointing", None) is False:
        ways.append("--checkpointing (the same run with less memory)")
    return (
        f"warning: this process has {own / _GIB:.1f} GiB of memory and {free / _GIB:.1f} GiB are left; if it needs "
        f"more, the system ends it without a word (signal 9): use {', '.join([*ways, 'a smaller --global-batch-size'])}"
    )
