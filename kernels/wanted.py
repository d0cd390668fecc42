"""Which gradients a layer's own backward has to compute."""

from typing import Any


def wanted_gradients(ctx: Any) -> tuple[bool, bool, bool]:
    """Of inputs, weight and bias, of which the first two were saved: not of what was frozen since the forward pass.

    torch's own layers ask the engine which gradients this very pass is for; functions in Python are only told which
    there were at the forward pass.
    """
    inputs, weight = ctx.saved_tensors
    wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad
    trained = weight.requires_grad
    return wants_inputs and inputs.requires_grad, wants_weight and trained, wants_bias and trained
