"""Fully connected encoder and decoder, as in the first VAEs (Kingma & Welling 2014, appendix C)."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gen_dist.config import Activation, MlpConfig
from gen_dist.kernels import Linear
from gen_dist.networks.base import Decoder, Encoder, set_bias

# ReLUs work in place, which saves memory: their input is the output of the previous layer, which nothing else reads and
# no gradient needs.
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": functools.partial(nn.ReLU, inplace=True),
    "tanh": nn.Tanh,
    "leaky_relu": functools.partial(nn.LeakyReLU, 0.2, inplace=True),
    "silu": nn.SiLU,
}


def mlp(sizes: Sequence[int], activation: Activation) -> nn.Sequential:
    """Linear layers between consecutive sizes, the activation after each."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class MlpEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs]."""

    def __init__(self, config: MlpConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.feature_count = config.hidden_sizes[-1]
        self.layers = mlp((math.prod(image_shape), *config.hidden_sizes), config.activation)
        self.head = Linear(self.feature_count, outputs)

    def features(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))


class MlpDecoder(Decoder):
    """Latents [B, inputs] -> [B, C, H, W]."""

    def __init__(self, config: MlpConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        self.image_shape = image_shape
        hidden = tuple(reversed(config.hidden_sizes))
        self.layers = mlp((inputs, *hidden), config.activation)
        self.layers.append(Linear(hidden[-1], math.prod(image_shape)))

    def start_at(self, image: Tensor) -> None:
        set_bias(self.layers[-1], image.flatten())

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).unflatten(1, self.image_shape)
