"""rFID: the Frechet distance of the features of test images and of their reconstructions."""

from __future__ import annotations

import time

from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.evaluation.metrics.frechet import frechet_distance, moments
from gen_dist.evaluation.reconstructing import reconstructed


def measure(context: Context) -> dict[str, Value]:
    """Frechet distance of all test images from their reconstructions."""
    network, images = context.reconstruction_network, reconstructed(context).images
    assert network is not None

    def of_reconstructions(first: int, last: int) -> tuple[Tensor]:
        return (network.of_images(images[first:last])[0],)

    def of_originals(first: int, last: int) -> tuple[Tensor]:
        return (network.of_images(context.test_batch(first, last).images)[0],)

    def all_originals() -> Tensor:
        return context.rows(len(images), "test images", of_originals)[0]

    if network is context.network:
        real = context.real.features
    else:
        real = context.reference(f"features {network.digest[:16]}", all_originals)
    (features,) = context.rows(len(images), "features of reconstructions", of_reconstructions)
    return {"rfid": frechet_distance(moments(real), moments(features))}


def estimate(context: Context) -> tuple[str, float] | None:
    """Announcement of the number of images and of the time in seconds. The digit network takes no time."""
    network, count = context.reconstruction_network, len(context.dataset.test.images)
    assert network is not None
    if network.name == "digits":
        return None
    some = context.test_batch(0, 8).images  # this process alone: reconstructions are a collective call
    network.of_images(some)  # warms up
    started = time.perf_counter()
    network.of_images(some)[0][-1, -1].item()
    seconds = 2.0 * (time.perf_counter() - started) / len(some)  # of originals and reconstructions
    first, last = context.share(count)
    return f"Frechet distance of {count:,} test images from their reconstructions", seconds * (last - first)


register(
    Metric(
        name="rfid",
        label="rFID",
        group="reconstruction",
        better="less",
        meaning="Fréchet distance of the features of test images and of their reconstructions.",
        needs=("encoder", "test images", "features of reconstructions"),
        counts="test images",
        named_after="features",
        measure=measure,
        rests_on_features=True,
        takes_minutes=True,
        estimate=estimate,
    )
)
