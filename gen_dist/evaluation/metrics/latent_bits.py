"""Information in a latent, in bits."""

from __future__ import annotations

import math

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, UnavailableError, Value, register
from gen_dist.evaluation.metrics.codebook import code_counts, entropy_nats
from gen_dist.evaluation.reconstructing import reconstructed


def bits_per_latent(kl_nats: float, latent_shape: tuple[int, ...]) -> float:
    """KL divergence of an image's posterior from N(0, I) in nats, as bits for each of its latents.

    It is what a sender needs on average who codes draws of the posterior by the prior (Hinton & van Camp 1993).
    """
    return kl_nats / (math.log(2.0) * math.prod(latent_shape))


def measure(context: Context) -> dict[str, Value]:
    """Bits a latent over the test images. Codes have the entropy of their shares; one code is one latent."""
    if context.objective.codebook_size:
        return {"bits_per_latent": entropy_nats(code_counts(context)) / math.log(2.0)}
    kl_nats = reconstructed(context).kl_nats
    if kl_nats is None:
        raise UnavailableError("its latents have no posterior, so no finite information")
    return {"bits_per_latent": bits_per_latent(float(kl_nats.mean()), context.objective.latent_shape)}


register(
    Metric(
        name="bits_per_latent",
        label="bits a latent",
        group="latents",
        better=None,
        meaning="Information in one latent of a test image: KL divergence from N(0, I), or entropy of the codes.",
        unit="bits",
        needs=("encoder",),
        measure=measure,
        stage="posterior",
    )
)
