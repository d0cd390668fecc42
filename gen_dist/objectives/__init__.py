"""Objectives: one file a family. Each owns its networks and the ordered phases that train them."""

from gen_dist.config import AutoencoderConfig, TrainConfig, VaeConfig
from gen_dist.objectives.autoencoder import Autoencoder
from gen_dist.objectives.base import Batch, Objective, Phase
from gen_dist.objectives.vae import Vae

__all__ = ["Batch", "Objective", "Phase", "build_objective"]


def build_objective(config: TrainConfig, image_shape: tuple[int, int, int]) -> Objective:
    """The objective of a config with freshly initialized networks, from torch's random state.

    Raises:
        ConfigError: the network does not fit images of this shape [C, H, W].
    """
    match config.objective:
        case AutoencoderConfig():
            return Autoencoder(config.objective, config.network, image_shape)
        case VaeConfig():
            return Vae(config.objective, config.network, image_shape)
