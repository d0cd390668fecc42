"""Weights of a phase in shared memory of one host. Each process updates a part of them."""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Mapping, Sequence

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.parallel.barrier import LINE_FLOATS, Barrier, is_alive
from gen_dist.parallel.rendezvous import step_timeout

_SHARED_BYTES = 2**30
"""Largest block of shared memory."""


class SharedWeights:
    """Weights that a phase trains, once in memory for all processes of a host.

    Each process writes its gradients, waits for the others, averages the gradients of its own part of the weights,
    updates that part, and waits again. No average or update is computed twice, and no weight is sent (Rajbhandari et
    al. 2020, ZeRO, stage 1). gloo would send all gradients through the kernel's network.

        barrier | weights: part of rank 0, part of rank 1, ... | gradients of rank 0 | gradients of rank 1 | ...

    Parameters begin on cache lines, and parts end on them, so no two processes write to one line. A part is updated
    piece by piece, each of one parameter: kernels that take a few values at once treat the last ones of a tensor apart,
    and so these get the bits that they have in a process that updates all of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], memory: Tensor) -> None:
        """Move the weights to the memory. A collective call, with equal weights.

        Args:
            parameters: float32, each dense, of any layout.
            memory: zeros, float32, shared by all processes: the barrier, the weights, and gradients of each process.
        """
        self._parameters = list(parameters)
        self._rank, world_size = dist.get_rank(), dist.get_world_size()
        count = flat_floats(parameters)
        lines, weights, gradients = memory.split([LINE_FLOATS * world_size, count, world_size * count])
        self.barrier = Barrier(lines, step_timeout())
        for parameter, view in zip(parameters, views_of(weights, parameters), strict=True):
            if self._rank == 0:
                view.copy_(parameter.detach())
            parameter.data = view
        self._gradients = gradients.view(world_size, count)
        self._written = views_of(self._gradients[self._rank], parameters)
        edges = [count // LINE_FLOATS * rank // world_size * LINE_FLOATS for rank in range(world_size + 1)]
        self._part = slice(edges[self._rank], edges[self._rank + 1])
        own = weights[self._part]
        self._spans = _spans_in(self._part, parameters)
        self.pieces = [nn.Parameter(own[span]) for span in self._spans]
        """This process's part of the weights, flat float32 pieces of single parameters, which its optimizer updates.
        """
        if not self.pieces:  # a small phase may have fewer cache lines than there are processes
            self._spans, self.pieces = [slice(0, 0)], [nn.Parameter(own[:0])]
        self._mean = torch.empty_like(own)
        dist.barrier()

    def average_gradients(self) -> None:
        """Average the gradients over all processes, for this process's part. The parameters' own `grad` become None.

        Each parameter has a gradient.

        Raises:
            PeerDiedError: another process has died, or did not arrive in time.
        """
        torch._foreach_copy_(self._written, [one.grad for one in self._parameters if one.grad is not None])
        for parameter in self._parameters:
            parameter.grad = None
        self.barrier.wait()
        first, *others = self._gradients[:, self._part]
        torch.add(first, others[0], out=self._mean)
        for other in others[1:]:
            self._mean.add_(other)
        self._mean.mul_(1.0 / (1 + len(others)))
        for piece, span in zip(self.pieces, self._spans, strict=True):
            piece.grad = self._mean[span]

    def gradient_norm(self) -> Tensor:
        """Compute the norm of the mean gradients of all parts, float32 [], the same everywhere. A collective call."""
        squares = self.barrier.numbers
        squares[self._rank] = float(torch.linalg.vector_norm(self._mean, dtype=torch.float64)) ** 2
        self.barrier.wait()
        return torch.tensor(math.sqrt(squares.sum()))

    def state_of_all(self, states: Mapping[Tensor, Mapping[str, Tensor | None]]) -> list[tuple[int, str, Tensor]]:
        """Collect optimizer state of all parameters as (index, name, value), from that of the pieces by piece.

        A collective call.
        """
        found: list[tuple[int, str, Tensor]] = []
        of_pieces = [states.get(piece, {}) for piece in self.pieces]
        for name, first in of_pieces[0].items():
            if first is None:
                continue
            if first.ndim == 0:  # a count, which all pieces share
                whole = [first.clone() for _ in self._parameters]
            else:
                own = torch.zeros_like(self._mean)
                for state, span in zip(of_pieces, self._spans, strict=True):
                    value = state[name]
                    assert value is not None
                    own[span] = value
                whole = self._gathered(own)
            found += [(index, name, one) for index, one in enumerate(whole)]
        return sorted(found, key=lambda entry: entry[0])  # in the order of a single process

    def state_of_pieces(self, states: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """Cut the optimizer state of the pieces, by their index, out of that of all parameters by theirs."""
        mine: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(self.pieces))}
        for name in dict.fromkeys(name for known in states.values() for name in known):
            values = {index: known[name] for index, known in states.items() if name in known}
            if all(is_count(name, value, self._parameters[index]) for index, value in values.items()):
                for state in mine.values():
                    state[name] = next(iter(values.values())).clone()
                continue
            whole = torch.zeros(self._gradients.shape[1])
            views = views_of(whole, self._parameters)
            for index, value in values.items():
                views[index].copy_(value)
            own = whole[self._part]
            for state, span in zip(mine.values(), self._spans, strict=True):
                state[name] = own[span].clone()
        return mine

    def _gathered(self, value: Tensor) -> list[Tensor]:
        """Gather the values of all parts, in the layouts of the parameters. A collective call."""
        self.barrier.wait()  # all processes have read the gradients
        self._gradients[0, self._part] = value
        self.barrier.wait()
        whole = self._gradients[0].clone()
        self.barrier.wait()
        return views_of(whole, self._parameters)


def is_count(name: str, value: Tensor, parameter: Tensor) -> bool:
    """True for a number of a whole weight in an optimizer's state, such as its steps, which no piece has alone."""
    return value.ndim == 0 and (parameter.ndim > 0 or name == "step")


