"""Bases of all encoders and decoders, and the layers that several of them share."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gen_dist import kernels
from gen_dist.config import Norm
from gen_dist.kernels import pixel_by_pixel


class Encoder(nn.Module):
    """Images float32 [B, C, H, W] -> [B, outputs] or [B, outputs, h, w]: a trunk to features, and a head on them.

    With one output it serves as a discriminator or critic, of whole images or of patches.
    """

    feature_count: int
    head: Callable[[Tensor], Tensor]
    """Features to outputs: a linear layer, or for maps a convolution."""
    twice_differentiable: bool = True
    """False if slopes of outputs have no gradients, which a gradient penalty needs."""

    def features(self, images: Tensor) -> Tensor:
        """Features of the trunk, [B, feature_count] or [B, feature_count, h, w]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @property
    def layers_from_image(self) -> list[nn.Module]:
        """Layers or blocks that train, in their order from the image, without the head."""
        children = [child for name, child in self.named_children() if name != "head"]
        rows = nn.Sequential | nn.ModuleList
        parts = [part for child in children for part in (child if isinstance(child, rows) else (child,))]
        return [part for part in parts if any(weight.requires_grad for weight in part.parameters())]


class Decoder(nn.Module):
    """Latents float32 [B, inputs] -> [B, C, H, W]. It also serves as a generator."""

    noise_count: int = 0
    """Numbers of noise for each image that training draws anew: `forward` takes them as float32 [B, noise_count] after
    the latents, and otherwise decodes with fixed noise."""

    @property
    def last_convolution(self) -> nn.Conv2d | None:
        """The convolution that makes the images from `features`; None of decoders that end otherwise."""
        return None

    def features(self, latents: Tensor) -> Tensor:
        """Maps before the last convolution, [B, F, H, W]. Only decoders with a `last_convolution` have them."""
        raise NotImplementedError

    def start_at(self, image: Tensor) -> None:
        """Set initial values so that every latent decodes to about this image, [C, H, W], or to its mean colour."""
        raise NotImplementedError


def channels_last(maps: Tensor) -> Tensor:
    """Copy feature maps into the memory layout that is fastest for the layers after them.

    On CPUs that is channels_last, which saves up to a third of the time of residual networks, and so it is on GPUs in
    half precision, for the matrix units; on GPUs in float32 it is contiguous. Weights keep their layout, since
    optimizers support only one. Compiled code starts from contiguous maps and chooses layouts itself: from maps in
    another layout, it would predict strides that cuDNN's gradients do not have.
    """
    kind = maps.device.type
    if torch.compiler.is_compiling():
        return maps.contiguous() if kind == "cuda" else maps
    if kind == "cuda":
        return pixel_by_pixel(maps) if torch.is_autocast_enabled("cuda") else maps.contiguous()
    return pixel_by_pixel(maps) if kind == "cpu" else maps


class GroupNorm(nn.GroupNorm):
    """Group normalization by the fused kernels on GPUs. On CPUs it is torch's, whose bits runs there have."""

    def forward(self, maps: Tensor) -> Tensor:
        if maps.device.type == "cpu":
            return super().forward(maps)
        return kernels.group_norm_silu(maps, self.weight, self.bias, self.num_groups, self.eps, activation="none")


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Normalization of feature maps [B, channels, H, W]."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            # Up to 32 groups (Wu & He 2018) of at least 4 channels: a group of one channel would lose its mean.
            most = max(1, min(32, channels // 4))
            return GroupNorm(max(groups for groups in range(1, most + 1) if channels % groups == 0), channels)
        case "none":
            return nn.Identity()


def group_norm_silu(maps: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(maps)) of feature maps [B, C, H, W], the same shape (Wu & He 2018; Elfwing et al. 2018)."""
    return kernels.group_norm_silu(maps, norm.weight, norm.bias, norm.num_groups, norm.eps)


def draw_weight(layer: nn.Module, gain: float) -> None:
    """Draw initial weights from N(0, gain^2 / fan-in), which keeps the size of activations, and set biases to 0."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def set_bias(layer: nn.Module, values: Tensor) -> None:
    """Set the bias of a layer to these values."""
    assert isinstance(layer.bias, Tensor)
    with torch.no_grad():
        layer.bias.copy_(values)
