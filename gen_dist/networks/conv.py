"""Convolutional encoder and transposed-convolutional decoder for any image size."""

import math

from torch import Tensor, nn

from gen_dist.config import ConvConfig
from gen_dist.errors import ConfigError
from gen_dist.kernels import Linear
from gen_dist.networks.base import Decoder, Encoder, set_bias
from gen_dist.networks.mlp import ACTIVATIONS


def _sides(config: ConvConfig, image_shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Heights and widths from the image down to the last feature map; each convolution halves them, rounding down."""
    sides = [image_shape[1:]]
    for _ in config.feature_maps:
        height, width = sides[-1]
        sides.append((height // 2, width // 2))
    if min(sides[-1]) < 1:
        smallest = min(image_shape[1:])
        raise ConfigError(
            f"images of side {smallest} cannot be halved {len(config.feature_maps)} times; "
            f"name at most {int(math.log2(smallest))} feature_maps"
        )
    return sides


class ConvEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs]: convolutions of kernel 4 and stride 2, then two linear layers."""

    def __init__(self, config: ConvConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        activation = ACTIVATIONS[config.activation]
        layers: list[nn.Module] = []
        inputs = image_shape[0]
        for features in config.feature_maps:
            layers += [nn.Conv2d(inputs, features, kernel_size=4, stride=2, padding=1), activation()]
            inputs = features
        self.convolutions = nn.Sequential(*layers)
        features_left = inputs * math.prod(_sides(config, image_shape)[-1])
        self.feature_count = config.hidden_size
        self.hidden = nn.Sequential(Linear(features_left, config.hidden_size), activation())
        self.head = Linear(config.hidden_size, outputs)

    def features(self, images: Tensor) -> Tensor:
        return self.hidden(self.convolutions(images).flatten(1))


class ConvDecoder(Decoder):
    """Latents [B, inputs] -> [B, C, H, W]: the encoder's layers in reverse, transposed."""

    def __init__(self, config: ConvConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        activation = ACTIVATIONS[config.activation]
        sides = _sides(config, image_shape)
        self.smallest_shape = (config.feature_maps[-1], *sides[-1])
        self.head = nn.Sequential(
            Linear(inputs, config.hidden_size),
            activation(),
            Linear(config.hidden_size, math.prod(self.smallest_shape)),
            activation(),
        )
        layers: list[nn.Module] = []
        outputs = (*reversed(config.feature_maps[:-1]), image_shape[0])
        for i, (before, features) in enumerate(zip(reversed(config.feature_maps), outputs, strict=True)):
            (height, width), (next_height, next_width) = sides[-1 - i], sides[-2 - i]
            # The encoder rounds odd sides down; the padding restores the lost row and column.
            lost = (next_height - 2 * height, next_width - 2 * width)
            layers += [
                nn.ConvTranspose2d(before, features, kernel_size=4, stride=2, padding=1, output_padding=lost),
                activation(),
            ]
        self.convolutions = nn.Sequential(*layers[:-1])

    def start_at(self, image: Tensor) -> None:
        set_bias(self.convolutions[-1], image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor) -> Tensor:
        return self.convolutions(self.head(latents).unflatten(1, self.smallest_shape))
