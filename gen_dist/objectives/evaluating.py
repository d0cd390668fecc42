"""Evaluation of an objective: its eval mode, and passes through its networks that fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gen_dist.objectives.base import Objective
from gen_dist.objectives.operations import OperationWatch

MOST_BYTES = 2**28
"""Bytes of the largest tensor of a pass without gradients. A pass holds about four such tensors at once."""
SMALL_PASS = 2**20
"""Numbers in the images of a pass that is never measured: their maps are small in every network here."""


@contextlib.contextmanager
def evaluating(objective: Objective) -> Iterator[Objective]:
    """Context manager that puts an objective into eval mode, without autograd."""
    was_training = objective.training
    objective.eval()
    try:
        with torch.no_grad():
            yield objective
    finally:
        objective.train(was_training)


def rows_per_pass(most: int, image_numbers: int, one_row: Callable[[], object]) -> int:
    """Number of images in a pass without gradients: as many as have at most `MOST_BYTES` in its largest tensor.

    Args:
        most: returned if that many images are a `SMALL_PASS`; never exceeded.
        image_numbers: numbers in an image, C * H * W.
        one_row: computes the pass for one image. Its tensors are measured, so the networks may be anyone's.
    """
    if most * image_numbers <= SMALL_PASS:
        return most
    return max(1, min(most, MOST_BYTES // largest_tensor(one_row)))


def largest_tensor(compute: Callable[[], object]) -> int:
    """Bytes of the largest tensor that an operation of a computation returns, without gradients; at least 1."""
    with torch.no_grad(), _LargestTensor() as found:
        compute()
    return found.bytes


class _LargestTensor(OperationWatch):
    """Bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 1

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.bytes = max([self.bytes, *(tensor.numel() * tensor.element_size() for tensor in tensors)])
        return result
