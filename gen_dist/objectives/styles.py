"""Training of generators with styles: mixed styles, and regularization of path lengths (Karras et al. 2019, 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gen_dist.data.augmenting import integers
from gen_dist.errors import ConfigError
from gen_dist.kernels import normal
from gen_dist.networks.players import Generator
from gen_dist.networks.stylegan2 import Stylegan2Decoder
from gen_dist.objectives.augmentation import uniform
from gen_dist.objectives.phase import Batch, SumOverBatch
from gen_dist.randomness import Stream

LENGTHS = "path_lengths"
"""Name of the carried path lengths: their sum and their number, float32 [2]."""
DECAY = 0.01
"""Weight of a batch's mean length in the moving average, as in the authors' code."""


def decoder_with_styles(generator: nn.Module, option: str) -> Stylegan2Decoder:
    """Decoder of a generator.

    Raises:
        ConfigError: it has no styles, which an option needs.
    """
    decoder = generator.decoder if isinstance(generator, Generator) else None
    if not isinstance(decoder, Stylegan2Decoder):
        raise ConfigError(f"{option} needs a generator with styles; use --network stylegan2, or leave it out")
    return decoder


def mixed_styles(decoder: Stylegan2Decoder, latents: Tensor, others: Tensor, share: float, batch: Batch) -> Tensor:
    """Styles of latents up to a place drawn for each image, and of other latents from there on: [B, places, style_dim].

    A `share` of the images has two styles; the place is uniform among those after the first.
    """
    mixes, drawn = uniform(batch.key(Stream.MIXED_PLACES), len(latents), 2).unbind(1)
    first = torch.where(mixes < share, 1 + integers(drawn, decoder.places - 1), decoder.places)
    is_second = torch.arange(decoder.places, device=latents.device) >= first[:, None]
    return torch.where(is_second[:, :, None], decoder.styles(others), decoder.styles(latents))


class PathLengths(nn.Module):
    """Lengths of the steps in images for steps of the styles, and their moving average, which is saved.

    With images g(w), a random normal image y and its n pixels, the length is |J^T y| / sqrt(n) for the Jacobian J of
    g: its square is a mean over the places of the synthesis. The penalty is the mean of (length - average)^2, with the
    average of the steps before.
    """

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def forward(self, images_of: Callable[[Tensor], Tensor], styles: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images of styles [B, places, style_dim], and their lengths [B], differentiable."""

        def along(inputs: Tensor) -> tuple[Tensor, Tensor]:
            images = images_of(inputs)
            directions = normal(batch.key(Stream.PATH_DIRECTIONS), len(images), images[0].numel()).view_as(images)
            return (images * directions).sum() / math.sqrt(math.prod(images.shape[2:])), images

        with torch.autocast(styles.device.type, enabled=False):
            slopes, images = torch.func.grad(along, has_aux=True)(styles.float())
        return images, slopes.square().sum(dim=2).mean(dim=1).sqrt()

    def penalty(self, lengths: Tensor) -> Tensor:
        """Mean squared difference of lengths [B] from the average."""
        return (lengths - self.average).square().mean()

    def follow(self, carried: Sequence[Mapping[str, Tensor]], sum_over_batch: SumOverBatch) -> None:
        """Move the average towards the mean length of a batch."""
        total, count = sum_over_batch(lambda some: torch.stack([one[LENGTHS] for one in some]).sum(dim=0), carried)
        self.average.lerp_(total / count, DECAY)
