"""Averaging of gradients over all processes, and the choice of the weights that each process updates.

Each phase has one `Reduction`. The base class is that of a single process.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gen_dist.parallel.processes import Processes
from gen_dist.parallel.shared_weights import SharedWeights, share_weights

_ONE_BUCKET_MIB = 2**20  # larger than any network; a bucket is only as large as its contents

State = dict[str, Tensor]
"""State of an optimizer for one parameter, by name."""


class Reduction:
    """Gradients of a single process, which are those of the run."""

    owns_gradients = True
    """True if only this process's own backward passes write to `grad` before `average`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """`parameters` are what the phase trains."""
        self.parameters = list(parameters)
        self.updated: list[nn.Parameter] = self.parameters
        """Parameters that this process's optimizer updates."""

    def wrapped(self, phase: nn.Module) -> nn.Module:
        """Return the module to call in place of the phase.

        Everything that the phase does not train has to be frozen: frozen weights are never communicated.
        """
        return phase

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """Context manager without communication in backward passes: for all micro-batches but the last."""
        return contextlib.nullcontext()

    def average(self) -> None:
        """Average the gradients of `updated` over all processes, after the last backward pass."""

    def norm(self) -> Tensor:
        """L2 norm of the averaged gradients of all parameters, float32 [], the same in every process."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def publish(self) -> None:
        """Make this process's updates visible to all processes, after the optimizer's step."""

    def full_state(self, states: Mapping[Tensor, Mapping[str, Tensor | None]]) -> list[tuple[int, str, Tensor]]:
        """Collect optimizer state of all parameters as (index of the parameter, name, value). A collective call.

        Args:
            states: state that this process's optimizer has for `updated`.
        """
        return [
            (index, name, value)
            for index, parameter in enumerate(self.parameters)
            for name, value in states.get(parameter, {}).items()
            if value is not None
        ]

    def own_state(self, states: dict[int, State]) -> dict[int, State]:
        """Select the optimizer state of `updated` by index, from that of all parameters by index."""
        return states


class DistributedReduction(Reduction):
    """Gradients that DistributedDataParallel averages within the last backward pass."""

    owns_gradients = False

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        super().__init__(parameters)
        self._device = device
        self._module: DistributedDataParallel | None = None

    def wrapped(self, phase: nn.Module) -> nn.Module:
        """See Reduction."""
        # torch 2.14 renamed the option, and the old name warns in every process.
        signature = inspect.signature(DistributedDataParallel)
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature.parameters else "broadcast_buffers"
        self._module = DistributedDataParallel(
            phase,
            device_ids=[self._device] if self._device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # On CPUs, threads that send take cores from those that compute, so overlap saves no time: one bucket, sent
            # at the end.
            bucket_cap_mb=_ONE_BUCKET_MIB if self._device.type == "cpu" else None,
            **{sync_buffers: False},  # type: ignore[arg-type]
        )
        return self._module

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """See Reduction."""
        assert self._module is not None
        return self._module.no_sync()


class SharedReduction(Reduction):
    """Weights and gradients in shared memory of one host. Each process updates a part of the weights."""

    def __init__(self, parameters: Sequence[nn.Parameter], shared: SharedWeights) -> None:
        super().__init__(parameters)
        self._shared = shared
        self.updated = [shared.part]

    def average(self) -> None:
        """See Reduction."""
        self._shared.average_gradients()

    def norm(self) -> Tensor:
        """See Reduction."""
        return self._shared.gradient_norm()

    def publish(self) -> None:
        """See Reduction."""
        self._shared.barrier.wait()  # no process reads weights before all parts are updated

    def full_state(self, states: Mapping[Tensor, Mapping[str, Tensor | None]]) -> list[tuple[int, str, Tensor]]:
        """See Reduction."""
        return self._shared.state_of_all(states.get(self._shared.part, {}))

    def own_state(self, states: dict[int, State]) -> dict[int, State]:
        """See Reduction."""
        return {0: self._shared.state_of_part(states)} if states else {}


def choose_reduction(parameters: Sequence[nn.Parameter], processes: Processes, *, shareable: bool) -> Reduction:
    """Choose the reduction of a phase's gradients. A collective call.

    Args:
        parameters: parameters that the phase trains, equal in all processes.
        processes: the processes that train together.
        shareable: False if the parameters may not be moved to shared memory.
    """
    if processes.world_size == 1:
        return Reduction(parameters)
    shared = share_weights(parameters) if shareable and processes.device.type == "cpu" else None
    return SharedReduction(parameters, shared) if shared else DistributedReduction(parameters, processes.device)
