"""Values that travel between processes: sums, rows, the main process's values and errors, the vote to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gen_dist.errors import UserError
from gen_dist.parallel.processes import Processes

T = TypeVar("T")


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


@contextlib.contextmanager
def errors_shared(processes: Processes) -> Iterator[None]:
    """Within it, the main process works and the others do not; its UserError is raised in every process at the end.

    An error of another process is raised there alone.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    raise_everywhere(error if processes.is_main else None, processes)
    if error:
        raise error


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
