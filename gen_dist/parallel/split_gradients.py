"""Averaging of gradients where each process updates its own part of the weights, whose state it alone has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.parallel.collectives import gathered
from gen_dist.parallel.gradients import Bucket, FlatReduction, Reduction, State
from gen_dist.parallel.own_part import Chunks, OwnPart
from gen_dist.parallel.part_gradients import PartReduction
from gen_dist.parallel.part_sums import PartSums


class _OfOwnPart(Reduction):
    """Reduction of a process that updates one part of the weights."""

    _part: OwnPart
    _index_of: dict[Tensor, int]

    def _take_part(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self._part = OwnPart(groups, dist.get_rank(), dist.get_world_size())
        self._index_of = {parameter: index for index, parameter in enumerate(self.parameters)}
        self.updated = self._part.updated

    def publish(self) -> None:
        """See Reduction."""
        self._part.publish()

    def full_state(self, states: Mapping[Tensor, Mapping[str, Tensor | None]]) -> list[tuple[int, str, Tensor]]:
        """See Reduction."""
        return self._part.full_state(states, self._index_of)

    def own_state(self, states: dict[int, State]) -> dict[int, State]:
        """See Reduction."""
        return self._part.own_state(states, self._index_of)


class SplitReduction(_OfOwnPart, FlatReduction):
    """Gradients in flat buckets, each of which is summed for the process that updates its part."""

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int | None, *, scatters: bool) -> None:
        """Make the buckets, as FlatReduction does, and the part.

        Args:
            parameters: parameters that the phase trains, equal in all processes.
            bucket_bytes: size at which a bucket is full.
            scatters: each process gets the sum of its own part alone, at half of an all-reduce's bytes. Else all get
                all sums, by the same all-reduce as without parts: gloo has no other way, and so the bits are the same.
        """
        self._scatters = scatters
        self._own_sums: list[Tensor] = []
        super().__init__(parameters, bucket_bytes)
        self._take_part([bucket.parameters for bucket in self._buckets])

    def norm(self) -> Tensor:
        """See Reduction. Gradients that only their own process has are gathered for it."""
        if self._scatters:
            for bucket, chunks in zip(self._buckets, self._part.chunks, strict=True):
                _gather(bucket, chunks)
        return super().norm()

    def _make_bucket(self, parameters: Sequence[nn.Parameter]) -> Bucket:
        return Bucket(parameters, more=Chunks(parameters, dist.get_rank(), dist.get_world_size()).padding)

    def _send(self, bucket: Bucket) -> None:
        if not self._scatters:
            super()._send(bucket)
            return
        scatter = torch.ops._c10d_functional.reduce_scatter_tensor
        self._own_sums.append(scatter(bucket.flat, "sum", dist.get_world_size(), self._group_name))

    def _take_sums(self) -> None:
        if self._scatters:
            for bucket, chunks, own in zip(self._buckets, self._part.chunks, self._own_sums, strict=True):
                whole = torch.ops._c10d_functional.wait_tensor(own)
                torch.mul(whole, 1.0 / dist.get_world_size(), out=bucket.flat[chunks.own])
            self._own_sums.clear()
        else:
            super()._take_sums()
        self._part.take_gradients()


class SplitPartReduction(_OfOwnPart, PartReduction):
    """Gradients of the parts of a batch, summed by the tree, each chunk for the process that updates its part."""

    def __init__(self, parameters: Sequence[nn.Parameter], sums: PartSums) -> None:
        super().__init__(parameters, sums)
        self._take_part(self._groups)
        self._paddings = [chunks.padding for chunks in self._part.chunks]

    def average(self) -> None:
        """See Reduction."""
        super().average()
        self._part.take_gradients()

    def norm(self) -> Tensor:
        """See Reduction. The gradients are gathered for it: a sum in another order would have other bits."""
        for bucket, chunks in zip(self._free[-1].buckets, self._part.chunks, strict=True):
            _gather(bucket, chunks)
        return super().norm()

    def _average_bucket(self, number: int, bucket: Bucket) -> None:
        marks = bucket.flat[-len(bucket.parameters) :]
        own = self.sums.chunk_over_processes(bucket.flat[: -len(marks)])
        torch.mul(own, 1.0 / self.sums.parts, out=bucket.flat[self._part.chunks[number].own])
        marks.copy_(self.sums.over_processes(marks))


def _gather(bucket: Bucket, chunks: Chunks) -> None:
    """Gather a bucket's gradients from the processes that have them. A collective call."""
    whole = gathered(bucket.flat[chunks.own])
    bucket.flat[: len(whole)].copy_(whole)
