"""Means over the processes of one host, through memory that they share."""

# No `from __future__ import annotations`: DistributedDataParallel compares the annotations of its hooks with classes.

import contextlib
import os
import platform
import tempfile
import time

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from gen_dist.joining import STEP_TIMEOUT

_SHARED_BYTES = 2**30
_FLAG_FLOATS = 16  # 64 bytes, a cache line
_PATIENCE_SECONDS = 0.1
_LOOK_SECONDS = 0.5
"""How often a process that waits looks whether the others live."""


def mean_on_host(count: int) -> "HostMean | None":
    """What averages up to `count` numbers of each process; None where they do not share a host, or too little memory.

    All processes have to call it together.
    """
    world_size = dist.get_world_size()
    memory = share_memory(2 * world_size * count + _FLAG_FLOATS * world_size)
    mean = None if memory is None else HostMean(memory)
    return mean if mean is not None and mean.sees_all else None


def share_memory(size: int) -> Tensor | None:
    """Memory that all processes see, float32 [size], of zeros.

    None where they are on several hosts, or there is too little of it. Its file is gone when this returns.
    """
    path: str | None = None
    if dist.get_rank() == 0 and 4 * size <= _SHARED_BYTES:
        # Its place is reserved at once: a page that a full /dev/shm cannot give would kill who writes to it.
        with contextlib.suppress(OSError):
            descriptor, path = tempfile.mkstemp(prefix="gen_dist-", dir="/dev/shm")
            try:
                os.posix_fallocate(descriptor, 0, 4 * size)
            except OSError:
                os.unlink(path)
                path = None
            finally:
                os.close(descriptor)
    try:
        box = [path]
        dist.broadcast_object_list(box, src=0)
        name, memory = box[0], None
        if name and os.path.exists(name):
            with contextlib.suppress(OSError, RuntimeError):
                memory = torch.from_file(name, shared=True, size=size)
        seen = torch.tensor(float(memory is not None))
        dist.all_reduce(seen)
    finally:
        if path:
            os.unlink(path)
    return memory if seen == dist.get_world_size() else None


class HostMean:
    """The mean over the processes of one host, through memory that they share.

    Each writes its values, waits for the others, and adds up all. Gloo would send them through the system's network,
    and wake a thread for each message, which on busy cores waits for milliseconds. There are two places for the values,
    so that nobody writes where another yet reads: who is at a meeting has read what was written before the last one.
    """

    def __init__(self, memory: Tensor) -> None:
        """`memory` as from `share_memory`: a line of flags for each process, then two places of equal size for each."""
        world_size = dist.get_world_size()
        flags, values = memory[: _FLAG_FLOATS * world_size], memory[_FLAG_FLOATS * world_size :]
        self._values = values.view(2, world_size, -1)
        lines = flags.view(world_size, -1).numpy().view(np.int64)  # [world_size, 8]: no two in one cache line
        self._meetings, process_ids = lines[:, 0], lines[:, 1]
        self._rank = dist.get_rank()
        self._turn = 0
        process_ids[self._rank] = os.getpid()
        dist.barrier()
        self._process_ids = [int(number) for number in process_ids]
        seeing = torch.tensor(float(all(map(is_alive, self._process_ids))))  # not those in another container
        dist.all_reduce(seeing)
        self.sees_all = bool(seeing == world_size)
        """Whether every process could tell that another has died."""

    def average(self, values: Tensor) -> None:
        """Put the mean, the same bits in every process, in the place of these values, float32 [at most as many]."""
        written = self._values[self._turn % 2, :, : values.numel()]
        self._turn += 1
        torch.mul(values, 1.0 / len(written), out=written[self._rank])
        self._meet()
        torch.add(written[0], written[1], out=values)
        for share in written[2:]:
            values.add_(share)

    def _meet(self) -> None:
        """Return once all processes are here.

        Raises:
            PeerDiedError: one of them has died, or does not come.
        """
        if platform.machine() not in ("x86_64", "AMD64"):  # others may show the flag before the values
            dist.barrier()
            return
        self._meetings[self._rank] = self._turn
        started = time.monotonic()
        looked = 0.0
        while self._meetings.min() < self._turn:
            waited = time.monotonic() - started
            # At first only the core is lent, if others want it.
            time.sleep(0.0 if waited < _PATIENCE_SECONDS else 0.001)
            if waited - looked > _LOOK_SECONDS:
                looked = waited
                if not all(map(is_alive, self._process_ids)) or waited > STEP_TIMEOUT.total_seconds():
                    raise PeerDiedError("another process of this run has died, or did not come in half an hour")


class PeerDiedError(RuntimeError):
    """A process that trains with this one is gone."""


def is_alive(process_id: int) -> bool:
    """Whether a process of this host runs; one that was killed and not yet buried does not."""
    try:
        return bool(psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def average_on_host(state: HostMean, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """A hook for DistributedDataParallel."""
    gradients: Tensor = bucket.buffer()
    state.average(gradients)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients)
    return done
