"""Selection of the gradients that a layer's own backward must compute."""

from typing import Any


def wanted_gradients(ctx: Any) -> tuple[bool, bool, bool]:
    """True for each gradient of inputs, weight and bias (all saved) that is still needed.

    Gradients of leaves frozen since the forward pass are not needed. With `autograd.grad`, or `backward` with `inputs`,
    the engine skips unneeded gradients of torch's own layers, but a Python function learns only which tensors required
    a gradient at the forward pass.
    """
    return tuple(  # type: ignore[return-value]
        wanted and (tensor is None or tensor.requires_grad)
        for wanted, tensor in zip(ctx.needs_input_grad, ctx.saved_tensors, strict=True)
    )
