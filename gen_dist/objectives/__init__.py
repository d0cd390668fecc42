"""Objectives: one file a family. Each owns its networks and the ordered phases that train them."""

from gen_dist.config import (
    AutoencoderConfig,
    GanConfig,
    R3ganConfig,
    TrainConfig,
    VaeConfig,
    VaeGanConfig,
    WganGpConfig,
)
from gen_dist.objectives.autoencoder import Autoencoder
from gen_dist.objectives.base import Batch, Objective, Phase, TurnResult
from gen_dist.objectives.gan import Gan
from gen_dist.objectives.r3gan import R3gan
from gen_dist.objectives.vae import Vae
from gen_dist.objectives.vae_gan import VaeGan
from gen_dist.objectives.wgan_gp import WganGp

__all__ = ["Batch", "Objective", "Phase", "TurnResult", "build_objective"]


def build_objective(config: TrainConfig, image_shape: tuple[int, int, int], classes: int) -> Objective:
    """The objective of a config with freshly initialized networks, from torch's random state.

    Args:
        config: what to build.
        image_shape: (C, H, W).
        classes: number of classes of the images, 1 where they have no labels.

    Raises:
        ConfigError: the network does not fit the images, or the objective needs labels.
    """
    match config.objective:
        case AutoencoderConfig():
            return Autoencoder(config.objective, config.network, image_shape)
        case VaeConfig():
            return Vae(config.objective, config.network, image_shape)
        case GanConfig():
            return Gan(config.objective, config.network, image_shape, classes)
        case WganGpConfig():
            return WganGp(config.objective, config.network, image_shape, classes)
        case R3ganConfig():
            return R3gan(config.objective, config.network, image_shape, classes)
        case VaeGanConfig():
            return VaeGan(config.objective, config.network, image_shape, classes)
