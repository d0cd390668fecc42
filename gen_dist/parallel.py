"""Processes, devices and collectives: the only place that knows torch.distributed and Accelerate."""

# No `from __future__ import annotations`: DistributedDataParallel compares the annotations of its hooks with classes.

import atexit
import contextlib
import ctypes
import inspect
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from accelerate import PartialState
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from gen_dist.config import Precision, TrainConfig
from gen_dist.errors import ConfigError, UserError

T = TypeVar("T")

JOIN_SECONDS = 300
"""How long processes wait for each other at the start, unless GEN_DIST_JOIN_SECONDS says otherwise."""
_LAUNCHERS = "start processes with accelerate launch and a file in launch/configs, or with torchrun"
_ANOTHER_PORT = "choose another for all processes, with --main_process_port, torchrun's --master-port or MASTER_PORT"
_STEP_TIMEOUT = timedelta(minutes=30)  # the others wait while the main process draws and saves; torch's own for gloo

_SHARED_BYTES = 2**30
_FLAG_FLOATS = 16  # 64 bytes, a cache line
_PATIENCE_SECONDS = 0.1
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
    launched, here = _number("WORLD_SIZE", 1), _number("LOCAL_WORLD_SIZE", 1)
    if not on_cpu and here > torch.cuda.device_count():
        raise ConfigError(
            f"this host was given {here} processes but has {torch.cuda.device_count()} GPUs; give it as many with "
            "--num_processes, which counts those of all hosts"
        )
    if launched > 1 and not dist.is_initialized():
        _join(on_cpu, launched)
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
        torch.set_num_threads(_threads(state.num_processes))
        _keep_freed_memory()
    else:
        device = torch.device("cuda", state.local_process_index)
        torch.cuda.set_device(device)
        _compute_alike_every_time()
    return Processes(state.process_index, state.local_process_index, state.num_processes, device)


def _join(on_cpu: bool, launched: int) -> None:
    """Connect all processes that were launched, or say within GEN_DIST_JOIN_SECONDS what keeps them apart.

    torch by itself waits for half an hour, or without end, and then shows a traceback.
    """
    rank, port, main = _number("RANK"), _number("MASTER_PORT"), os.environ.get("MASTER_ADDR")
    if not main:
        raise ConfigError(f"MASTER_ADDR is not set; {_LAUNCHERS}")
    seconds = _number("GEN_DIST_JOIN_SECONDS", JOIN_SECONDS)
    deadline = time.monotonic() + seconds
    # Under accelerate launch and torchrun, the launcher of the main host serves the store.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    own_address = None if serves else _own_address_towards(main, port, deadline)
    store = _open_store(main, port, serves, deadline)
    _choose_interface(own_address or _own_address_towards(main, port, deadline))
    # A launcher that starts its processes again serves the same store.
    store = PrefixStore(f"gen_dist {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _wait_for_all(store, rank, launched, deadline, f"{main}:{port}")
    try:
        # Only gloo connects at once; with NCCL the time is that of collectives.
        limit = {"timeout": timedelta(seconds=seconds)} if on_cpu else {}
        PartialState(cpu=on_cpu, store=store, rank=rank, world_size=launched, **limit)
    except RuntimeError as raised:
        if not on_cpu:
            raise
        error = ConfigError(
            f"the processes met at {main}:{port} but cannot connect to each other "
            f"({str(raised).splitlines()[0]}); set GLOO_SOCKET_IFNAME on each host to the network interface that the "
            f"others reach, now {os.environ.get('GLOO_SOCKET_IFNAME', 'the one of the host name')}"
        )
        error.shared = False
        raise error from None
    if on_cpu:
        _set_timeout(_STEP_TIMEOUT)
    store.set_timeout(_STEP_TIMEOUT)


def _number(name: str, default: int | None = None) -> int:
    """A whole number from the environment."""
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}, no whole number; {_LAUNCHERS}")
    return int(value)


def _own_address_towards(main: str, port: int, deadline: float) -> str:
    """The address of this host on the way to the main one, once that can be reached."""
    while True:
        try:
            with socket.create_connection((main, port), timeout=max(0.1, deadline - time.monotonic())) as probe:
                address: str = probe.getsockname()[0]
                return address
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the main host cannot be reached at {main}:{port}: {error.strerror or error}; "
                    "check that address, that the main process runs, and the firewall"
                ) from None
        time.sleep(0.2)


