"""Sharpness of reconstructions beside that of the test images that they are of."""

from __future__ import annotations

import torch

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.evaluation.metrics.appearance import laplacian_variances
from gen_dist.evaluation.reconstructing import mean_over_pairs


def measure(context: Context) -> dict[str, Value]:
    """Mean variance of the Laplacian of the reconstructions, and of the test images."""
    name = "reconstruction_sharpness"

    def of_originals() -> torch.Tensor:
        mean = mean_over_pairs(context, name, lambda _, originals: laplacian_variances(originals))
        return torch.tensor(mean, dtype=torch.float64)

    of_data = context.reference(name, of_originals)
    found = mean_over_pairs(context, name, lambda images, _: laplacian_variances(images))
    return {name: found, f"{name}_data": float(of_data)}


register(
    Metric(
        name="reconstruction_sharpness",
        label="sharpness of reconstructions",
        group="reconstruction",
        better="data",
        meaning="Variance of the Laplacian of the reconstructions; blur lowers it, noise raises it.",
        needs=("encoder", "images"),
        measure=measure,
        stage="posterior",
    )
)
