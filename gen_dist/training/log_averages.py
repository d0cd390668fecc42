"""Logs of steps, averaged over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gen_dist.parallel.collectives import sum_over_processes
from gen_dist.parallel.processes import Processes
from gen_dist.records.score_bins import SCORE_EDGES


def average_logs(
    logs: Sequence[dict[str, Tensor]], processes: Processes, rank_weight: float
) -> list[dict[str, float | list[float]]]:
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
