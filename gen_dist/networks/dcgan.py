"""Networks of strided and transposed convolutions (Radford et al. 2016).

At 64 x 64 pixels, 64 feature maps and batch normalization they equal those of PyTorch's DCGAN example: no layer has a
bias, and the first and the last are not normalized.
"""

import math

import torch
from torch import Tensor, nn

from gen_dist.config import DcganConfig, Norm
from gen_dist.kernels import DoublingConvolution, HalvingConvolution, Linear
from gen_dist.networks.base import Decoder, Encoder, channels_last, norm_layer, set_bias
from gen_dist.networks.halving import halved_to_few_pixels
from gen_dist.networks.spectral_norm import spectrally_normalize


def _levels(config: DcganConfig, image_shape: tuple[int, int, int]) -> tuple[list[int], tuple[int, int]]:
    """Channels after each halving of the images, and the height and width after the last."""
    halvings, smallest = halved_to_few_pixels("dcgan", image_shape)
    return [config.feature_maps * 2**i for i in range(halvings)], smallest


def _draw_weights(network: nn.Module) -> None:
    """Draw initial weights as in Radford et al. 2016, section 4."""
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, mean=1.0, std=0.02)


def _hidden_layer(inputs: int, width: int, norm: Norm, activation: nn.Module, centred: bool = False) -> nn.Sequential:
    """Fully connected layer [B, inputs] -> [B, width], normalized as maps of one pixel are.

    Args:
        inputs: numbers that enter.
        width: numbers that leave.
        norm: kind of normalization.
        activation: nonlinearity.
        centred: True normalizes after the nonlinearity instead of before it.
    """
    order = [activation, norm_layer(norm, width)] if centred else [norm_layer(norm, width), activation]
    return nn.Sequential(
        nn.Linear(inputs, width, bias=norm == "none"), nn.Unflatten(1, (width, 1, 1)), *order, nn.Flatten()
    )


class DcganEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs]: convolutions of kernel 4 and stride 2, then one over the whole last map."""

    def __init__(self, config: DcganConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        channels, last_sides = _levels(config, image_shape)
        norm = config.discriminator_norm
        layers: list[nn.Module] = []
        inputs = image_shape[0]
        for level, count in enumerate(channels):
            layers.append(HalvingConvolution(inputs, count, bias=norm == "none"))
            if level:
                layers.append(norm_layer(norm, count))
            layers.append(nn.LeakyReLU(0.2, inplace=True))  # nothing else reads its input
            inputs = count
        self.convolutions = nn.Sequential(*layers)
        self.feature_count = inputs * math.prod(last_sides)
        self.hidden: nn.Module = nn.Identity()
        if config.hidden_size:
            self.hidden = _hidden_layer(self.feature_count, config.hidden_size, norm, nn.LeakyReLU(0.2, inplace=True))
            self.feature_count = config.hidden_size
        self.head = nn.Linear(self.feature_count, outputs, bias=norm == "none")
        _draw_weights(self)
        if config.spectral_norm:
            spectrally_normalize(self)

    def features(self, images: Tensor) -> Tensor:
        # In the maps' memory order, so that neither they nor their gradient are copied.
        return self.hidden(self.convolutions(channels_last(images)).permute(0, 2, 3, 1).flatten(1))


class DcganDecoder(Decoder):
    """Latents [B, inputs] -> [B, C, H, W]: the encoder's layers in reverse, transposed, all but the last normalized."""

    def __init__(self, config: DcganConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        channels, last_sides = _levels(config, image_shape)
        norm = config.generator_norm
        bias = norm == "none"
        self.smallest_shape = (*last_sides, channels[-1])
        self.hidden: nn.Module = nn.Identity()
        if config.hidden_size:
            centred = config.centred_hidden
            self.hidden = _hidden_layer(inputs, config.hidden_size, norm, nn.ReLU(inplace=True), centred)
            inputs = config.hidden_size
        # The transposed convolution of a map of one pixel is a linear layer.
        self.projection = Linear(inputs, math.prod(self.smallest_shape), bias=bias)
        layers: list[nn.Module] = []
        for before, after in zip(reversed(channels), (*reversed(channels[:-1]), image_shape[0]), strict=True):
            layers += [
                norm_layer(norm, before),
                nn.ReLU(inplace=True),
                DoublingConvolution(before, after, bias=bias),
            ]
        self.convolutions = nn.Sequential(*layers)
        _draw_weights(self)
        if not bias:
            # A buffer for `start_at`: these networks train no bias here.
            output = self.convolutions[-1]
            del output.bias
            output.register_buffer("bias", torch.zeros(image_shape[0]))

    def start_at(self, image: Tensor) -> None:
        set_bias(self.convolutions[-1], image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor) -> Tensor:
        smallest = self.projection(self.hidden(latents)).unflatten(1, self.smallest_shape)
        return self.convolutions(channels_last(smallest.permute(0, 3, 1, 2)))
