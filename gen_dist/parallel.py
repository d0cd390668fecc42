"""Processes, devices, collectives. With `joining` and `shared_weights` the only place that knows torch.distributed."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import inspect
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from accelerate import PartialState
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

from gen_dist.config import Precision, TrainConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.joining import join, number_from
from gen_dist.shared_weights import SharedWeights, share_weights

T = TypeVar("T")


_ONE_BUCKET_MIB = 2**20  # more than any network has; a bucket is only as large as what is in it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


def stop_with_launcher() -> None:
    """Have the operating system send SIGTERM to this process when the launcher that started it dies (Linux).

    Accelerate's launcher of one process passes no signal on: its child would train on, unseen.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def start_processes(config: TrainConfig) -> Processes:
    """Join the processes that the launcher started, and choose this one's device and number of threads.

    Raises:
        ConfigError: no GPU where one was asked for, or not all processes that were launched could join.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no GPU here; use --device cpu or auto")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    launched, here = number_from("WORLD_SIZE", 1), number_from("LOCAL_WORLD_SIZE", 1)
    if not on_cpu and here > torch.cuda.device_count():
        raise ConfigError(
            f"this host was given {here} processes but has {torch.cuda.device_count()} GPUs; give it as many with "
            "--num_processes, which counts those of all hosts"
        )
    if launched > 1 and not dist.is_initialized():
        join(on_cpu, launched)
    # Without cpu=True, Accelerate leaves processes on a machine without GPUs unconnected: each would train alone.
    state = PartialState(cpu=on_cpu)
    if state.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched but {state.num_processes} joined; "
            "launch with one of the files in launch/configs"
        )
    joined_on_cpu = state.device.type == "cpu"  # Accelerate's state is one for the life of a process
    if state.num_processes > 1 and joined_on_cpu != on_cpu:
        raise ConfigError(
            f"these processes were joined for {state.device.type} and cannot change; launch new ones for --device "
            f"{'cpu' if on_cpu else 'cuda'}"
        )
    if on_cpu:
        device = torch.device("cpu")
        torch.set_num_threads(threads_by_default(state.num_processes))
        _keep_freed_memory()
    else:
        device = torch.device("cuda", state.local_process_index)
        torch.cuda.set_device(device)
        _compute_alike_every_time()
    return Processes(state.process_index, state.local_process_index, state.num_processes, device)


def _compute_alike_every_time() -> None:
    """Have cuDNN take algorithms that give the same bits each time, and float32 mean float32, not TF32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def threads_by_default(world_size: int) -> int:
    """CPU threads for this process: its share of the physical cores it may run on.

    Launchers set OMP_NUM_THREADS=1 for safety, which halves the speed on two cores; a number that a user set by
    GEN_DIST_THREADS wins.

    Raises:
        ConfigError: that is no number of threads.
    """
    if asked := os.environ.get("GEN_DIST_THREADS"):
        if not asked.isdecimal() or int(asked) < 1:
            raise ConfigError(f"GEN_DIST_THREADS is {asked!r}; it takes a whole number of at least 1")
        return int(asked)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def _keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step (glibc).

    By default it gives large blocks back to the system, which hands them out again zeroed page by page, every step: a
    tenth of the step of a small net.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 2**26)


def end_process(exit_code: int) -> NoReturn:
    """End this process: as Python does, or, where it was joined with others, without taking the interpreter apart.

    Gloo's threads let go of the tensors of a collective after its waiter has woken, and need Python's lock for that.
    One that asks for the lock while the interpreter is taken apart aborts the process ("terminate called without an
    active exception"). The threads cannot be ended before: DistributedDataParallel keeps its group of processes alive
    for ever. So a joined process runs its exit handlers, flushes what it printed and leaves.
    """
    if not dist.is_initialized():
        sys.exit(exit_code)
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it is closed
            stream.flush()
    os._exit(exit_code)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the networks' arithmetic: what was asked for, else what Accelerate was launched with, else the best.

    Raises:
        ConfigError: bf16 or fp16 on a GPU without it.
    """
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched in ("bf16", "fp16"):
            precision = "bf16" if launched == "bf16" else "fp16"
        else:
            precision = "bf16" if _gpu_has_bf16(device) else "float32"
    if precision == "bf16" and device.type == "cuda" and not _gpu_has_bf16(device):
        raise ConfigError("precision bf16 was asked for, but this GPU lacks it; use --precision fp16 or float32")
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _gpu_has_bf16(device: torch.device) -> bool:
    """Whether this is a GPU with bf16 arithmetic of its own; older ones emulate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to a dtype; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def averaging_gradients(phase: nn.Module, processes: Processes) -> nn.Module:
    """The phase with the gradients of what it trains averaged over the processes in backward.

    Call it while everything that the phase does not train is frozen: what is frozen now is never communicated.
    """
    if processes.world_size == 1:
        return phase
    # The name was changed in torch 2.14; the old one warns in every process.
    signature = inspect.signature(DistributedDataParallel)
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature.parameters else "broadcast_buffers"
    module = DistributedDataParallel(
        phase,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # On CPUs the threads that send need the cores that compute, so nothing is won by sending the first gradients
        # while backward computes the others: all of them go at its end, at once.
        bucket_cap_mb=_ONE_BUCKET_MIB if processes.device.type == "cpu" else None,
        **{sync_buffers: False},  # type: ignore[arg-type]
    )
    return module


