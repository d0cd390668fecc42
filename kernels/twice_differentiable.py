"""Operators whose gradients have gradients, under torch.func and torch.compile as well.

`torch.library.register_autograd` refuses torch.func, and Dynamo loses the second gradient of an `autograd.Function`
within `torch.func.grad`. So the dispatcher itself gets an autograd kernel, which functorch calls once a level: it
records one node at that level and passes the operator on to the level below.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

_LIBRARY = torch.library.Library("gen_dist", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define_operator(
    name: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Any:
    """Register `torch.ops.gen_dist.<name>`, opaque to torch.compile, and return it.

    Args:
        name: the operator's name.
        compute: the operator; its annotations are the schema. It writes to no argument and returns new tensors.
        fake: as `compute`, for tensors without data.
        keep: saves tensors for the gradient, given (ctx, inputs, output), as `autograd.Function.setup_context`.
        differentiate: gradients of the arguments, given ctx and those of the outputs. To be differentiable again, it
            calls operators that are. Without it, differentiation is an error.
    """
    _LIBRARY.define(name + torch.library.infer_schema(compute, mutates_args=()), tags=_TAGS)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gen_dist::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.gen_dist, name).default

    def forward(*arguments: Any) -> Any:
        # A Function turns gradients off, but the levels below, under torch.func, have gradients of their own.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"gradients of gen_dist::{name} are not implemented")

    node = type(
        name,
        (_SingleLevelFunction,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(keep or (lambda ctx, inputs, output: None)),
            "backward": staticmethod(differentiate or refuse),
        },
    )

    def differentiable(*arguments: Any) -> Any:
        with enable_single_level_autograd_function():
            return node.apply(*arguments)  # type: ignore[attr-defined]

    _LIBRARY.impl(name, differentiable, "Autograd")
    return operator
