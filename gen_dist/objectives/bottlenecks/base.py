"""Base of the bottlenecks: what lies between the encoder's outputs and the decoder's latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from gen_dist.config import LatentAutoencoderConfig
from gen_dist.kernels import Key


class Coded(NamedTuple):
    """Latents of a batch and their terms in the loss."""

    latents: Tensor
    """Input of the decoder, [B, *latent_shape]."""
    penalty: Tensor
    """Weighted term of the loss, float32 [B]."""
    logs: Mapping[str, Tensor]
    """Terms without their weights, float32 [B] each."""


class Bottleneck(nn.Module):
    """Encoder outputs [B, outputs_per_latent * C, ...] to latents [B, C, ...].

    It is a part of the decoder, as in diffusers: what is decoded passes it first, and an encoder needs it only to name
    codes.
    """

    outputs_per_latent: int = 1
    stops_gradients: str = ""
    """Reason why a part of its penalty has no gradient on purpose; see Phase."""

    def __init__(self, config: LatentAutoencoderConfig, latent_shape: tuple[int, ...]) -> None:
        """Check that the config fits the latents.

        Raises:
            ConfigError: it does not.
        """
        super().__init__()
        self.config = config

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
