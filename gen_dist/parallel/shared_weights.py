"""Weights that the processes of one host have in common, each of which updates its part of them."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.parallel.rendezvous import STEP_TIMEOUT

_SHARED_BYTES = 2**30
_LINE_FLOATS = 16
"""64 bytes, a cache line: parts of two processes have none in common, and weights begin where vectors like them."""
_PATIENCE_SECONDS = 0.1
_LOOK_SECONDS = 0.5
"""How often a process that waits looks whether the others live."""


class SharedWeights:
    """The weights that a phase trains, once in memory for all processes of a host.

    Each process writes its gradients there, waits for the others, averages them for its own part, updates that part and
    waits again: nobody averages or updates what another has done already, and no weight is sent anywhere. Gloo would
    send all gradients through the system's network, and wake a thread for each message, which on busy cores waits for
    milliseconds. (Sharding the update: Rajbhandari et al. 2020, ZeRO, stage 1.)
    """

    def __init__(self, parameters: Sequence[nn.Parameter], memory: Tensor) -> None:
        """Move the weights to the memory; all processes have to have the same.

        Args:
            parameters: float32, each dense, of any layout.
            memory: zeros, float32, that all processes see: a line for each process, the weights, and gradients of each.
        """
        self._parameters = list(parameters)
        self._rank, world_size = dist.get_rank(), dist.get_world_size()
        count = _floats_of(parameters)
        lines = memory[: _LINE_FLOATS * world_size].view(world_size, -1).numpy()
        weights, gradients = memory[_LINE_FLOATS * world_size :].split([count, world_size * count])
        words = lines.view(np.int64)  # [world_size, 8]
        self._meetings, self._process_ids = words[:, 0], words[:, 1]
        self._squares = lines.view(np.float64)[:, 2]
        self._held = 0
        self._process_ids[self._rank] = os.getpid()

        for parameter, mine in zip(parameters, _views(weights, parameters), strict=True):
            if self._rank == 0:
                mine.copy_(parameter.detach())
            parameter.data = mine
        self._gradients = gradients.view(world_size, count)
        self._written = _views(self._gradients[self._rank], parameters)
        edges = [count // _LINE_FLOATS * rank // world_size * _LINE_FLOATS for rank in range(world_size + 1)]
        self._part = slice(edges[self._rank], edges[self._rank + 1])
        self.part = nn.Parameter(weights[self._part])
        """float32 [numbers of this process's part]: what its optimizer has to update."""
        self._mean = torch.empty_like(self.part.data)
        dist.barrier()

    def average_gradients(self) -> None:
        """Give the part its gradient: the mean of what all processes have as `grad`, which are gone afterwards.

        Raises:
            PeerDiedError: another process has died, or does not come.
        """
        found = [parameter.grad for parameter in self._parameters]
        torch._foreach_copy_(self._written, [_not_none(gradient) for gradient in found])
        for parameter in self._parameters:
            parameter.grad = None
        self.meet()
        first, *others = self._gradients[:, self._part]
        torch.add(first, others[0], out=self._mean)
        for other in others[1:]:
            self._mean.add_(other)
        self.part.grad = self._mean.mul_(1.0 / (1 + len(others)))

    def gradient_norm(self) -> Tensor:
        """Norm of the mean gradients of all parts, float32 [], the same in every process."""
        self._squares[self._rank] = float(torch.linalg.vector_norm(self._mean, dtype=torch.float64)) ** 2
        self.meet()
        return torch.tensor(math.sqrt(self._squares.sum()))

    def meet(self) -> None:
        """Return once all processes are here.

        Raises:
            PeerDiedError: one of them has died, or does not come.
        """
        if platform.machine() not in ("x86_64", "AMD64"):  # others may show that one is here before what it wrote
            dist.barrier()
            return
        self._held += 1
        self._meetings[self._rank] = self._held
        started = time.monotonic()
        looked = 0.0
        while self._meetings.min() < self._held:
            waited = time.monotonic() - started
            # At first without giving the core away: who has slept, or yielded, gets it back late.
            time.sleep(0.0 if waited < _PATIENCE_SECONDS else 0.001)
            if waited - looked > _LOOK_SECONDS:
                looked = waited
                self._look_after_others(waited)

    def _look_after_others(self, waited: float) -> None:
        missing = [rank for rank, held in enumerate(self._meetings) if held < self._held]
        dead = [rank for rank in missing if not is_alive(int(self._process_ids[rank]))]
        if dead or waited > STEP_TIMEOUT.total_seconds():
            who = ", ".join(f"rank {rank} (process {self._process_ids[rank]})" for rank in dead or missing)
            raise PeerDiedError(f"{who} of this run {'died' if dead else f'did not come in {waited:.0f} s'}")

    def state_of_all(self, state: Mapping[str, Tensor | None]) -> list[tuple[int, str, Tensor]]:
        """An optimizer's state of this part -> the index of each parameter, a name, and the state of that parameter.

        All processes have to call it together.
        """
        found: list[tuple[int, str, Tensor]] = []
        for name, value in state.items():
            if value is None:
                continue
            whole = [value.clone() for _ in self._parameters] if value.ndim == 0 else self._gathered(value)
            found += [(index, name, one) for index, one in enumerate(whole)]
        return sorted(found, key=lambda entry: entry[0])  # in the order in which one process has them

    def state_of_part(self, state: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What an optimizer knows of each parameter -> what it has to know of this part."""
        mine: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for known in state.values() for name in known):
            values = {index: known[name] for index, known in state.items() if name in known}
            if all(value.ndim == 0 for value in values.values()):
                mine[name] = next(iter(values.values()))
                continue
            whole = torch.zeros(self._gradients.shape[1])
            views = _views(whole, self._parameters)
            for index, value in values.items():
                views[index].copy_(value)
            mine[name] = whole[self._part].clone()
        return mine

    def _gathered(self, value: Tensor) -> list[Tensor]:
        """All parts of what each process has of its own, in the layouts of the parameters."""
        self.meet()  # nobody reads gradients any more
        self._gradients[0, self._part] = value
        self.meet()
        whole = self._gradients[0].clone()
        self.meet()
        return _views(whole, self._parameters)


def share_weights(parameters: Sequence[nn.Parameter]) -> SharedWeights | None:
    """These weights, in common with the other processes; None where they have no host, or too little memory, in common.

    All processes have to call it together.
    """
    if not all(parameter.dtype == torch.float32 and _is_dense(parameter) for parameter in parameters):
        return None
    world_size = dist.get_world_size()
    memory = share_memory(_LINE_FLOATS * world_size + (1 + world_size) * _floats_of(parameters))
    return SharedWeights(parameters, memory) if memory is not None and _see_each_other() else None


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


def _see_each_other() -> bool:
    """Whether every process could tell that another has died: not from within another container.

    There, one may well have the same process id as this one, so it is not enough that some process has it.
    """
    told = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64)
    told[dist.get_rank()] = torch.tensor([os.getpid(), _process_namespace()])
    dist.all_reduce(told)
    process_ids, namespaces = told.T.tolist()
    seeing = torch.tensor(float(len(set(namespaces)) == 1 and all(map(is_alive, process_ids))))
    dist.all_reduce(seeing)
    return bool(seeing == dist.get_world_size())


def _process_namespace() -> int:
    """Number of the namespace of this process's ids, one for each container (Linux); 0 where that is not told."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


class PeerDiedError(RuntimeError):
    """A process that trains with this one is gone."""


def is_alive(process_id: int) -> bool:
    """Whether a process of this host runs; one that was killed and not yet buried does not."""
    try:
        return bool(psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _floats_of(parameters: Sequence[nn.Parameter]) -> int:
    """Numbers of all of them, each filled up to whole lines."""
    return sum(-(-parameter.numel() // _LINE_FLOATS) * _LINE_FLOATS for parameter in parameters)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers lie side by side, in the usual order or with channels last."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Places in `flat`, [at least `_floats_of(parameters)`], of the shapes and layouts of parameters."""
    views: list[Tensor] = []
    start = flat.storage_offset()
    for parameter in parameters:
        views.append(flat.as_strided(parameter.shape, parameter.stride(), start))
        start += _floats_of([parameter])
    return views


def _not_none(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "a phase trains weights that its loss does not depend on"
    return gradient
