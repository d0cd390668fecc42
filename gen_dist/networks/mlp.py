"""Fully connected encoder and decoder, as in the first VAEs (Kingma & Welling 2014, appendix C)."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gen_dist.config import Activation, MlpConfig
from kernels import Linear

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
}


def mlp(sizes: Sequence[int], activation: Activation) -> nn.Sequential:
    """Linear layers between consecutive sizes, with the activation between them and none after the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, Linear(sizes[-2], sizes[-1]))


class MlpEncoder(nn.Module):
    """Images [B, C, H, W] -> [B, outputs]."""

    def __init__(self, config: MlpConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.layers = mlp((math.prod(image_shape), *config.hidden_sizes, outputs), config.activation)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))


class MlpDecoder(nn.Module):
    """Latents [B, latent_dim] -> [B, C, H, W]."""

    def __init__(self, config: MlpConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.layers = mlp(
            (config.latent_dim, *reversed(config.hidden_sizes), math.prod(image_shape)), config.activation
        )

    def start_at(self, image: Tensor) -> None:
        """Have every latent decode to about this image, [C, H, W], before training."""
        output = self.layers[-1]
        assert isinstance(output, Linear)
        with torch.no_grad():
            output.bias.copy_(image.flatten())

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).unflatten(1, self.image_shape)
