"""Start and end of processes that train together, with their devices and threads."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, number_of
from gen_dist.limits import usable_cpus
from gen_dist.parallel.facts import facts_of_start
from gen_dist.parallel.rendezvous import join, number_from
from gen_dist.plugins import float32_precision

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


@dataclass(frozen=True)
class Processes:
    """Rank and device of this process among those that train together."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0


def start_processes(config: TrainConfig) -> Processes:
    """Join the processes that the launcher started, and choose this one's device and number of threads.

    Raises:
        ConfigError: a GPU is missing, or not all launched processes could join, or they disagree.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no GPU here; use --device cpu or auto")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    launched, here = number_from("WORLD_SIZE", 1), number_from("LOCAL_WORLD_SIZE", 1)
    if not on_cpu and here > torch.cuda.device_count():
        raise ConfigError(
            f"this host was given {here} processes but has {number_of(torch.cuda.device_count(), 'GPU')}; give it as "
            "many with --num_processes, which counts those of all hosts"
        )
    if launched > 1 and not dist.is_initialized():
        join(on_cpu, launched, facts_of_start(config, launched, on_cpu, threads_by_default(launched, config.shards)))
    # Without cpu=True, Accelerate leaves processes on a machine without GPUs unconnected: each would train alone.
    state = PartialState(cpu=on_cpu)
    if state.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched but {state.num_processes} joined; "
            "launch with one of the files in launch/configs"
        )
    joined_on_cpu = state.device.type == "cpu"  # Accelerate has one state for the life of a process
    if state.num_processes > 1 and joined_on_cpu != on_cpu:
        raise ConfigError(
            f"these processes were joined for {state.device.type} and cannot change; launch new ones for --device "
            f"{'cpu' if on_cpu else 'cuda'}"
        )
    if on_cpu:
        device = torch.device("cpu")
        torch.set_num_threads(threads_by_default(state.num_processes, config.shards))
        float32_precision.use_all_bits(of_cudnn=False)
        _keep_freed_memory()
    else:
        device = torch.device("cuda", state.local_process_index)
        torch.cuda.set_device(device)
        _compute_alike_every_time()
    return Processes(state.process_index, state.local_process_index, state.num_processes, device)


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Context manager that gives back, at its end, the settings of torch that `start_processes` makes: a notebook's own
    work goes on as before. Freed memory stays kept, which changes no result.
    """
    threads, cudnn, precision = torch.get_num_threads(), torch.backends.cudnn, float32_precision.read()
    deterministic = cudnn.deterministic
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic = deterministic
        float32_precision.put_back(precision)
        if device is not None:
            torch.cuda.set_device(device)


def _compute_alike_every_time() -> None:
    """Make cuDNN deterministic, and have float32 mean float32, not TF32, whatever the environment says."""
    torch.backends.cudnn.deterministic = True
    float32_precision.use_all_bits(of_cudnn=True)


def threads_by_default(world_size: int, shards: int | None = None) -> int:
    """Number of CPU threads for this process: GEN_DIST_THREADS if set, else its share of the physical cores.

    Cores count as far as affinity and a container's quota allow. OMP_NUM_THREADS is ignored: launchers set it to 1 for
    safety, which halves the speed on two cores, and nothing tells their value from a user's. The opening lines say so.
    With shards, a process has the share of one shard, on any number of processes: another number of threads would give
    other bits.

    Raises:
        ConfigError: GEN_DIST_THREADS is not a number of threads.
    """
    if asked := os.environ.get("GEN_DIST_THREADS"):
        if not asked.isdecimal() or int(asked) < 1:
            raise ConfigError(f"GEN_DIST_THREADS is {asked!r}; it takes a whole number of at least 1")
        return int(asked)
    allowed = usable_cpus()
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(1, cores // (shards or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))


def _keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step (glibc).

    By default it returns large blocks to the system. The system zeroes them page by page at every step, which takes a
    tenth of the step of a small network.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 2**26)


def end_process(exit_code: int) -> NoReturn:
    """End this process. A process that was joined with others ends without finalizing the interpreter.

    Gloo's threads release the tensors of a collective after its waiter has woken, and need Python's lock for that.
    A thread that requests the lock during finalization aborts the process ("terminate called without an active
    exception"). The threads cannot be ended before: DistributedDataParallel, if used, keeps its process group alive.
    So a joined process runs its exit handlers, flushes its output and exits.
    """
    if not dist.is_initialized():
        sys.exit(exit_code)
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it is closed
            stream.flush()
    os._exit(exit_code)