def weights_in_common(parameters: Sequence[nn.Parameter], processes: Processes) -> SharedWeights | None:
    """These weights, moved to memory that all processes have in common; None where they have none, or are on GPUs.

    All processes have to call it together, with the same weights.
    """
    if processes.world_size == 1 or processes.device.type != "cpu":
        return None
    return share_weights(parameters)


@contextlib.contextmanager
def local_gradients(module: nn.Module, only: bool) -> Iterator[None]:
    """Within it, backward communicates no gradients, if `only`: for all micro-batches but the last."""
    if only and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def sum_over_processes(values: Tensor) -> Tensor:
    """Elementwise sum over all processes, in place; every process gets it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def rows_of_all(rows: Tensor, processes: Processes) -> Tensor:
    """The rows [n, ...] of all processes, in the order of their ranks; each may have another number, or none."""
    if processes.world_size == 1:
        return rows
    counts = torch.zeros(processes.world_size, dtype=torch.int64, device=rows.device)
    counts[processes.rank] = len(rows)
    numbers = sum_over_processes(counts).tolist()
    padded = rows.new_zeros((max(numbers), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded)
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


def differentiable_sum(values: Tensor) -> Tensor:
    """Elementwise sum over all processes, through which gradients go to the values of every process.

    Unlike `sum_over_processes` it may stand in a forward, compiled or not. The gradient is that of the sum of the
    losses of all processes; all of them have to go backward.
    """
    if not dist.is_initialized():
        return values
    total: Tensor = _DifferentiableSum.apply(values)
    return total


class _DifferentiableSum(torch.autograd.Function):
    """Functional collectives, which torch.compile can trace; not all torch versions here give them gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        group = dist.group.WORLD
        assert group is not None
        total: Tensor = collectives.wait_tensor(collectives.all_reduce(values, "sum", group))
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total: Tensor = _DifferentiableSum.apply(gradient)
        return total


def copy_from_main(tensors: list[Tensor], processes: Processes) -> None:
    """Give these tensors, of the same shapes in every process, the main process's values."""
    if processes.world_size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def from_main(value: T | None, processes: Processes) -> T:
    """The main process's value on every process. Others may pass None."""
    box = [value]
    if processes.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=processes.device)
    return box[0]  # type: ignore[return-value]


def raise_everywhere(error: UserError | None, processes: Processes) -> None:
    """Raise the main process's error in every process, so that none waits for one that has gone."""
    found = from_main((type(error), str(error)) if error else None, processes)
    if found:
        kind, message = found
        shared = kind(message)
        shared.shared = True
        raise shared


class StopVote:
    """Agreement of all processes on the step after which to stop, though a signal reaches each at another step.

    Each step's vote travels while the next step computes, so it costs no wait: a process that wants to stop is heard
    by all one step later. The votes go over CPU sockets and never make the host wait for a GPU.
    """

    def __init__(self, processes: Processes) -> None:
        self._group: dist.ProcessGroup | None = None
        if processes.world_size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._pending: tuple[dist.Work, Tensor] | None = None

    def agreed(self, wants_to_stop: bool) -> bool:
        """Cast this step's vote and return the outcome of the step before's; with one process, this step's."""
        if self._group is None:
            return wants_to_stop
        outcome = self._count()
        votes = torch.tensor([float(wants_to_stop)])
        work = dist.all_reduce(votes, group=self._group, async_op=True)
        assert work is not None
        self._pending = (work, votes)
        return outcome

    def close(self) -> None:
        """Receive the last votes, so that no process leaves while another still sends."""
        self._count()

    def _count(self) -> bool:
        if self._pending is None:
            return False
        (work, votes), self._pending = self._pending, None
        work.wait()
        return bool(votes.item())
