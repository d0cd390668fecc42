"""Perceptual path length, in features of unrounded images (Karras et al. 2019, eq. 2)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.inference.latent_walks import on_great_circles
from gen_dist.kernels import Key, normal
from gen_dist.randomness import Stream

WALK_STEP = 1e-4
"""Part of the way between two latents (Karras et al. 2019, section 4.1)."""


def measure(context: Context) -> dict[str, Value]:
    """Mean squared speed of the features along walks between latents."""
    model, network = context.model, context.network
    assert network is not None and network.of_intensities is not None
    of_intensities, shape = network.of_intensities, model.objective.latent_shape
    width = math.prod(shape)
    rng = torch.tensor([0, 0])  # as for samples: on the CPU, whatever the device

    def compute(first: int, last: int) -> tuple[Tensor]:
        draws = normal(Key(rng, Stream.WALKS, first), last - first, 2 * width + 1)
        starts, ends = draws[:, :width].numpy(), draws[:, width:-1].numpy()
        parts = torch.special.ndtr(draws[:, -1:].double()).numpy()  # uniform in 0..1
        walks = on_great_circles(starts, ends, np.concatenate([parts, parts + WALK_STEP], axis=1))
        labels = context.labels(first, last)
        twice = None if labels is None else labels.repeat_interleave(2, dim=0)
        intensities = model.objective.pixels(model.decode(torch.from_numpy(walks).view(-1, *shape), twice))
        here, there = of_intensities(intensities).double().unflatten(0, (-1, 2)).unbind(dim=1)
        return ((here - there).square().sum(dim=1) / WALK_STEP**2,)

    (lengths,) = context.rows(context.samples, "walks", compute)
    return {"path_length": float(lengths.mean())}


register(
    Metric(
        name="path_length",
        label="path length",
        group="walks",
        better="less",
        meaning="Change of the image along a walk between latents: less is smoother, or samples that are alike.",
        needs=("samples", "features", "features of intensities"),
        counts="samples",
        measure=measure,
        stage="walks",
        rests_on_features=True,
    )
)
