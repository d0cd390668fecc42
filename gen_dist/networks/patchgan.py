"""Discriminator of overlapping patches (Isola et al. 2017, section 3.2.2 and appendix 6.1.2)."""

from __future__ import annotations

from torch import Tensor, nn

from gen_dist.config import PatchganConfig
from gen_dist.kernels import HalvingConvolution
from gen_dist.networks.base import Encoder, channels_last, norm_layer


class PatchganEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs, h, w]: convolutions of kernel 4, the last two of stride 1."""

    def __init__(self, config: PatchganConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        config.latent_shape(image_shape)
        norm = config.discriminator_norm
        layers: list[nn.Module] = []
        inputs = image_shape[0]
        for level in range(config.layers + 1):
            count = config.feature_maps * min(2**level, 8)
            bias = not level or norm == "none"
            if level < config.layers:
                layers.append(HalvingConvolution(inputs, count, bias=bias))
            else:
                layers.append(nn.Conv2d(inputs, count, kernel_size=4, padding=1, bias=bias))
            if level:
                layers.append(norm_layer(norm, count))
            layers.append(nn.LeakyReLU(0.2, inplace=True))  # nothing else reads its input
            inputs = count
        self.convolutions = nn.Sequential(*layers)
        self.feature_count = inputs
        self.head = nn.Conv2d(inputs, outputs, kernel_size=4, padding=1)
        self.apply(_draw_weight)

    def features(self, images: Tensor) -> Tensor:
        """Maps before the last convolution, [B, feature_count, h + 1, w + 1]."""
        return self.convolutions(channels_last(images))


def _draw_weight(layer: nn.Module) -> None:
    """Draw initial weights as in the code of Isola et al. 2017; biases of convolutions stay torch's."""
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, std=0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, mean=1.0, std=0.02)
