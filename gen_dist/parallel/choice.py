"""The choices of a run: how it sums over a batch, and how a phase's gradients are averaged over the processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.parallel.batch_sums import BatchSums, OwnSums
from gen_dist.parallel.gradients import FlatReduction, Reduction, SharedReduction
from gen_dist.parallel.part_gradients import PartReduction
from gen_dist.parallel.part_sums import PartSums
from gen_dist.parallel.processes import Processes
from gen_dist.parallel.shared_weights import share_weights
from gen_dist.parallel.split_gradients import SplitPartReduction, SplitReduction

_BUCKETS = 4
_SMALLEST_BUCKET, _LARGEST_BUCKET = 2**20, 25 * 2**20  # bytes


def choose_sums(config: TrainConfig, processes: Processes) -> BatchSums:
    """Choose how sums over a batch are taken.

    Raises:
        ConfigError: the shards cannot be shared out evenly among the processes.
    """
    if config.shards:
        return PartSums(config.shards, processes)
    if processes.world_size == 1:
        return OwnSums()
    return BatchSums(processes.rank, processes.world_size)


def choose_reduction(
    parameters: Sequence[nn.Parameter],
    processes: Processes,
    sums: BatchSums,
    dtype: torch.dtype,
    *,
    shareable: bool,
    split: bool,
) -> Reduction:
    """Choose the reduction of a phase's gradients. A collective call.

    Args:
        parameters: parameters that the phase trains, equal in all processes.
        processes: the processes that train together.
        sums: sums over the batch.
        dtype: of the networks' arithmetic.
        shareable: False if the parameters may not be moved to shared memory.
        split: each process updates a part of the weights, and has the optimizer's state for it alone.

    Raises:
        ConfigError: `split` in fp16.
    """
    split &= processes.world_size > 1
    if split and dtype == torch.float16:
        raise ConfigError(
            "split_state in fp16: each process would see the overflows of its own part alone; use --precision bf16 or "
            "float32"
        )
    if isinstance(sums, PartSums):
        return SplitPartReduction(parameters, sums) if split else PartReduction(parameters, sums)
    if processes.world_size == 1:
        return Reduction(parameters)
    shared = share_weights(parameters) if shareable and processes.device.type == "cpu" else None
    if shared:
        return SharedReduction(parameters, shared)
    overlapping = processes.device.type == "cuda"
    bucket_bytes = full_bucket_bytes(parameters) if overlapping else None
    if split:
        return SplitReduction(parameters, bucket_bytes, scatters=processes.device.type == "cuda")
    return FlatReduction(parameters, bucket_bytes)


def full_bucket_bytes(parameters: Sequence[nn.Parameter]) -> int:
    """Size at which a bucket of a phase's gradients is full, if buckets are sent during backward."""
    size = sum(parameter.nbytes for parameter in parameters) // _BUCKETS
    return min(max(size, _SMALLEST_BUCKET), _LARGEST_BUCKET)
