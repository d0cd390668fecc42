"""Configs of networks for hundreds of images: FastGAN's generator, and a discriminator on pretrained features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Suppress

from gen_dist.config.checked import at_least
from gen_dist.config.networks import USUAL_SIDES, NetworkConfig, Norm, RoleName, networks
from gen_dist.errors import ConfigError


@networks.register
@dataclass(frozen=True)
class FastganConfig(NetworkConfig):
    """Generator of FastGAN, in which small maps scale the channels of large ones (Liu et al. 2021)."""

    decoder: ClassVar[str] = "gen_dist.networks.fastgan:FastganDecoder"
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = USUAL_SIDES
    kind: Suppress[Literal["fastgan"]] = "fastgan"
    feature_maps: int = 64
    """Channels at a side of 128; smaller maps have up to sixteen times as many, as in the authors' code."""
    latent_dim: int = 256
    """Number of latents."""
    generator_norm: Norm = "batch"
    """Normalization after each convolution but the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("feature_maps", self.feature_maps, 1)


@networks.register
@dataclass(frozen=True)
class ProjectedConfig(NetworkConfig):
    """Discriminator of maps of the frozen EfficientNet-Lite0, mixed by random convolutions (Sauer et al. 2021)."""

    encoder: ClassVar[str] = "gen_dist.networks.projected:ProjectedEncoder"
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = USUAL_SIDES
    kind: Suppress[Literal["projected"]] = "projected"
    feature_maps: int = 64
    """Channels of the projected maps of a quarter of the side; each smaller one has twice as many."""
    discriminator_norm: Norm = "group"
    """Normalization after each convolution but the last. The authors' is batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("feature_maps", self.feature_maps, 1)

    @property
    def decoder(self) -> str:  # type: ignore[override]
        """Refused: see NetworkConfig.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("projected is a discriminator alone; name it with --discriminator projected, not --network")
