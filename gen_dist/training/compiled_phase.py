"""Forward and backward pass of a phase, compiled as one graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gen_dist.objectives import Batch, Phase, TurnResult


def gradients_can_be_traced() -> bool:
    """True if Dynamo can trace `torch.autograd.grad`; versions before 2.11 may not. Imports Dynamo."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


class CompiledPhase:
    """A phase and the gradients of its loss as one function, compiled as one graph.

    Compiling the forward pass alone makes two graphs: all that backward needs is written to memory and read again, and
    autograd adds its own work to the second. One graph is possible only without GradScaler, which hooks into
    `backward`. (`backward` within a graph would be silently wrong.)
    """

    def __init__(self, phase: Phase, parameters: Sequence[nn.Parameter]) -> None:
        """`parameters` are what the phase trains."""
        self._phase = phase
        self._parameters = list(parameters)
        self._compiled = torch.compile(self._turn)
        # Entered at each call, since any call may trace. Made once, since making it costs more than entering it.
        self._tracing_gradients = torch._dynamo.config.patch(trace_autograd_ops=True)

    def add_gradients(self, batch: Batch, weight: float) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """Add the gradients of `weight` times the loss to the parameters' `grad`; return logs and carried tensors."""
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
            # As from autograd: in the parameter's layout, and in separate memory. A graph may compute equal gradients
            # once, e.g. for two biases whose layers' outputs are added.
            if gradient.stride() != parameter.stride() or gradient.data_ptr() in seen:
                gradient = torch.empty_like(parameter).copy_(gradient)
            seen.add(gradient.data_ptr())
            parameter.grad = gradient
        return logs, carried

    def _turn(self, batch: Batch) -> tuple[dict[str, Tensor], Mapping[str, Tensor], tuple[Tensor | None, ...]]:
        loss, logs, carried = TurnResult(*self._phase(batch))
        # Outside of autocast, as `backward` is: within it, gradients of float32 operations would not be float32.
        with torch.autocast(batch.images.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return logs, carried, gradients
