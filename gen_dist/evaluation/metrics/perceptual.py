"""Perceptual distance of test images from their reconstructions, in a frozen network's features."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.features import IMAGES_PER_PASS
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.evaluation.reconstructing import reconstructed


def distances(context: Context, rows: Tensor) -> Tensor:
    """Perceptual distance of the test images in these rows int64 [M] from their reconstructions: float64 [M]."""
    assert context.perceptual is not None
    found = []
    for some in rows.split(IMAGES_PER_PASS):
        # Row by row: test images may lie in a file.
        originals = torch.cat([context.test_batch(row, row + 1).images for row in some.tolist()])
        images = reconstructed(context).images[some.to(originals.device)]
        pair = (images / 127.5 - 1.0, originals / 127.5 - 1.0)
        found.append(context.perceptual.distance(*pair).double())
    return torch.cat(found)


def measure(context: Context) -> dict[str, Value]:
    """Mean perceptual distance of the chosen test images."""
    chosen = torch.as_tensor(context.nll_rows)
    compute = lambda first, last: (distances(context, chosen[first:last]),)  # noqa: E731
    return {"perceptual_distance": float(context.rows(len(chosen), "perceptual distance", compute)[0].mean())}


def estimate(context: Context) -> tuple[str, float]:
    """Announcement of the number of images and of the time in seconds, estimated from that of a few."""
    assert context.perceptual is not None
    images = context.test_batch(0, 8).images / 127.5 - 1.0  # this process alone: reconstructions are a collective call
    context.perceptual.distance(images, images)  # warms up
    started = time.perf_counter()
    context.perceptual.distance(images, images)[-1].item()
    seconds = (time.perf_counter() - started) / len(images)
    first, last = context.share(len(context.nll_rows))
    what = f"perceptual distance of {len(context.nll_rows):,} test images from their reconstructions"
    return what, seconds * (last - first)


register(
    Metric(
        name="perceptual_distance",
        label="perceptual distance",
        group="reconstruction",
        better="less",
        meaning="Distance of test images from their reconstructions in a frozen network's features, as by LPIPS.",
        needs=("encoder", "perceptual features"),
        counts="chosen test images",
        named_after="perceptual features",
        measure=measure,
        takes_minutes=True,
        estimate=estimate,
    )
)
