"""Collectives of values: sums, rows, the main process's values and errors, the vote to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gen_dist.errors import ConfigError, UserError
from gen_dist.parallel.facts import Facts, disagreement
from gen_dist.parallel.processes import Processes
from gen_dist.parallel.rendezvous import step_timeout
from gen_dist.plugins.faults import told

T = TypeVar("T")


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum values elementwise over all processes, in place; every process gets the sum."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def collectives_are_recordable(processes: Processes) -> bool:
    """True if a CUDA graph may have the collectives of a step: there are none, or NCCL's, whose data no host sees."""
    return processes.world_size == 1 or "cuda:nccl" in dist.get_backend_config()


def rows_of_all(rows: Tensor, processes: Processes) -> Tensor:
    """Gather the rows [n, ...] of all processes, in the order of their ranks. Each may have another n, or 0."""
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


def gathered(flat: Tensor) -> Tensor:
    """Gather equal numbers of values from all processes, in the order of their ranks: [n] -> [world_size * n]."""
    group = dist.group.WORLD
    assert group is not None
    operators = torch.ops._c10d_functional
    sent = operators.all_gather_into_tensor(flat.contiguous(), group.size(), group.group_name)
    result: Tensor = operators.wait_tensor(sent)
    return result


def differentiable_sum(values: Tensor) -> Tensor:
    """Sum values elementwise over all processes, with gradients for the values of every process.

    Unlike `sum_over_processes` it may be part of a forward pass, compiled or not. The gradient is that of the sum of
    the losses of all processes. Every process has to call `backward`.
    """
    if not dist.is_initialized():
        return values
    total: Tensor = _DifferentiableSum.apply(values)
    return total


class _DifferentiableSum(torch.autograd.Function):
    """Sum by functional collectives, which torch.compile can trace. Not all torch versions have their gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        group = dist.group.WORLD
        assert group is not None
        # The operators themselves: torch's functions for them return a subclass of tensors that no recording can hold.
        summed = torch.ops._c10d_functional.all_reduce(values, "sum", group.group_name)
        total: Tensor = torch.ops._c10d_functional.wait_tensor(summed)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total: Tensor = _DifferentiableSum.apply(gradient)
        return total


def copy_from_main(tensors: list[Tensor], processes: Processes) -> None:
    """Copy the main process's values to these tensors in every process. Shapes are equal in all."""
    if processes.world_size > 1:
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, src=0)
            tensor.detach().copy_(values)


def from_main(value: T | None, processes: Processes) -> T:
    """Return the main process's value in every process. Others may pass None."""
    box = [value]
    if processes.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=processes.device)
    return box[0]  # type: ignore[return-value]


def raise_everywhere(error: UserError | None, processes: Processes) -> None:
    """Raise the main process's error in every process, so that none waits for one that has ended."""
    found = from_main((type(error), str(error)) if error else None, processes)
    if found:
        kind, message = found
        shared = kind(message)
        shared.shared = True
        raise shared


@contextlib.contextmanager
def errors_shared(processes: Processes) -> Iterator[None]:
    """Context manager for work of the main process. Its error is raised in every process at the end.

    An error of another process is raised only there, as is one that no user can fix.
    """
    error: UserError | None = None
    try:
        yield
    except Exception as raised:
        if (error := told(raised)) is None:
            raise
    raise_everywhere(error if processes.is_main else None, processes)
    if error:
        raise error


def in_main(action: Callable[[], T], processes: Processes) -> T:
    """Run `action` in the main process; every process gets its result or raises its UserError."""
    result: T | None = None
    with errors_shared(processes):
        if processes.is_main:
            result = action()
    return from_main(result, processes)


def agree(facts: Facts, processes: Processes) -> None:
    """Raise ConfigError in every process if a fact differs between them. A collective call."""
    if processes.world_size == 1:
        return
    found: list[Any] = [None] * processes.world_size
    dist.all_gather_object(found, dict(facts))
    if line := disagreement(dict(enumerate(found))):
        raise ConfigError(line)


class FailureVote:
    """Vote of all processes on whether work that they do together has failed in any of them.

    A process that failed may have left the others within a collective of that work. So the votes have a group of their
    own, and a process that failed waits for theirs only so long.
    """

    SECONDS = 60
    """Longest wait of a process that failed for the votes of the others."""

    def __init__(self, processes: Processes) -> None:
        """A collective call."""
        self._processes = processes
        self._group: dist.ProcessGroup | None = None
        if processes.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=step_timeout())
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def count(self, failed: UserError | None) -> tuple[int, str | None]:
        """Number of processes in which the work failed, and the line of the first of them. A collective call.

        Raises:
            UserError: `failed`, if others do not vote: they wait for this process within the work.
        """
        line = None if failed is None else str(failed)
        if self._group is None:
            return int(failed is not None), line
        votes = torch.zeros(self._processes.world_size)
        votes[self._processes.rank] = float(failed is not None)
        work = dist.all_reduce(votes, group=self._group, async_op=True)
        assert work is not None
        if failed is None:
            work.wait()
        else:
            try:
                work.wait(timedelta(seconds=self.SECONDS))
            except RuntimeError:
                raise failed from None
        ranks = votes.nonzero().flatten().tolist()
        if not ranks:
            return 0, None
        box = [line]
        dist.broadcast_object_list(box, src=ranks[0], group=self._group)
        return len(ranks), box[0]


class StopVote:
    """Vote of all processes on the step after which to stop. A signal may reach each at another step.

    Each step's vote is sent while the next step computes, so it costs no wait: all processes receive it one step
    later. The votes go over CPU sockets and never make the host wait for a GPU.
    """

    def __init__(self, processes: Processes) -> None:
        self._group: dist.ProcessGroup | None = None
        if processes.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=step_timeout())
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._pending: tuple[dist.Work, Tensor] | None = None

    def agreed(self, wants_to_stop: bool) -> bool:
        """Cast this step's vote and return the outcome of the previous step's; with one process, this step's."""
        if self._group is None:
            return wants_to_stop
        outcome = self._count()
        votes = torch.tensor([float(wants_to_stop)])
        work = dist.all_reduce(votes, group=self._group, async_op=True)
        assert work is not None
        self._pending = (work, votes)
        return outcome

    def agreed_at_once(self, wants_to_stop: bool) -> bool:
        """Return True if any process wants to stop now, before its next step. Waits for all of them."""
        if self._group is None:
            return wants_to_stop
        self._count()
        votes = torch.tensor([float(wants_to_stop)])
        dist.all_reduce(votes, group=self._group)
        return bool(votes.item())

    def close(self) -> None:
        """Receive the last votes, so that no process ends while another still sends."""
        self._count()

    def _count(self) -> bool:
        if self._pending is None:
            return False
        (work, votes), self._pending = self._pending, None
        work.wait()
        return bool(votes.item())
