"""Encoder and decoder of latent diffusion models (Rombach et al. 2022, appendix G): latents [C, h, w].

Modules have the names that they have in diffusers, so that weights need no table to be exchanged with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gen_dist.config import AutoencoderKlConfig
from gen_dist.config.networks import smallest_sides
from gen_dist.kernels import computed_again
from gen_dist.networks.base import Decoder, Encoder, channels_last, group_norm_silu, set_bias

_EPSILON = 1e-6
FEW_PIXELS = 256
"""Pixels of maps up to which residual blocks with group normalization are faster contiguous, on CPUs in float32.

Contiguous maps have ATen's normalization, one compiled pass, and pay for it with slower convolutions. Together they
take 3 to 15 % less time for maps of 16 x 16 and 8 x 8. For those of 32 x 32 they take as long on two threads, and up to
12 % longer on one: see bench/README.md.
"""


def layout_of_blocks(maps: Tensor, doublings: int = 0) -> Tensor:
    """Copy maps into the layout that is fastest for residual blocks with group normalization: see `FEW_PIXELS`.

    Args:
        maps: [B, C, H, W].
        doublings: times that the side of the maps doubles before those blocks.
    """
    few = maps.shape[2] * maps.shape[3] * 4**doublings <= FEW_PIXELS
    eager_on_cpu = maps.device.type == "cpu" and not torch.compiler.is_compiling()
    if few and eager_on_cpu and maps.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return maps.contiguous()
    return channels_last(maps)


class AutoencoderKlEncoder(Encoder):
    """Images [B, C, H, W] -> [B, outputs, h, w].

    A residual network to maps of the smallest side, a 3 x 3 convolution to the outputs, and one of 1 x 1 among them.
    """

    twice_differentiable = False  # neither torch's attention nor checkpoints

    def __init__(self, config: AutoencoderKlConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        smallest_sides(config.feature_maps, image_shape)
        widths = config.feature_maps
        self.feature_count = widths[-1]
        self.checkpointing = config.checkpointing
        self.conv_in = nn.Conv2d(image_shape[0], widths[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(config, level, widths[max(level - 1, 0)], config.blocks, last=level + 1 == len(widths))
            for level in range(len(widths))
        )
        self.mid_block = _Middle(config)
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], outputs, kernel_size=3, padding=1)
        self.quant_conv = nn.Conv2d(outputs, outputs, kernel_size=1)

    def features(self, images: Tensor) -> Tensor:
        """Maps before the last convolutions, [B, feature_count, h, w]."""
        maps = self.conv_in(layout_of_blocks(images))
        for part in (*self.down_blocks, self.mid_block):
            maps = part(maps, self.checkpointing)
        return group_norm_silu(maps, self.conv_norm_out)

    def head(self, features: Tensor) -> Tensor:
        """Outputs [B, outputs, h, w] of the maps."""
        return self.quant_conv(_convolve_normalized(self.conv_out, features))


class AutoencoderKlDecoder(Decoder):
    """Latents [B, inputs, h, w] -> [B, C, H, W]: the encoder mirrored, with one more block at each resolution."""

    def __init__(self, config: AutoencoderKlConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        smallest_sides(config.feature_maps, image_shape)
        widths = config.feature_maps
        self.checkpointing = config.checkpointing
        self.post_quant_conv = nn.Conv2d(inputs, inputs, kernel_size=1)
        self.conv_in = nn.Conv2d(inputs, widths[-1], kernel_size=3, padding=1)
        self.mid_block = _Middle(config)
        self.up_blocks = nn.ModuleList(
            _Level(config, level, widths[min(level + 1, len(widths) - 1)], config.blocks + 1, last=level == 0, up=True)
            for level in reversed(range(len(widths)))
        )
        self.conv_norm_out = _norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], image_shape[0], kernel_size=3, padding=1)

    def start_at(self, image: Tensor) -> None:
        set_bias(self.conv_out, image.mean(dim=(1, 2)))

    @property
    def last_convolution(self) -> nn.Conv2d:
        return self.conv_out

    def features(self, latents: Tensor) -> Tensor:
        """Maps before the last convolution `conv_out`, [B, feature_maps[0], H, W]."""
        maps = self.conv_in(self.post_quant_conv(layout_of_blocks(latents)))
        for part in (self.mid_block, *self.up_blocks):
            maps = part(maps, self.checkpointing)
        return group_norm_silu(maps, self.conv_norm_out)

    def forward(self, latents: Tensor) -> Tensor:
        return _convolve_normalized(self.conv_out, self.features(latents))


def _convolve_normalized(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    """Convolution of outputs of `group_norm_silu` that on CPUs does not keep them for its gradient.

    Backward computes them again from the maps. Blocks do so where maps are small and contiguous: for `kl-f4-cifar10` it
    saves a fifth of what a step keeps, and costs 1.7 % of its time. With larger maps it would save more, and cost 4 %.
    """
    if torch.compiler.is_compiling():
        return convolution(features)
    with computed_again(features):
        return convolution(features)


def _norm(config: AutoencoderKlConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, channels, eps=_EPSILON)


_BLOCKS_OF_A_CHECKPOINT = 3
"""Residual blocks that backward computes again together, but for one at a time in the decoder's last level.

