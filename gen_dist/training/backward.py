"""Forward and backward pass of a phase on one micro-batch: eager, or as one compiled graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gen_dist.errors import ConfigError
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.parallel.gradients import Reduction
from gen_dist.training.compiled_phase import CompiledPhase, gradients_can_be_traced
from gen_dist.training.optimizers import Update

Lap = Callable[[str], None]
"""Callback at the end of each part of a step, with the name of the part. step_times.py has a stopwatch."""


def no_lap(_part: str) -> None:
    """Measure nothing."""


class Computed(NamedTuple):
    """Logs and carried tensors of a pass over one micro-batch."""

    logs: dict[str, Tensor]
    carried: Mapping[str, Tensor]


class Backward(Protocol):
    """Gradients of a micro-batch, added to the `grad` of a phase's parameters."""

    def add(self, batch: Batch, weight: float, lap: Lap, *, last: bool) -> Computed:
        """Add the gradients of `weight` times the mean loss.

        Args:
            batch: the micro-batch.
            weight: weight of its mean loss in the gradients.
            lap: stopwatch.
            last: True for the last micro-batch of the turn.

        Raises:
            ConfigError: torch.compile failed.
        """
        ...


class EagerBackward:
    """Forward pass of the phase's module, then `backward`. The module may be wrapped or compiled."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        reduction: Reduction,
        update: Update,
        dtype: torch.dtype,
    ) -> None:
        self._module = module
        self._parameters = list(parameters)
        self._reduction = reduction
        self._update = update
        self._dtype = dtype

    def add(self, batch: Batch, weight: float, lap: Lap, *, last: bool) -> Computed:
        """See Backward."""
        with contextlib.nullcontext() if last else self._reduction.accumulating():
            with computing(batch.images.device, self._dtype):
                loss, logs, carried = TurnResult(*self._module(batch))
            lap("forward")
            # A carried graph leads to weights that this turn does not train, so `backward` takes named inputs. They
            # have a cost, so they are named only then.
            has_graphs = any(value.requires_grad for value in batch.carried.values())
            weighted = loss if weight == 1.0 else loss * weight
            self._update.scale(weighted).backward(inputs=self._parameters if has_graphs else None)
            lap("backward")
        return Computed(logs, carried)


class CompiledBackward:
    """Forward and backward pass as one compiled graph."""

    def __init__(self, phase: Phase, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._phase = CompiledPhase(phase, parameters)
        self._dtype = dtype

    def add(self, batch: Batch, weight: float, lap: Lap, *, last: bool) -> Computed:
        """See Backward."""
        with computing(batch.images.device, self._dtype):
            computed = Computed(*self._phase.add_gradients(batch, weight))
        lap("gradients")
        return computed


def choose_backward(
    phase: Phase,
    parameters: Sequence[nn.Parameter],
    reduction: Reduction,
    update: Update,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> Backward:
    """Choose the forward and backward pass of a phase, while everything that the phase does not train is frozen.

    One graph of both passes is possible only without DistributedDataParallel and loss scale: both hook into `backward`.
    With either, compiling makes one graph of the forward pass and one of the backward pass.
    """
    if compiled and reduction.owns_gradients and not update.scaled and gradients_can_be_traced():
        return CompiledBackward(phase, parameters, dtype)
    if compiled:
        phase.compile()
    return EagerBackward(reduction.wrapped(phase), parameters, reduction, update, dtype)


@contextlib.contextmanager
def computing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Context manager that autocasts to a dtype, and turns a failure of the compiler into a ConfigError of one line."""
    try:
        with autocast(device, dtype):
            yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"torch.compile failed: {reason}; fix that, or leave out --compile") from error


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Context manager that autocasts to a dtype; it does nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
