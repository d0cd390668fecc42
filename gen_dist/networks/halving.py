"""Sides of images that are halved until a few pixels are left, and resampling by a factor of two."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.errors import ConfigError


def halved_to_few_pixels(kind: str, image_shape: tuple[int, int, int]) -> tuple[int, tuple[int, int]]:
    """Number of halvings of an image until 4 to 7 pixels of the shorter side are left, and the sides after them.

    Args:
        kind: kind of the network, for the error.
        image_shape: (C, H, W) of the images.

    Raises:
        ConfigError: a halving would have a remainder; the line names sizes that have none.
    """
    _, height, width = image_shape
    halvings = _halvings(min(height, width))
    if min(height, width) < 8 or height % 2**halvings or width % 2**halvings:
        raise ConfigError(
            f"a {kind} network halves both sides of an image until 4 to 7 pixels of the shorter are left, which "
            f"{height} x {width} do not allow; use --image-size {' or '.join(_nearest_sizes(height, width))}"
        )
    return halvings, (height >> halvings, width >> halvings)


def _halvings(side: int) -> int:
    """Number of halvings of the shorter side down to 4 to 7 pixels, at least one."""
    return max(1, side.bit_length() - 3)


def _nearest_sizes(height: int, width: int) -> list[str]:
    """The nearest sizes that can be halved without a remainder, as `--image-size` takes them."""
    shorter = min(height, width)
    step = 2 ** _halvings(shorter)
    lower = [max(8, side // step * step) for side in (width, height)]
    step = 2 ** _halvings(-(-shorter // step) * step)  # rounded up to a power of two, it is halved once more
    upper = [max(8, -(-side // step) * step) for side in (width, height)]
    return list(dict.fromkeys(str(w) if w == h else f"{w}x{h}" for w, h in (lower, upper)))


class Binomial(nn.Module):
    """Binomial filter of feature maps, weights 1 3 3 1 along each side, with zero padding: to half the side, to twice
    the side, or by itself to `2 * padding - 3` pixels more.

    It is a depthwise convolution, since torch's interpolation sums gradients in arbitrary order on GPUs.
    """

    kernel: Tensor

    def __init__(self, resampling: Literal["halve", "double", "none"], padding: int = 1, gain: float = 1.0) -> None:
        """Build a filter; with `none`, its sum is `gain`."""
        super().__init__()
        self.convolve = F.conv_transpose2d if resampling == "double" else F.conv2d
        self.stride = 1 if resampling == "none" else 2
        self.padding = padding
        weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / (4.0 if resampling == "double" else 8.0)
        self.register_buffer("kernel", torch.outer(weights, weights)[None, None] * gain, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        channels = maps.shape[1]
        kernel = self.kernel.to(maps.dtype).expand(channels, -1, -1, -1)
        return self.convolve(maps, kernel, stride=self.stride, padding=self.padding, groups=channels)
