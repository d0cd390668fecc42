"""Encoders and decoders: single-device modules, independent of loss, rank and precision."""

from gen_dist.config import NetworkConfig
from gen_dist.networks.base import Decoder, Encoder
from gen_dist.plugins.registry import load

__all__ = ["Decoder", "Encoder", "build_decoder", "build_encoder"]


def build_encoder(config: NetworkConfig, image_shape: tuple[int, int, int], outputs: int) -> Encoder:
    """Build a network from images float32 [B, C, H, W] to [B, outputs].

    Raises:
        ConfigError: the network does not fit the images.
    """
    encoder: Encoder = load(config.encoder)(config, image_shape, outputs)
    return encoder


def build_decoder(config: NetworkConfig, image_shape: tuple[int, int, int], inputs: int | None = None) -> Decoder:
    """Build a network from latents float32 [B, inputs] to [B, C, H, W]. None means config.latent_dim inputs.

    Raises:
        ConfigError: the network does not fit the images.
    """
    decoder: Decoder = load(config.decoder)(config, image_shape, config.latent_dim if inputs is None else inputs)
    return decoder