Memory peaks in that level's backward, which keeps the inputs of all checkpoints before it beside the maps of its own
block. More blocks at once keep fewer inputs, and elsewhere their maps need no more than that peak.
"""


def _in_turn(blocks: Sequence[Sequence[nn.Module]], maps: Tensor, checkpointing: bool, at_once: int) -> Tensor:
    """Apply blocks, each a few modules, to maps. With `checkpointing`, training keeps the input of every `at_once`."""
    keeps_inputs_alone = checkpointing and torch.is_grad_enabled() and blocks[0][0].training
    for first in range(0, len(blocks), at_once):
        modules = [module for block in blocks[first : first + at_once] for module in block]
        # No block draws random numbers, whose state would be saved otherwise.
        again = keeps_inputs_alone and maps.requires_grad
        maps = (
            checkpoint(_apply, modules, maps, use_reentrant=False, preserve_rng_state=False)
            if again
            else _apply(modules, maps)
        )
    return maps


def _apply(modules: Sequence[nn.Module], maps: Tensor) -> Tensor:
    for module in modules:
        maps = module(maps)
    return maps


class _Level(nn.Module):
    """Blocks at one resolution, each with attention after it if so configured; then to the next, unless it is the last.

    Maps [B, inputs, H, W] -> [B, feature_maps[level], H', W']: half the side, or twice with `up`.
    """

    def __init__(
        self, config: AutoencoderKlConfig, level: int, inputs: int, count: int, *, last: bool, up: bool = False
    ) -> None:
        super().__init__()
        width = config.feature_maps[level]
        self._at_once = 1 if up and last else _BLOCKS_OF_A_CHECKPOINT
        self.resnets = nn.ModuleList(
            _ResidualBlock(config, width if block else inputs, width) for block in range(count)
        )
        attends = 2**level in config.attention_factors
        self.attentions = nn.ModuleList(_Attention(config, width) for _ in range(count if attends else 0))
        resampling = [] if last else [_Double(width) if up else _Halve(width)]
        self.upsamplers = nn.ModuleList(resampling if up else [])
        self.downsamplers = nn.ModuleList([] if up else resampling)

    def forward(self, maps: Tensor, checkpointing: bool) -> Tensor:
        blocks: list[list[nn.Module]] = [
            [block, *self.attentions[place : place + 1]] for place, block in enumerate(self.resnets)
        ]
        blocks[-1] += [*self.downsamplers, *self.upsamplers]
        return _in_turn(blocks, maps, checkpointing, self._at_once)


class _Middle(nn.Module):
    """Two blocks at the smallest resolution, with attention between them unless the config leaves it out."""

    def __init__(self, config: AutoencoderKlConfig) -> None:
        super().__init__()
        width = config.feature_maps[-1]
        self.resnets = nn.ModuleList(_ResidualBlock(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(config, width)] if config.middle_attention else [])

    def forward(self, maps: Tensor, checkpointing: bool) -> Tensor:
        blocks = [[self.resnets[0], *self.attentions], [self.resnets[1]]]
        return _in_turn(blocks, maps, checkpointing, _BLOCKS_OF_A_CHECKPOINT)


class _ResidualBlock(nn.Module):
    """Maps [B, inputs, H, W] -> [B, outputs, H, W]: GroupNorm, SiLU and 3 x 3 convolution, twice, plus a shortcut."""

    def __init__(self, config: AutoencoderKlConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self._checkpointed = config.checkpointing
        self.norm1 = _norm(config, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        self.norm2 = _norm(config, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        # First, so that its gradient is the last that backward computes, and does not wait beside those of the rest.
        shortcut = self.conv_shortcut(maps)
        residual = self._convolve(self.conv1, group_norm_silu(maps, self.norm1))
        residual = self._convolve(self.conv2, group_norm_silu(residual, self.norm2))
        return residual.add_(shortcut)  # in place: no gradient needs the convolution's outputs

    def _convolve(self, convolution: nn.Conv2d, features: Tensor) -> Tensor:
        """Convolution of outputs of `group_norm_silu`, which small maps are too cheap to keep.

        On CPUs maps that are contiguous are small; elsewhere `computed_again` lets all be kept.
        """
        if self._checkpointed or not features.is_contiguous():
            return convolution(features)
        return _convolve_normalized(convolution, features)


class _Attention(nn.Module):
    """Maps [B, C, H, W] -> the same shape: attention of one head over all places, added to its input.

    Scores, softmax and mean are float32 under autocast too.
    """

    def __init__(self, config: AutoencoderKlConfig, width: int) -> None:
        super().__init__()
        self.group_norm = _norm(config, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, maps: Tensor) -> Tensor:
        places = self.group_norm(maps).flatten(2).transpose(1, 2).contiguous()  # else each layer keeps a copy
        dtype = torch.promote_types(maps.dtype, torch.float32)
        query, key, value = (layer(places).to(dtype)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        with torch.autocast(maps.device.type, enabled=False):
            mixed = _attend(query, key, value)[:, 0].to(places.dtype)
        return maps + self.to_out(mixed).transpose(1, 2).unflatten(2, maps.shape[2:])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(C)) value, for each [B, 1, N, C] (Vaswani et al. 2017, eq. 1)."""
    if query.is_cuda and query.requires_grad:
        # The gradients of the other backend for float32 are sums in an arbitrary order.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


