"""Likelihoods: negative ELBO, the importance-sampled negative log-likelihood, and bits per dimension."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.marginal_likelihood import negative_log_likelihoods
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.objectives.vae import Vae
from gen_dist.randomness import Stream


def bits_per_dimension(nll_nats: float, image_shape: tuple[int, int, int]) -> float:
    """A negative log-likelihood in nats per image as bits per pixel and channel, for discrete pixels."""
    return nll_nats / (math.log(2.0) * math.prod(image_shape))


def measure_negative_elbo(context: Context) -> dict[str, Value]:
    """Mean negative ELBO of the test images, one latent sample each."""
    objective = context.objective
    assert isinstance(objective, Vae)

    def compute(first: int, last: int) -> tuple[Tensor]:
        batch = context.test_batch(first, last)
        targets = objective.targets(batch, Stream.TEST_BINARIZATION)
        nll, kl = objective.nll_and_kl(targets, batch, Stream.TEST_LATENTS)
        return ((nll + kl).double(),)

    (elbos,) = context.rows(len(context.dataset.test.images), "posterior", compute)
    return {"negative_elbo": float(elbos.mean())}


def _nll(context: Context) -> float:
    """Mean negative log-likelihood of the chosen test images in nats, computed once for both metrics."""

    def compute() -> float:
        objective = context.objective
        assert isinstance(objective, Vae)
        rows = context.nll_rows.tolist()
        mine = rows[slice(*context.share(len(rows)))]
        shown = context.in_logs(mine, f"nll of {context.nll_samples} samples", "image")
        total = torch.zeros((), dtype=torch.float64, device=context.rng.device)
        for row in shown:
            # Noise is keyed by the place in the split, so it does not depend on the other images chosen.
            total += negative_log_likelihoods(objective, context.test_batch(row, row + 1), context.nll_samples)[0]
        return float(context.summed(total)) / len(rows)

    return context.once("nll", compute)


def estimate_nll(context: Context) -> tuple[str, float]:
    """Announcement of the likelihood's size and of its time in seconds, estimated from the time of one image."""
    images = len(context.nll_rows)

    def seconds_of_one() -> float:
        objective = context.objective
        assert isinstance(objective, Vae)
        started = time.perf_counter()
        negative_log_likelihoods(objective, context.test_batch(0, 1), context.nll_samples)[0].item()
        return time.perf_counter() - started

    seconds = context.once("nll estimate", lambda: min(seconds_of_one(), seconds_of_one()))  # the first one warms up
    first, last = context.share(images)
    what = f"negative log-likelihood of {images:,} test images with {context.nll_samples:,} importance samples each"
    return what, seconds * (last - first)


def measure_nll(context: Context) -> dict[str, Value]:
    """Negative log-likelihood in nats per image."""
    return {"nll": _nll(context)}


def measure_bits(context: Context) -> dict[str, Value]:
    """Negative log-likelihood in bits per pixel and channel."""
    return {"bits_per_dimension": bits_per_dimension(_nll(context), context.dataset.image_shape)}


register(
    Metric(
        name="negative_elbo",
        label="negative ELBO",
        group="likelihood",
        better="less",
        meaning="Bound on the test images' negative log-likelihood, one latent an image.",
        unit="nats",
        needs=("likelihood",),
        measure=measure_negative_elbo,
        stage="posterior",
        of_pixels=True,
    )
)
register(
    Metric(
        name="nll",
        label="negative log-likelihood",
        group="likelihood",
        better="less",
        meaning="Importance-sampled estimate for the test images, a tighter bound.",
        unit="nats",
        needs=("likelihood",),
        counts="importance samples",
        measure=measure_nll,
        stage="likelihood",
        of_pixels=True,
        takes_minutes=True,
        estimate=estimate_nll,
    )
)
register(
    Metric(
        name="bits_per_dimension",
        label="bits per dimension",
        group="likelihood",
        better="less",
        meaning="The same in bits, per pixel and channel.",
        unit="bits",
        needs=("likelihood", "discrete pixels"),
        counts="importance samples",
        measure=measure_bits,
        stage="likelihood",
        of_pixels=True,
        takes_minutes=True,
        estimate=estimate_nll,
    )
)
