"""Encoders and decoders: single-device modules that know no loss, no rank and no precision."""

from gen_dist.config import ConvConfig, DcganConfig, MlpConfig, NetworkConfig, ResnetConfig
from gen_dist.networks.base import Decoder, Encoder, iterate_spectral_norms, spectrally_normalized
from gen_dist.networks.conv import ConvDecoder, ConvEncoder
from gen_dist.networks.dcgan import DcganDecoder, DcganEncoder
from gen_dist.networks.mlp import MlpDecoder, MlpEncoder
from gen_dist.networks.resnet import ResnetDecoder, ResnetEncoder

__all__ = ["Decoder", "Encoder", "build_decoder", "build_encoder", "iterate_spectral_norms", "spectrally_normalized"]


def build_encoder(config: NetworkConfig, image_shape: tuple[int, int, int], outputs: int) -> Encoder:
    """A network from images float32 [B, C, H, W] to [B, outputs].

    Raises:
        ConfigError: the network does not fit the images.
    """
    match config:
        case MlpConfig():
            return MlpEncoder(config, image_shape, outputs)
        case ConvConfig():
            return ConvEncoder(config, image_shape, outputs)
        case DcganConfig():
            return DcganEncoder(config, image_shape, outputs)
        case ResnetConfig():
            return ResnetEncoder(config, image_shape, outputs)


def build_decoder(config: NetworkConfig, image_shape: tuple[int, int, int], inputs: int | None = None) -> Decoder:
    """A network from latents float32 [B, inputs] to [B, C, H, W]; None makes config.latent_dim of them.

    Raises:
        ConfigError: the network does not fit the images.
    """
    inputs = config.latent_dim if inputs is None else inputs
    match config:
        case MlpConfig():
            return MlpDecoder(config, image_shape, inputs)
        case ConvConfig():
            return ConvDecoder(config, image_shape, inputs)
        case DcganConfig():
            return DcganDecoder(config, image_shape, inputs)
        case ResnetConfig():
            return ResnetDecoder(config, image_shape, inputs)
