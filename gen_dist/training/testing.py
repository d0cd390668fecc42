"""Test metrics of an objective. Each image counts once over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gen_dist.data import Split
from gen_dist.errors import ConfigError
from gen_dist.objectives import Batch, Objective
from gen_dist.objectives.evaluating import evaluating, rows_per_pass
from gen_dist.parallel.batch_sums import BatchSums
from gen_dist.parallel.collectives import copy_from_main, from_main
from gen_dist.parallel.processes import Processes
from gen_dist.training.turn import autocast


def mean_metrics(
    objective: Objective,
    split: Split,
    processes: Processes,
    batch_sums: BatchSums,
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
        batch_sums: the parts of the split, and sums over them.
        seed: seed of the noise.
        dtype: dtype of the networks' arithmetic.
        decoded_per_batch: most latents decoded at once, fewer of large images. An image has as many latents as
            importance samples.
    """
    device, count = processes.device, len(split.images)
    rng = torch.tensor([seed, 0], dtype=torch.int64, device=device)
    # Each process has normalization statistics of its own images. A checkpoint contains those of rank 0.
    copy_from_main(list(objective.buffers()), processes)
    sums: list[dict[str, Tensor]] = []
    zero = torch.zeros((), dtype=torch.float64)

    def measured(start: int, end: int) -> dict[str, Tensor]:
        rows = slice(start, end)
        images, labels = (found.to(device) for found in (split.for_model(rows), torch.from_numpy(split.labels[rows])))
        found = objective.evaluate(Batch(images, labels, rng, start))
        _refuse_bad_figures(objective, found, len(images))
        return found

    with evaluating(objective), autocast(device, dtype):
        largest_part = -(-count // batch_sums.parts)
        images_per_batch = max(1, min(decoded_per_batch // objective.evaluation_samples, largest_part))
        if count:
            rows = rows_per_pass(images_per_batch, split.images[0].size, lambda: measured(0, 1))
            images_per_batch = from_main(rows, processes)
        for part in batch_sums.own_parts:
            first, last = (-(-count * edge // batch_sums.parts) for edge in (part, part + 1))
            sums.append({})
            for start in range(first, last, images_per_batch):
                for key, value in measured(start, min(start + images_per_batch, last)).items():
                    sums[-1][key] = sums[-1].get(key, zero) + value.double().sum().cpu()
    names = from_main(list(sums[0]), processes)
    if not names:
        return {}
    of_parts = [torch.stack([of_part.get(name, zero) for name in names]).to(device) for of_part in sums]
    totals = batch_sums.total_of(of_parts).cpu() / count
    return dict(zip(names, totals.tolist(), strict=True))


def _refuse_bad_figures(objective: Objective, found: Any, count: int) -> None:
    """Raise ConfigError if `evaluate` does not give each of the config's test metrics, one value an image."""
    owner, wanted = type(objective).__name__, objective.config.test_metrics
    if not isinstance(found, Mapping) or set(found) != set(wanted):
        names = ", ".join(found) if isinstance(found, Mapping) else type(found).__name__
        raise ConfigError(f"{owner}.evaluate gives {names}; its config's test_metrics are {', '.join(wanted)}")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.shape != (count,):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{owner}.evaluate gives {name} as {shape}, not one value an image, [{count}]")
