"""Rows of the global batch for each process and each of its micro-batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import nn

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, number_of
from gen_dist.objectives import Objective
from gen_dist.parallel.processes import Processes


@dataclass(frozen=True)
class Rows:
    """This process's rows of the global batch."""

    micro_batches: list[tuple[int, int]]
    """First global row and number of rows of each micro-batch."""
    batch_weights: list[float]
    """Weight of each micro-batch's mean loss in this process's gradients, times world_size. Gradients averaged over the
    processes are then those of the mean over all images. With shards, the same times the number of shards."""
    rank_weight: float
    """Weight of this process's mean in the mean over all images, times world_size: 1.0 if all have equal rows."""


def refuse_batch(objective: Objective, config: TrainConfig, processes: Processes) -> None:
    """Raise ConfigError if the batch is too small, or its micro-batches would split rows that a layer takes together.

    Every process comes to the same result.
    """
    objective.refuse_batch(config.global_batch_size)
    size, parts = config.global_batch_size, config.shards or processes.world_size * config.accumulation
    for layer, together in _grouping_layers(objective):
        if _splits_groups(size, parts, together):
            step = parts * together
            fitting = " or ".join(str(one) for one in (size // step * step, -(-size // step) * step) if one)
            raise ConfigError(
                f"{type(layer).__name__} takes {together} images of a batch together, which global_batch_size {size} "
                f"in {number_of(parts, 'micro-batch')} would split; use --global-batch-size {fitting}, or "
                "another --minibatch-group"
            )


def rows_together(objective: Objective) -> int:
    """Number of images in a row that no micro-batch may split: 1 without a layer that takes some together."""
    return math.lcm(*(together for _, together in _grouping_layers(objective)))


def uncut_accumulations(config: TrainConfig, processes: Processes, together: int) -> list[int]:
    """Accumulations, from the config's to that with micro-batches of one image, which split no groups of `together`."""
    size, world_size = config.global_batch_size, processes.world_size
    numbers = range(config.accumulation, size // world_size + 1)
    return [number for number in numbers if not _splits_groups(size, world_size * number, together)]


def _splits_groups(size: int, parts: int, together: int) -> bool:
    """True if `size` images in `parts` micro-batches have one that splits groups of `together` images.

    Micro-batches differ by one image at most, so groups stay whole only where all have equally many of them.
    """
    return together > 1 and size % (parts * together) != 0


def _grouping_layers(objective: Objective) -> list[tuple[nn.Module, int]]:
    """Layers that take several images together, and how many."""
    found = [(layer, getattr(layer, "rows_together", 1)) for layer in objective.modules()]
    return [(layer, together) for layer, together in found if together > 1]


def rows_of_rank(config: TrainConfig, processes: Processes) -> Rows:
    """Cut the global batch into micro-batches with sizes that differ by at most one row, and take this process's.

    Raises:
        ConfigError: a micro-batch would have no images.
    """
    size, parts = config.global_batch_size, config.shards or processes.world_size * config.accumulation
    accumulation = parts // processes.world_size
    if size < parts:
        ways = [f"--global-batch-size {parts} or more"]
        if processes.world_size <= size:
            ways.append(f"--accumulation {size // processes.world_size} or less")
        if processes.world_size > 1:
            ways.append("fewer processes")
        if len(ways) > 1:
            ways[-1] = f"or {ways[-1]}"
        raise ConfigError(
            f"global_batch_size {size} is less than {number_of(processes.world_size, 'process')} x "
            f"accumulation {config.accumulation}: some would have no images; use {', '.join(ways)}"
        )
    first = processes.rank * accumulation
    edges = [size * part // parts for part in range(first, first + accumulation + 1)]
    micro_batches = [(start, end - start) for start, end in itertools.pairwise(edges)]
    rows = sum(count for _, count in micro_batches)
    rank_weight = rows * processes.world_size / size
    if config.shards:
        weights = [count * config.shards / size for _, count in micro_batches]
    else:
        weights = [rank_weight * count / rows for _, count in micro_batches]
    return Rows(micro_batches, weights, rank_weight)
