"""What all encoders and decoders have in common, and the layers that several of them use."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from gen_dist.config import Norm
from gen_dist.kernels import pixel_by_pixel


class Encoder(nn.Module):
    """Images float32 [B, C, H, W] -> [B, outputs]: a trunk that finds features, and a linear head that reads them.

    With one output it is a discriminator or critic.
    """

    feature_count: int
    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """What the trunk finds in the images: [B, feature_count]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Decoder(nn.Module):
    """Latents float32 [B, inputs] -> [B, C, H, W]. It is also a generator."""

    def start_at(self, image: Tensor) -> None:
        """Have every latent decode to about this image, [C, H, W], or to its mean colour, before training."""
        raise NotImplementedError


def channels_last(maps: Tensor) -> Tensor:
    """The same feature maps in the layout that is fastest, as what is done with them then is.

    Pixel by pixel on CPUs, by up to a third in residual networks, and on GPUs in half precision, whose matrix units
    take such maps; channel by channel on GPUs in float32. Weights stay as they are, as optimizers know one layout only;
    and compiled code chooses for itself, from the layout that everything has by default: of maps that a view gave
    another one, it would foretell strides that cuDNN's gradients do not have.
    """
    kind = maps.device.type
    if torch.compiler.is_compiling():
        return maps.contiguous() if kind == "cuda" else maps
    if kind == "cuda":
        return pixel_by_pixel(maps) if torch.is_autocast_enabled("cuda") else maps.contiguous()
    return pixel_by_pixel(maps) if kind == "cpu" else maps


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Normalization of feature maps [B, channels, H, W]."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            # Up to 32 groups (Wu & He 2018), and few channels in none: alone, a channel's own mean would be lost.
            most = max(1, min(32, channels // 4))
            return nn.GroupNorm(max(groups for groups in range(1, most + 1) if channels % groups == 0), channels)
        case "none":
            return nn.Identity()


def spectrally_normalize(module: nn.Module) -> None:
    """Divide every weight of linear and convolutional layers by its largest singular value (Miyato et al. 2018).

    Each forward in training mode takes one step of power iteration, unless `iterate_spectral_norms` does; its two
    vectors are buffers, saved with the rest.
    """
    for layer in [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]:
        spectral_norm(layer)


def spectrally_normalized(module: nn.Module) -> list[nn.Module]:
    """The layers of a module whose weights have a spectral norm."""
    return [
        layer
        for layer in module.modules()
        if is_parametrized(layer, "weight") and isinstance(_norm_of(layer), _SpectralNorm)
    ]


def iterate_spectral_norms(layers: Iterable[nn.Module]) -> None:
    """Take one step of power iteration for each of these layers; forwards then take none until the next `train()`.

    So a turn of several forwards or micro-batches has the same weights in all of them.
    """
    for layer in layers:
        norm = _norm_of(layer)
        norm.training = True
        with torch.no_grad():
            layer.weight  # noqa: B018  # reading it takes the step
        norm.training = False


def _norm_of(layer: nn.Module) -> nn.Module:
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    weight = layer.parametrizations["weight"]
    assert isinstance(weight, nn.ModuleList)
    return weight[0]


def draw_weight(layer: nn.Module, gain: float) -> None:
    """Initial values that keep the size of activations: N(0, gain^2 / inputs of one output), and biases 0."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def set_bias(layer: nn.Module, values: Tensor) -> None:
    """Give the bias of a layer these values."""
    assert isinstance(layer.bias, Tensor)
    with torch.no_grad():
        layer.bias.copy_(values)
