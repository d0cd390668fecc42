"""Bottlenecks of latent autoencoders, one file each."""

from gen_dist.config import BottleneckName, LatentAutoencoderConfig
from gen_dist.objectives.bottlenecks.base import Bottleneck, Coded
from gen_dist.objectives.bottlenecks.fsq import FiniteScalarQuantizer
from gen_dist.objectives.bottlenecks.identity import Identity
from gen_dist.objectives.bottlenecks.kl import GaussianPosterior
from gen_dist.objectives.bottlenecks.vq import VectorQuantizer

__all__ = ["Bottleneck", "Coded", "bottleneck_class"]

_CLASSES: dict[BottleneckName, type[Bottleneck]] = {
    "kl": GaussianPosterior,
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "none": Identity,
}


def bottleneck_class(config: LatentAutoencoderConfig) -> type[Bottleneck]:
    """Class of the bottleneck of a config, to be made from the config and the latents' shape."""
    return _CLASSES[config.bottleneck]
