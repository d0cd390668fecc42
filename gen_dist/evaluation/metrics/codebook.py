"""Use of a codebook by the test images: the share of its codes that occur, and the perplexity of their shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register


def code_counts(context: Context) -> Tensor:
    """Places of the test images that take each code, int64 [codebook_size]."""

    def compute() -> Tensor:
        def of_rows(first: int, last: int) -> tuple[Tensor]:
            codes = context.objective.codes(context.test_batch(first, last).images)
            return (codes.flatten(1),)

        (codes,) = context.rows(len(context.dataset.test.images), "codes", of_rows)
        return torch.bincount(codes.flatten(), minlength=context.objective.codebook_size)

    return context.once("code counts", compute)


def usage(counts: Tensor) -> float:
    """Fraction of the codes that occur."""
    return float((counts > 0).double().mean())


def entropy_nats(counts: Tensor) -> float:
    """Entropy of the codes' shares."""
    shares = counts.double() / counts.sum()
    return float(-torch.xlogy(shares, shares).sum())


def measure_usage(context: Context) -> dict[str, Value]:
    """Fraction of the codes that the test images take."""
    return {"codebook_usage": usage(code_counts(context))}


def measure_perplexity(context: Context) -> dict[str, Value]:
    """Exponential of the entropy of the codes' shares over the test images."""
    return {"codebook_perplexity": math.exp(entropy_nats(code_counts(context)))}


register(
    Metric(
        name="codebook_usage",
        label="codes used",
        group="latents",
        better="more",
        meaning="Fraction of the codebook's codes that occur in test images.",
        needs=("encoder", "codes"),
        measure=measure_usage,
        stage="codes",
    )
)
register(
    Metric(
        name="codebook_perplexity",
        label="perplexity of the codes",
        group="latents",
        better="more",
        meaning="Number of equally frequent codes with the entropy of those of test images.",
        needs=("encoder", "codes"),
        measure=measure_perplexity,
        stage="codes",
    )
)
