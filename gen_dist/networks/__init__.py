"""Encoders and decoders: single-device modules that know no loss, no rank and no precision."""

from torch import nn

from gen_dist.config import ConvConfig, MlpConfig, NetworkConfig
from gen_dist.networks.conv import ConvDecoder, ConvEncoder
from gen_dist.networks.mlp import MlpDecoder, MlpEncoder

__all__ = ["Decoder", "build_decoder", "build_encoder"]

Decoder = MlpDecoder | ConvDecoder
"""Networks from latents to images; each has `start_at`, to set what it says of every latent before training."""


def build_encoder(config: NetworkConfig, image_shape: tuple[int, int, int], outputs: int) -> nn.Module:
    """A network from images float32 [B, C, H, W] to [B, outputs].

    Raises:
        ConfigError: the network does not fit the images.
    """
    match config:
        case MlpConfig():
            return MlpEncoder(config, image_shape, outputs)
        case ConvConfig():
            return ConvEncoder(config, image_shape, outputs)


def build_decoder(config: NetworkConfig, image_shape: tuple[int, int, int]) -> Decoder:
    """A network from latents float32 [B, config.latent_dim] to [B, C, H, W].

    Raises:
        ConfigError: the network does not fit the images.
    """
    match config:
        case MlpConfig():
            return MlpDecoder(config, image_shape)
        case ConvConfig():
            return ConvDecoder(config, image_shape)
