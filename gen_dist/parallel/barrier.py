"""A barrier in shared memory, for processes that synchronize many times a second."""

from __future__ import annotations

import os
import platform
import time
from datetime import timedelta

import numpy as np
import psutil
import torch.distributed as dist
from torch import Tensor

LINE_FLOATS = 16
"""float32 numbers in a cache line of 64 bytes."""
_SPIN_SECONDS = 0.1
_CHECK_SECONDS = 0.5
"""Time between two checks that the awaited processes are alive."""


class PeerDiedError(RuntimeError):
    """A process that trains with this one has died, or does not respond."""


class Barrier:
    """A barrier for the processes of one host. It also shares one number of each process with the others.

    gloo's barrier sends a message through the kernel's network to every process and wakes a thread for each, which
    takes milliseconds on busy cores. Here each process writes one cache line and reads those of the others:

        rank 0   | arrivals  int64 | process id  int64 | number  float64 | 40 bytes unused |
        rank 1   | arrivals  int64 | process id  int64 | number  float64 | 40 bytes unused |
        ...        64 bytes a process, so that no write invalidates a line that another process writes

    A process arrives by incrementing its own count, and waits until no count is lower. Counts are never reset, so a
    process that is one barrier ahead cannot confuse one that has not left the last. x86 keeps stores in order: a
    process that reads a count also reads all that was written before it. Other processors use gloo's barrier.
    """

    def __init__(self, memory: Tensor, timeout: timedelta) -> None:
        """Join a barrier. Every process has to.

        Args:
            memory: zeros, float32 [LINE_FLOATS * world_size], aligned to cache lines, shared by all processes.
            timeout: longest wait for a process that is alive.
        """
        lines = memory.view(dist.get_world_size(), LINE_FLOATS).numpy()
        words = lines.view(np.int64)  # [world_size, 8]
        self._rank = dist.get_rank()
        self._arrivals, self._process_ids = words[:, 0], words[:, 1]
        self.numbers = lines.view(np.float64)[:, 2]
        """One number of each process, float64 [world_size]: written by it before `wait`, read by all after `wait`."""
        self._own_arrivals = 0
        self._timeout = timeout
        self._process_ids[self._rank] = os.getpid()

    def wait(self) -> None:
        """Wait until all processes have called this.

        Raises:
            PeerDiedError: another process has died, or did not arrive in time.
        """
        if platform.machine() not in ("x86_64", "AMD64"):
            dist.barrier()
            return
        self._own_arrivals += 1
        self._arrivals[self._rank] = self._own_arrivals
        started = time.monotonic()
        checked = 0.0
        while self._arrivals.min() < self._own_arrivals:
            waited = time.monotonic() - started
            # Spin at first: a process that sleeps gets its core back late.
            time.sleep(0.0 if waited < _SPIN_SECONDS else 0.001)
            if waited - checked > _CHECK_SECONDS:
                checked = waited
                self._check_peers(waited)

    def _check_peers(self, waited: float) -> None:
        missing = [rank for rank, arrivals in enumerate(self._arrivals) if arrivals < self._own_arrivals]
        dead = [rank for rank in missing if not is_alive(int(self._process_ids[rank]))]
        if dead or waited > self._timeout.total_seconds():
            who = ", ".join(f"rank {rank} (process {self._process_ids[rank]})" for rank in dead or missing)
            raise PeerDiedError(f"{who} of this run {'died' if dead else f'did not arrive in {waited:.0f} s'}")


def is_alive(process_id: int) -> bool:
    """True if a process of this host runs; False for a zombie."""
    try:
        return bool(psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
