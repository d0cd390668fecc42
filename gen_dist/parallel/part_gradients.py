"""Gradients of the fixed parts of a batch, summed in the order of one binary tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gen_dist.parallel.gradients import Bucket, Reduction, in_buckets
from gen_dist.parallel.part_sums import PartSums


class PartReduction(Reduction):
    """Gradients that are given for each part, and summed by the tree of PartSums. Every process updates all weights.

    Two subtrees of one size are added as soon as both are complete, so log2(parts of this process) + 1 sums are in
    memory at most.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sums: PartSums) -> None:
        super().__init__(parameters)
        self.sums = sums
        """Sums over the batch."""
        self._groups = in_buckets(self.parameters, None)
        self._paddings = [0] * len(self._groups)
        self._subtrees: list[Subtree] = []
        """Complete subtrees; later ones are smaller."""
        self._free: list[Subtree] = []

    def add_part(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of the next part. None is that of a parameter without part in the loss."""
        found = {parameter: one for parameter, one in zip(self.parameters, gradients, strict=True) if one is not None}
        subtrees = self._subtrees
        if subtrees and subtrees[-1].parts == 1:
            subtrees[-1].add_gradients(found)
        else:
            subtrees.append(self._free.pop() if self._free else Subtree(self._groups, self._paddings))
            subtrees[-1].start(found)
        while len(subtrees) > 1 and subtrees[-2].parts == subtrees[-1].parts:
            self._free.append(subtrees.pop())
            subtrees[-1].add(self._free[-1])

    def average(self) -> None:
        """See Reduction."""
        (whole,) = self._subtrees
        whole.mark_used()
        for number, bucket in enumerate(whole.buckets):
            self._average_bucket(number, bucket)
        whole.give()
        self._free.append(whole)
        self._subtrees.clear()

    def _average_bucket(self, _number: int, bucket: Bucket) -> None:
        torch.mul(self.sums.over_processes(bucket.flat), 1.0 / self.sums.parts, out=bucket.flat)


class Subtree:
    """Sum of the gradients of consecutive parts."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], paddings: Sequence[int]) -> None:
        """Make memory for parameters, which are grouped by dtype, with so many values behind each group."""
        self.buckets = [Bucket(one, more=padding + len(one)) for one, padding in zip(groups, paddings, strict=True)]
        self.parts = 0
        self._view_of = {
            parameter: view
            for bucket in self.buckets
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True)
        }
        self._used: set[nn.Parameter] = set()

    def start(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Begin with the gradients of one part."""
        self.parts, self._used = 1, set(gradients)
        for parameter, view in self._view_of.items():
            if parameter not in self._used:
                view.zero_()
        if gradients:
            torch._foreach_copy_([self._view_of[parameter] for parameter in gradients], list(gradients.values()))

    def add_gradients(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Add the gradients of the second part."""
        self.parts += 1
        self._used |= set(gradients)
        if gradients:
            torch._foreach_add_([self._view_of[parameter] for parameter in gradients], list(gradients.values()))

    def add(self, following: Subtree) -> None:
        """Add the subtree of the parts that follow."""
        self.parts += following.parts
        self._used |= following._used
        for bucket, other in zip(self.buckets, following.buckets, strict=True):
            bucket.flat.add_(other.flat)

    def mark_used(self) -> None:
        """Write behind the gradients which parameters these parts use, before the sum over the processes."""
        for bucket in self.buckets:
            marks = [float(parameter in self._used) for parameter in bucket.parameters]
            behind = bucket.flat[-len(marks) :]
            if all(marks):
                behind.fill_(1.0)  # without a copy to the device
            else:
                behind.copy_(torch.tensor(marks))

    def give(self) -> None:
        """Let the gradients of the parameters be views of the sum; those that no process uses stay None."""
        for bucket in self.buckets:
            if not self._used.issuperset(bucket.parameters):  # the parts of another process may use them
                marks = bucket.flat[-len(bucket.parameters) :].tolist()
                self._used |= {one for one, mark in zip(bucket.parameters, marks, strict=True) if mark > 0.0}
        for parameter, view in self._view_of.items():
            parameter.grad = view if parameter in self._used else None
