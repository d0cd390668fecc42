"""Forward and backward of a phase, compiled as one graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gen_dist.objectives import Batch, Phase, TurnResult


def gradients_can_be_traced() -> bool:
    """Whether this torch makes `torch.autograd.grad` part of a graph; versions before 2.11 may not. Imports Dynamo."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


class CompiledPhase:
    """A phase and the gradients of its loss as one function, which torch.compile makes one graph of.

    Of a forward alone it makes two graphs, with all that backward needs written to memory between them and read again,
    and autograd's own work around the second. Only where the gradients are nobody else's: those that
    DistributedDataParallel averages, or that a scaler scales, come from `backward`. (`backward` within a graph would be
    silently wrong.)
    """

    def __init__(self, phase: Phase, parameters: Sequence[nn.Parameter]) -> None:
        """`parameters` are what the phase trains."""
        self._phase = phase
        self._parameters = list(parameters)
        self._compiled = torch.compile(self._turn)
        # Asked at each call, for any may be traced; made once, for making it costs more than using it.
        self._tracing_gradients = torch._dynamo.config.patch(trace_autograd_ops=True)

    def add_gradients(self, batch: Batch, weight: float) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """Add the gradients of `weight` times the loss to the parameters' `grad`; the logs, and what is handed on."""
        with self._tracing_gradients:
            logs, carried, gradients = self._compiled(batch)
        seen: set[int] = set()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:  # the parameter has no part in the loss
                continue
            if weight != 1.0:
                gradient = gradient * weight
            if parameter.grad is not None:
                parameter.grad += gradient
                continue
            # As autograd leaves them: laid out as the parameter, and in memory of its own. A graph is free to compute
            # equal gradients once, as of two biases whose layers' outputs are added.
            if gradient.stride() != parameter.stride() or gradient.data_ptr() in seen:
                gradient = torch.empty_like(parameter).copy_(gradient)
            seen.add(gradient.data_ptr())
            parameter.grad = gradient
        return logs, carried

    def _turn(self, batch: Batch) -> tuple[dict[str, Tensor], Mapping[str, Tensor], tuple[Tensor | None, ...]]:
        loss, logs, carried = TurnResult(*self._phase(batch))
        # `backward`, too, is called outside of autocast: else gradients of what is computed in float32 would not be.
        with torch.autocast(batch.images.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return logs, carried, gradients
