"""Sums over the fixed parts of a batch in the order of one binary tree, whoever holds the parts.

    sum of 8 parts = ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7))

Floating-point sums depend on their order. Here a process holds consecutive parts that are a subtree, adds them up by
itself, and the upper part of the tree is added in its order as well. So 1, 2, 4 or 8 processes get equal bits from
equal parts. EasyScale (Li et al. 2023) fixes the order of sums by virtual workers, too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gen_dist.errors import ConfigError
from gen_dist.parallel.batch_sums import BatchSums
from gen_dist.parallel.collectives import gathered
from gen_dist.parallel.processes import Processes
from gen_dist.parallel.sync_batch_norm import SyncBatchNorm

T = TypeVar("T")
R = TypeVar("R")

_SENT_WHOLE = 2**14
"""Most values that are sent to all processes at once: fewer messages take less time there than fewer bytes."""


class PartSums(BatchSums):
    """Sums over a batch that is cut into a fixed number of parts.

    Each part is computed by itself. A sum within a forward or backward pass needs all parts, so the parts of a process
    run in threads, one at a time, and each hands over to the next at such a sum.
    """

    def __init__(self, parts: int, processes: Processes) -> None:
        """Choose this process's parts.

        Args:
            parts: number of parts, a power of two.
            processes: the processes that train together.

        Raises:
            ConfigError: the parts cannot be shared out evenly.
        """
        world_size = processes.world_size
        if parts % world_size:
            possible = [str(2**power) for power in range(parts.bit_length())]
            raise ConfigError(
                f"{parts} shards cannot be shared out evenly among {world_size} processes; use "
                f"{', '.join(possible[:-1])} or {possible[-1]} of them"
            )
        self.parts = parts
        each = parts // world_size
        self.own_parts = range(processes.rank * each, (processes.rank + 1) * each)
        self._device = processes.device
        self._threads: _Threads[Any] | None = None

    @property
    def leads(self) -> bool:  # type: ignore[override]
        """See BatchSums. One part of each process updates its buffers: all parts get equal sums."""
        return self._threads is None or self._threads.running == 0

    def total(self, values: Tensor) -> Tensor:
        """See BatchSums."""
        if self._threads is None:
            raise ConfigError(
                "--shards: this objective sums over its micro-batches before it sums over processes; leave out "
                "--shards, or have it call sum_over_batch outside of its forward pass"
            )
        total: Tensor = _DifferentiableTotal.apply(values, self._threads)
        return total

    def over(self, statistic: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
        """See BatchSums."""
        return self.total_of([statistic([item]) for item in items])

    def each(self, work: Callable[[Sequence[T]], list[R]], micro_batches: Sequence[T]) -> list[R]:
        """Call `work` for each micro-batch by itself; returns its results. `total` within it is over all parts.

        Args:
            work: function from one micro-batch, in a list, to one result, in a list.
            micro_batches: those of this process's parts.
        """
        self._threads = _Threads(len(micro_batches), self.total_of, self._device)
        try:
            found = self._threads.run([lambda one=one: work([one]) for one in micro_batches])  # type: ignore[misc]
            return [result for (result,) in found]
        finally:
            self._threads = None

    def total_of(self, of_parts: Sequence[Tensor]) -> Tensor:
        """See BatchSums."""
        return self.over_processes(tree_sum(of_parts))

    def refuse_network(self, network: nn.Module) -> None:
        """See BatchSums."""
        for name, layer in network.named_modules():
            if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm):
                raise ConfigError(
                    f"--shards with batch normalization ({name}): each process would have statistics of its own "
                    "shards; add --sync-batch-norm"
                )

    def over_processes(self, own: Tensor) -> Tensor:
        """Sum the subtrees of all processes, of any shape. A collective call.

        Large ones travel in chunks. One process sums a chunk and sends it to all, at the bytes of a ring all-reduce.
        """
        world_size = self.parts // len(self.own_parts)
        if world_size == 1:
            return own
        flat = own.reshape(-1)
        if flat.numel() <= _SENT_WHOLE:
            return tree_sum(gathered(flat).view(world_size, -1).unbind()).view(own.shape)
        size = -(-flat.numel() // world_size)
        padded = torch.nn.functional.pad(flat, (0, size * world_size - flat.numel()))
        return gathered(self.chunk_over_processes(padded))[: flat.numel()].view(own.shape)

    def chunk_over_processes(self, own: Tensor) -> Tensor:
        """Sum this process's chunk of the subtrees of all processes. A collective call.

        Args:
            own: this process's subtree, flat, of as many equal chunks as there are processes.
        """
        world_size = self.parts // len(self.own_parts)
        return tree_sum(_exchanged(own).view(world_size, -1).unbind())


def tree_sum(values: Sequence[Tensor]) -> Tensor:
    """Sum 2^n tensors: neighbours first, then the sums of neighbours."""
    while len(values) > 1:
        values = [first + second for first, second in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _exchanged(flat: Tensor) -> Tensor:
    """Send the chunk of each rank to it, out of as many equal chunks; receive this rank's, in the order of senders."""
    group = dist.group.WORLD
    assert group is not None
    sizes = [flat.numel() // group.size()] * group.size()
    operators = torch.ops._c10d_functional
    result: Tensor = operators.wait_tensor(operators.all_to_all_single(flat, sizes, sizes, group.group_name))
    return result


class _DifferentiableTotal(torch.autograd.Function):
    """Sum over the parts. Its gradient is that of the sum of all parts' losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threads: _Threads[Any]) -> Tensor:
        ctx.threads = threads
        return threads.total(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total: Tensor = _DifferentiableTotal.apply(gradient, ctx.threads)
        return total, None


class _Stopped(Exception):
    """Another part has failed."""


class _Threads(Generic[R]):
    """Threads of the parts of a pass. One runs at a time, in the order of the parts.

    A part runs until it ends or needs a sum over all parts, and hands over to the next. So sums are requested, and
    parts end, in the order of the parts. A single part runs in the calling thread.
    """

    def __init__(self, count: int, total_of: Callable[[Sequence[Tensor]], Tensor], device: torch.device) -> None:
        """`total_of` sums tensors of all parts of this process, and over the processes."""
        self.running = 0
        """Index of the part that runs."""
        self._count = count
        self._total_of = total_of
        self._device = device
        self._compute_threads = torch.get_num_threads()
        self._may_run = [threading.Semaphore(0) for _ in range(count)]
        self._all_ended = threading.Semaphore(0)
        self._ended = [False] * count
        self._values: list[Tensor] = []
        self._total: Tensor | None = None
        self._summed = 0
        """Number of sums so far."""
        self._error: BaseException | None = None

    def run(self, works: Sequence[Callable[[], R]]) -> list[R]:
        """Call the functions of the parts and return their results. The first error of a part is raised."""
        if self._count == 1:
            with _rounding_anew():
                return [works[0]()]
        results: dict[int, R] = {}
        threads = [
            threading.Thread(target=self._run_part, args=(index, work, results), daemon=True)
            for index, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        self._may_run[0].release()
        self._all_ended.acquire()
        if self._error:
            raise self._error
        return [results[index] for index in range(self._count)]

    def total(self, values: Tensor) -> Tensor:
        """Sum values over the parts of all processes, each of which calls this, in the thread of a part."""
        index, number = self.running, self._summed + 1
        self._values.append(values)
        if len(self._values) == self._count:
            self._total, self._summed = self._total_of(self._values), number
            self._values = []
        if self._count > 1:
            self._hand_over(index)
            self._await_turn(index)
        if self._summed != number or self._total is None:
            raise ConfigError("--shards: the parts of a batch request different sums over the batch")
        return self._total.clone()

    def _run_part(self, index: int, work: Callable[[], R], results: dict[int, R]) -> None:
        try:
            self._await_turn(index)
            # OpenMP and MKL count threads for each thread that calls them, and the number of threads decides bits.
            torch.set_num_threads(self._compute_threads)
            # Else backward passes of a GPU share one thread, in which a part that waits would stop all.
            with torch.autograd.set_multithreading_enabled(False), _current(self._device), _rounding_anew():
                results[index] = work()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._ended[index] = True
        self._hand_over(index)

    def _await_turn(self, index: int) -> None:
        self._may_run[index].acquire()
        self.running = index
        if self._error:
            raise _Stopped

    def _hand_over(self, index: int) -> None:
        """Let the next part run that has not ended; the caller of `run` if all have."""
        order = [*range(index + 1, self._count), *range(index + 1)]
        following = next((one for one in order if not self._ended[one]), None)
        (self._all_ended if following is None else self._may_run[following]).release()


@contextlib.contextmanager
def _rounding_anew() -> Iterator[None]:
    """Context manager in which autocast rounds weights at each use.

    By default it keeps rounded weights, for all threads together, until one thread leaves it. So the parts of a process
    would decide together which uses of a weight share a rounding, and with it the rounding of their summed gradients.
    """
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(keeps)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context manager with the current device of a new thread."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
