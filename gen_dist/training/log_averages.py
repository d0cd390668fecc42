"""Logs of steps, averaged over all images of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gen_dist.parallel.batch_sums import BatchSums
from gen_dist.parallel.collectives import sum_over_processes
from gen_dist.parallel.part_sums import PartSums
from gen_dist.parallel.processes import Processes
from gen_dist.records.score_bins import SCORE_EDGES
from gen_dist.training.rows import Rows

Logs = dict[str, Tensor]
"""Logs of a step on the device, by name."""
Row = dict[str, float | list[float]]
"""Logs of a step as numbers and histograms, by name."""


def average_logs(logs: Sequence[Logs], processes: Processes, rank_weight: float) -> list[Row]:
    """Average the logs of some steps over all processes, as numbers. Waits for the device. A collective call.

    Values of single images become the shares of images in the bins of SCORE_EDGES.

    Args:
        logs: for each step, means [] over this process's images, or one value per image [B].
        processes: the processes that train together.
        rank_weight: weight of this process's mean, times world_size.
    """
    if not logs:
        return []
    rows = _with_histograms(logs)
    flat = torch.cat([value.float().reshape(-1) for row in rows for value in row.values()]).double().cpu()
    if processes.world_size > 1:
        moved = flat.to(processes.device)
        flat = (sum_over_processes(moved * rank_weight) / processes.world_size).cpu()
    numbers = iter(flat.tolist())
    return [
        {key: [next(numbers) for _ in range(len(value))] if value.ndim else next(numbers) for key, value in row.items()}
        for row in rows
    ]


def stacked_logs(of_parts: Sequence[Logs]) -> Logs:
    """Logs of a turn for `average_logs_of_parts`: a row for each part of this process.

    Means have shape [parts]. Values of single images become the shares of images in the bins of SCORE_EDGES,
    [parts, bins].
    """
    rows = [_with_histograms([one])[0] for one in of_parts]
    return {name: torch.stack([row[name].float() for row in rows]) for name in rows[0]}


def average_logs_of_parts(logs: Sequence[Logs], weights: Sequence[float], sums: PartSums) -> list[Row]:
    """Average the logs of some steps over the fixed parts of their batches, as numbers. A collective call.

    Args:
        logs: for each step, those of `stacked_logs`; a value [] is one of the whole batch.
        weights: weight of each part of this process, times the number of parts.
        sums: sums over the parts.
    """
    values = [value for row in logs for value in row.values() if value.ndim]
    if not values:
        return [{key: value.item() for key, value in row.items()} for row in logs]
    table = torch.cat([value.double().reshape(len(value), -1) for value in values], dim=1)
    weighted = [of_part * weight for of_part, weight in zip(table, weights, strict=True)]
    means = iter((sums.total_of(weighted) / sums.parts).tolist())

    def as_numbers(value: Tensor) -> float | list[float]:
        if value.ndim == 2:
            return [next(means) for _ in range(value.shape[1])]
        return next(means) if value.ndim else value.item()

    return [{key: as_numbers(value) for key, value in row.items()} for row in logs]


def choose_log_averages(processes: Processes, rows: Rows, sums: BatchSums) -> Callable[[Sequence[Logs]], list[Row]]:
    """Choose the function that averages the logs of some steps."""
    if isinstance(sums, PartSums):
        return functools.partial(average_logs_of_parts, weights=rows.batch_weights, sums=sums)
    return functools.partial(average_logs, processes=processes, rank_weight=rows.rank_weight)


def _with_histograms(logs: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same logs, with shares [bins] in place of one value per image."""
    rows = [dict(row) for row in logs]
    for name in {name for row in rows for name, value in row.items() if value.ndim}:
        having = [row for row in rows if name in row]
        values = torch.stack([row[name] for row in having]).float()
        inner_edges = torch.tensor(SCORE_EDGES[1:-1], device=values.device)
        counts = torch.zeros(len(values), len(inner_edges) + 1, device=values.device)
        counts.scatter_add_(1, torch.bucketize(values, inner_edges, right=True), torch.ones_like(values))
        for row, shares in zip(having, counts / values.shape[1], strict=True):
            row[name] = shares
    return rows