class _Halve(nn.Module):
    """Maps [B, C, H, W] -> [B, C, H/2, W/2]: a convolution of stride 2 with zeros to the right and below alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        return layout_of_blocks(self.conv(F.pad(maps, (0, 1, 0, 1))))


class _Double(nn.Module):
    """Maps [B, C, H, W] -> [B, C, 2 H, 2 W]: each place four times, then a 3 x 3 convolution.

    Both are one transposed convolution, with 4/9 of the products and without the repeated places in memory. On CPUs it
    saves 7 % of a step.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        maps = layout_of_blocks(maps, doublings=1)
        doubled = F.conv_transpose2d(maps, transposed_kernel(self.conv.weight), stride=2, padding=1)
        assert self.conv.bias is not None
        # Not within the convolution, whose gradient for a bias takes oneDNN as long as that for the weight. In place:
        # no gradient needs the maps without it, and under autocast they keep their dtype.
        return doubled.add_(self.conv.bias[:, None, None])


def transposed_kernel(weight: Tensor) -> Tensor:
    """Kernel [C, D, 4, 4] of the transposed convolution for a 3 x 3 convolution [D, C, 3, 3] of repeated places.

    Two of the repeated places that a convolution sees are one place, so along each side it is w2, w1 + w2, w0 + w1, w0.
    """
    kernel = weight.flip(2, 3).transpose(0, 1)
    kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
    return F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
