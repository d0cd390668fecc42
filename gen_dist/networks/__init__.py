"""Encoders and decoders: single-device modules, independent of loss, rank and precision."""

from gen_dist.config import NetworkConfig
from gen_dist.errors import ConfigError
from gen_dist.networks.base import Decoder, Encoder
from gen_dist.networks.shapes import refuse_other_shape
from gen_dist.plugins.registry import load

__all__ = ["Decoder", "Encoder", "build_decoder", "build_encoder"]


def build_encoder(config: NetworkConfig, image_shape: tuple[int, int, int], outputs: int) -> Encoder:
    """Build a network from images float32 [B, C, H, W] to [B, outputs], or [B, outputs, h, w] if latents have places.

    Raises:
        ConfigError: the network does not fit the images, or has no encoder.
    """
    _refuse_without(config, "encoder", "discriminator", "decoder or generator")
    encoder: Encoder = load(config.encoder)(config, image_shape, outputs)
    refuse_other_shape(encoder, config.kind, image_shape, (outputs,), spatial=True)
    return encoder


def build_decoder(config: NetworkConfig, image_shape: tuple[int, int, int], inputs: int | None = None) -> Decoder:
    """Build a network from latents float32 [B, inputs] or [B, inputs, h, w] to [B, C, H, W].

    None means as many inputs as latents have entries or channels.

    Raises:
        ConfigError: the network does not fit the images, or has no decoder.
    """
    _refuse_without(config, "decoder", "generator", "encoder or discriminator")
    inputs = config.latent_shape(image_shape)[0] if inputs is None else inputs
    decoder: Decoder = load(config.decoder)(config, image_shape, inputs)
    refuse_other_shape(decoder, config.kind, (inputs, *config.latent_shape(image_shape)[1:]), image_shape)
    return decoder


def _refuse_without(config: NetworkConfig, name: str, other: str, instead: str) -> None:
    """Raise ConfigError if a network has no such class."""
    if not hasattr(config, name):
        raise ConfigError(
            f"network {config.kind} has no {name}, so it serves as {instead} alone; use --{name} with another one, "
            f"such as conv, or for a GAN --{other}"
        )
