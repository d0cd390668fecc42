"""Base of the bottlenecks: what lies between the encoder's outputs and the decoder's latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gen_dist.config import LatentAutoencoderConfig
from gen_dist.errors import UserError
from gen_dist.kernels import Key
from gen_dist.objectives.phase import Batch, SumOverBatch


class Coded(NamedTuple):
    """Latents of a batch and their terms in the loss."""

    latents: Tensor
    """Input of the decoder, [B, *latent_shape]."""
    penalty: Tensor
    """Weighted term of the loss, float32 [B]."""
    logs: Mapping[str, Tensor]
    """Terms without their weights, float32 [B] each."""
    carried: Mapping[str, Tensor] = {}  # nothing writes to the default of a named tuple
    """Detached tensors for `update`."""


class Bottleneck(nn.Module):
    """Encoder outputs [B, outputs_per_latent * C, ...] to latents [B, C, ...].

    It is a part of the decoder, as in diffusers: what is decoded passes it first, and an encoder needs it only to name
    codes.
    """

    outputs_per_latent: int = 1
    codebook_size: int = 0
    """Number of codes; 0 if latents are not codes."""
    stops_gradients: str = ""
    """Reason why a part of its penalty has no gradient on purpose; see Phase."""

    def __init__(self, config: LatentAutoencoderConfig, latent_shape: tuple[int, ...]) -> None:
        """Check that the config fits the latents.

        Raises:
            ConfigError: it does not.
        """
        super().__init__()
        self.config = config
        self.places = latent_shape[1:]

    def forward(self, encoded: Tensor, key: Key, deterministic: bool = False) -> Coded:
        """Latents and penalty of an encoder's outputs. With `deterministic`, nothing is drawn."""
        raise NotImplementedError

    @staticmethod
    def posterior(encoded: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents [B, C, ...] that stand for the images, and the log-variances of their posterior or None."""
        return encoded.float(), None

    def decodable(self, latents: Tensor) -> Tensor:
        """Input of the decoder for latents [B, C, ...] as of `posterior`; the shape stays."""
        return latents

    def codes(self, latents: Tensor) -> Tensor:
        """Codes int64 [B, ...] of latents [B, C, ...] as of `posterior`."""
        raise UserError(f"bottleneck {self.config.bottleneck} has no codes")

    def latents_of(self, codes: Tensor) -> Tensor:
        """Input of the decoder, [B, C, ...], for codes int64 [B, ...]."""
        raise UserError(f"bottleneck {self.config.bottleneck} has no codes")

    def update(
        self,
        micro_batches: Sequence[Batch],
        carried: Sequence[Mapping[str, Tensor]],
        sum_over_batch: SumOverBatch,
    ) -> None:
        """Update the codebook after a step, from `Coded.carried` of all its micro-batches. A collective call.

        `sum_over_batch` is that of the objective.
        """


class StraightThrough(torch.autograd.Function):
    """Quantized latents with the gradient of the latents before (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
