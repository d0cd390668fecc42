"""Rows of the global batch for each process and each of its micro-batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
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


def refuse_split_groups(config: TrainConfig, processes: Processes, objective: Objective) -> None:
    """Raise ConfigError if micro-batches would split rows that a layer takes together, as `rows_together` says.

    Every process comes to the same result.
    """
    layers = [layer for layer in objective.modules() if getattr(layer, "rows_together", 1) > 1]
    size, parts = config.global_batch_size, config.shards or processes.world_size * config.accumulation
    for layer in layers:
        together: int = layer.rows_together  # type: ignore[assignment]
        if any(size * part // parts % together for part in range(1, parts + 1)):
            step = parts * together
            fitting = " or ".join(str(one) for one in (size // step * step, -(-size // step) * step) if one)
            raise ConfigError(
                f"{type(layer).__name__} takes {together} images of a batch together, which global_batch_size {size} "
                f"in {parts} micro-batch{'es' * (parts > 1)} would split; use --global-batch-size {fitting}, or "
                "another --minibatch-group"
            )


def rows_of_rank(config: TrainConfig, processes: Processes) -> Rows:
    """Cut the global batch into micro-batches with sizes that differ by at most one row, and take this process's.

    Raises:
        ConfigError: a micro-batch would have no images.
    """
    size, parts = config.global_batch_size, config.shards or processes.world_size * config.accumulation
    accumulation = parts // processes.world_size
    if size < parts:
        raise ConfigError(
            f"global_batch_size {size} is less than {processes.world_size} processes x accumulation "
            f"{config.accumulation}: some would have no images; use at least {parts}, or fewer of them"
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
