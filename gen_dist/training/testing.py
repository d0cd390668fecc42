"""Test metrics of an objective. Each image counts once over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.data import Split
from gen_dist.objectives import Batch, Objective
from gen_dist.objectives.evaluating import evaluating
from gen_dist.parallel.collectives import copy_from_main, from_main, sum_over_processes
from gen_dist.parallel.processes import Processes
from gen_dist.training.turn import autocast


def mean_metrics(
    objective: Objective,
    split: Split,
    processes: Processes,
    *,
    seed: int,
    dtype: torch.dtype,
    decoded_per_batch: int = 1000,
) -> dict[str, float]:
    """Compute mean metrics of an objective over a split. A collective call.

    Noise is keyed by the image's index in the split, so two evaluations of one model give the same metrics.

    Args:
        objective: the objective, with weights equal in all processes.
        split: images and labels.
        processes: the processes that share the images.
        seed: seed of the noise.
        dtype: dtype of the networks' arithmetic.
        decoded_per_batch: latents decoded at once. An image has as many latents as importance samples.
    """
    images_per_batch = max(1, decoded_per_batch // objective.evaluation_samples)
    rank, world_size, device = processes.rank, processes.world_size, processes.device
    count = len(split.images)
    first, last = -(-count * rank // world_size), -(-count * (rank + 1) // world_size)
    rng = torch.tensor([seed, 0], dtype=torch.int64, device=device)
    # Each process has normalization statistics of its own images. A checkpoint contains those of rank 0.
    copy_from_main(list(objective.buffers()), processes)
    sums: dict[str, Tensor] = {}
    with evaluating(objective), autocast(device, dtype):
        for start in range(first, last, images_per_batch):
            chosen = slice(start, min(start + images_per_batch, last))
            images = torch.from_numpy(split.images[chosen]).to(device)
            labels = torch.from_numpy(split.labels[chosen]).to(device)
            for key, value in objective.evaluate(Batch(images, labels, rng, start)).items():
                sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64)) + value.double().sum().cpu()
    names = from_main(list(sums), processes)
    if not names:
        return {}
    totals = torch.stack([sums.get(name, torch.zeros((), dtype=torch.float64)) for name in names])
    totals = sum_over_processes(totals.to(device)).cpu() / count
    return dict(zip(names, totals.tolist(), strict=True))