def _open_store(main: str, port: int, serves: bool, deadline: float) -> Store:
    """The store through which the processes meet; `serves` tells whether it is this process that serves it.

    In a thread: whatever else listens there may never answer, and torch would wait for it without end.
    """
    outcome: list[Store | RuntimeError] = []

    def connect() -> None:
        try:
            left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
            outcome.append(
                TCPStore(main, port, is_master=serves, timeout=left, wait_for_workers=False, multi_tenant=True)
            )
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if outcome and isinstance(outcome[0], Store):
        return outcome[0]
    reason = str(outcome[0]).splitlines()[0] if outcome else "no answer"
    if "EADDRINUSE" in reason:
        raise ConfigError(f"port {port} is taken by another process of this host; {_ANOTHER_PORT}")
    raise ConfigError(f"what listens at {main}:{port} is no main process of a run ({reason}); {_ANOTHER_PORT}")


def _wait_for_all(store: Store, rank: int, launched: int, deadline: float, where: str) -> None:
    joined = [f"joined {other}" for other in range(launched)]
    try:
        store.set(joined[rank], "")
        store.wait(joined, timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except dist.DistStoreError:
        absent = [str(other) for other, key in enumerate(joined) if not store.check([key])]
        raise ConfigError(
            f"{launched} processes were launched but {launched - len(absent)} joined at {where} in time; absent: rank "
            f"{', '.join(absent)}; see what these printed, and that every host was given the same number of processes"
        ) from None
    except dist.DistNetworkError:
        raise ConfigError(f"the main process at {where} left while others joined; see what it printed") from None


def _choose_interface(address: str) -> None:
    """Have gloo use the network interface with this address, unless a user named one.

    By itself it takes the address of this host's name, which on many systems is that of the loopback interface, where
    no other host finds it.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _set_timeout(timeout: timedelta) -> None:
    """Limit how long each collective waits from now on."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:  # before torch 2.14
        dist.distributed_c10d._set_pg_timeout(timeout)


def _compute_alike_every_time() -> None:
    """Have cuDNN take algorithms that give the same bits each time, and float32 mean float32, not TF32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def _threads(world_size: int) -> int:
    """CPU threads for this process: its share of the physical cores it may run on.

    Launchers set OMP_NUM_THREADS=1 for safety, which halves the speed on two cores; a number that a user set by
    GEN_DIST_THREADS wins.
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
    if processes.device.type == "cpu":
        count = sum(parameter.numel() for parameter in phase.parameters() if parameter.requires_grad)
        memory = share_memory(processes, 2 * processes.world_size * count + _FLAG_FLOATS * processes.world_size)
        if memory is not None:
            mean = HostMean(memory, processes)
            if mean.sees_all:
                module.register_comm_hook(mean, average_on_host)
    return module


def share_memory(processes: Processes, size: int) -> Tensor | None:
    """Memory that all processes see, float32 [size], of zeros.

    None where they are on several hosts, or there is too little of it. Its file is gone when this returns.
    """
    path: str | None = None
    if processes.is_main and 4 * size <= _SHARED_BYTES:
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
        name = from_main(path, processes)
        memory = None
        if name and os.path.exists(name):
            with contextlib.suppress(OSError, RuntimeError):
                memory = torch.from_file(name, shared=True, size=size)
        seen = sum_over_processes(torch.tensor(float(memory is not None)))
    finally:
        if path:
            os.unlink(path)
    return memory if seen == processes.world_size else None


class HostMean:
    """The mean over the processes of one host, through memory that they share.

    Each writes its values, waits for the others, and adds up all. Gloo would send them through the system's network,
    and wake a thread for each message, which on busy cores waits for milliseconds. There are two places for the values,
    so that nobody writes where another yet reads: who is at a meeting has read what was written before the last one.
    """

    def __init__(self, memory: Tensor, processes: Processes) -> None:
        """`memory` as from `share_memory`: a line of flags for each process, then two places of equal size for each."""
        world_size = processes.world_size
        flags, values = memory[: _FLAG_FLOATS * world_size], memory[_FLAG_FLOATS * world_size :]
        self._values = values.view(2, world_size, -1)
        lines = flags.view(world_size, -1).numpy().view(np.int64)  # [world_size, 8]: no two in one cache line
        self._meetings, process_ids = lines[:, 0], lines[:, 1]
        self._rank = processes.rank
        self._turn = 0
        process_ids[self._rank] = os.getpid()
        dist.barrier()
        self._process_ids = [int(number) for number in process_ids]
        sees = all(map(_is_alive, self._process_ids))  # not those in another container
        self.sees_all = bool(sum_over_processes(torch.tensor(float(sees))) == world_size)
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
        while self._meetings.min() < self._turn:
            waited = time.monotonic() - started
            if waited < _PATIENCE_SECONDS:
                time.sleep(0)  # lets others have the core, if there are any
            elif all(map(_is_alive, self._process_ids)) and waited < _STEP_TIMEOUT.total_seconds():
                time.sleep(0.001)
            else:
                raise PeerDiedError("another process of this run has died, or did not come in half an hour")


class PeerDiedError(RuntimeError):
    """A process that trains with this one is gone."""


def _is_alive(process_id: int) -> bool:
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
