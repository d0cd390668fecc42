"""Sums over the images of a batch, which several processes and micro-batches share.

`BatchSums` adds in the order that is fastest, so that results depend on the number of processes in their last digits.
`PartSums` (see part_sums.py) adds in one order on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

from torch import Tensor, nn

from gen_dist.parallel.collectives import differentiable_sum

T = TypeVar("T")


class BatchSums:
    """Sums over a batch of which each process has its rows."""

    leads = True
    """True if buffers may be updated here from sums over the batch, which several micro-batches may request."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.parts = world_size
        """Number of parts into which the images of an evaluation are cut."""
        self.own_parts = range(rank, rank + 1)
        """Parts of this process."""

    def total(self, values: Tensor) -> Tensor:
        """Sum values that each process has computed from its micro-batch, in a forward pass, with gradients."""
        return differentiable_sum(values)

    def over(self, statistic: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
        """Sum a statistic over the batch, outside of forward and backward passes.

        Args:
            statistic: function from micro-batches to a sum over their images.
            items: this process's micro-batches, or what was computed from them.
        """
        return differentiable_sum(statistic(items))

    def total_of(self, of_parts: Sequence[Tensor]) -> Tensor:
        """Sum tensors over all parts, given those of `own_parts`."""
        (own,) = of_parts
        return differentiable_sum(own)

    def refuse_network(self, network: nn.Module) -> None:
        """Raise ConfigError if the network updates buffers from images of one process where that may not be."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        """The same sums: a copy of a network trains with the same processes."""
        return self


class OwnSums(BatchSums):
    """Sums of a process that trains by itself. It may have joined others, which take no part."""

    def total(self, values: Tensor) -> Tensor:
        """See BatchSums."""
        return values

    def over(self, statistic: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
        """See BatchSums."""
        return statistic(items)

    def total_of(self, of_parts: Sequence[Tensor]) -> Tensor:
        """See BatchSums."""
        (own,) = of_parts
        return own
