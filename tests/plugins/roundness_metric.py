"""A plug-in to copy: a metric of generated images, measured beside ours.

gen-dist evaluate runs/vae-mnist --plugin roundness_metric.py --metrics roundness
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register


def roundness(images: Tensor) -> Tensor:
    """Short axis over long axis of each image's intensities, 0 (a line) to 1 (a disc): float64 [N].

    Args:
        images: uint8 [N, C, H, W]. Channels are averaged. An image without any intensity counts as round.
    """
    grey = images.double().mean(dim=1)
    mass = grey.sum(dim=(1, 2)).clamp(min=1e-9)
    height, width = grey.shape[1:]
    y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None].expand(height, width)
    x = torch.arange(width, dtype=torch.float64, device=images.device)[None, :].expand(height, width)

    def mean(values: Tensor) -> Tensor:
        return (grey * values).sum(dim=(1, 2)) / mass

    variance_x = mean(x * x) - mean(x) ** 2
    variance_y = mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    middle = (variance_x + variance_y) / 2
    spread = (((variance_x - variance_y) / 2) ** 2 + covariance**2).sqrt()
    return (((middle - spread).clamp(min=0.0) + 1e-9) / (middle + spread + 1e-9)).sqrt()


def measure(context: Context) -> dict[str, Value]:
    """Mean roundness of the samples and of the test images; each process computes its share of the rows."""

    def of(images: Tensor) -> Tensor:
        return context.rows(len(images), "roundness", lambda first, last: (roundness(images[first:last]),))[0].mean()

    of_data = context.reference("roundness", lambda: of(context.real.images))
    return {"roundness": float(of(context.sampled.images)), "roundness_data": float(of_data)}


register(
    Metric(
        name="roundness",
        label="roundness",
        group="pixels",
        better="data",
        meaning="Short axis over long axis of the samples' intensities: 0 for a line, 1 for a disc.",
        needs=("samples", "test images"),
        counts="samples",
        measure=measure,
    )
)