def _spans_in(part: slice, parameters: Sequence[Tensor]) -> list[slice]:
    """Places in a part of flat memory of those parameters that have values in it."""
    spans, first = [], 0
    for parameter in parameters:
        start, stop = max(first, part.start), min(first + parameter.numel(), part.stop)
        if start < stop:
            spans.append(slice(start - part.start, stop - part.start))
        first += flat_floats([parameter])
    return spans


def share_weights(parameters: Sequence[nn.Parameter]) -> SharedWeights | None:
    """Share these weights among the processes; None if they are on several hosts, or shared memory is too small.

    A collective call.
    """
    if not all(parameter.dtype == torch.float32 and is_dense(parameter) for parameter in parameters):
        return None
    world_size = dist.get_world_size()
    memory = share_memory(LINE_FLOATS * world_size + (1 + world_size) * flat_floats(parameters))
    return SharedWeights(parameters, memory) if memory is not None and _see_each_other() else None


def share_memory(size: int) -> Tensor | None:
    """Make zeros, float32 [size], in shared memory; None if processes are on several hosts, or memory is too small.

    The memory has no name in any file system, so a kill at any moment leaves nothing of it. The others open it by its
    number in rank 0.
    """
    own = _anonymous_memory(4 * size) if dist.get_rank() == 0 and 4 * size <= _SHARED_BYTES else None
    try:
        box = [own and (f"/proc/{os.getpid()}/fd/{own[0]}", own[1])]
        dist.broadcast_object_list(box, src=0)
        memory = None
        with contextlib.suppress(OSError, RuntimeError):
            # On another host, or in another container, the path is none or that of another file.
            if box[0] and os.readlink(box[0][0]).startswith(f"/memfd:{box[0][1]}"):
                memory = torch.from_file(box[0][0], shared=True, size=size)
        seen = torch.tensor(float(memory is not None))
        dist.all_reduce(seen)
    finally:
        if own:
            os.close(own[0])
    return memory if seen == dist.get_world_size() else None


def _anonymous_memory(size: int) -> tuple[int, str] | None:
    """Reserve memory of so many bytes; returns its descriptor and its unique name in /proc (Linux), or None."""
    # Such memory has no limit of its own: reserving more than there is would have the system kill processes.
    if not hasattr(os, "memfd_create") or size > psutil.virtual_memory().available:
        return None
    name = f"gen_dist-{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            # Reserved at once: a later write to a page that the system lacks would kill the process.
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor, name
    return None


def _see_each_other() -> bool:
    """True if every process can detect that another has died: all are in one container.

    In another container, a process id may belong to another process, so the namespaces are compared, too.
    """
    ids = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64)
    ids[dist.get_rank()] = torch.tensor([os.getpid(), _process_namespace()])
    dist.all_reduce(ids)
    process_ids, namespaces = ids.T.tolist()
    seeing = torch.tensor(float(len(set(namespaces)) == 1 and all(map(is_alive, process_ids))))
    dist.all_reduce(seeing)
    return bool(seeing == dist.get_world_size())


def _process_namespace() -> int:
    """Number of this process's id namespace, one for each container (Linux); 0 if unknown."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def flat_floats(parameters: Sequence[Tensor]) -> int:
    """Total number of values of the parameters, each padded to whole cache lines."""
    return sum(-(-parameter.numel() // LINE_FLOATS) * LINE_FLOATS for parameter in parameters)


def is_dense(tensor: Tensor) -> bool:
    """True if the numbers are contiguous in memory, in the usual order or with channels last."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def views_of(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of `flat` [at least `flat_floats(parameters)`] in the shapes of the parameters.

    They have the layouts of dense parameters; those of others are contiguous.
    """
    views: list[Tensor] = []
    start = flat.storage_offset()
    for parameter in parameters:
        strides = parameter.stride() if is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
        views.append(flat.as_strided(parameter.shape, strides, start))
        start += flat_floats([parameter])
    return views
