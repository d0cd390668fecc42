"""Which gradients a layer's own backward has to compute."""

from typing import Any


def wanted_gradients(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether gradients of inputs, weight and bias, all of which were saved, are still wanted.

    Those of leaves that were frozen since the forward pass are not. For torch's own layers the engine leaves out what a
    pass through `autograd.grad`, or `backward` with `inputs`, is not for; functions in Python are only told what
    required a gradient at the forward pass.
    """
    return tuple(  # type: ignore[return-value]
        wanted and (tensor is None or tensor.requires_grad)
        for wanted, tensor in zip(ctx.needs_input_grad, ctx.saved_tensors, strict=True)
    )
