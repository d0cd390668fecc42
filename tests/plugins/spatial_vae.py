"""A plug-in: a VAE whose latents have places, [C, h, w], as those of latent diffusion models.

    gen-dist train spatial-vae --plugin spatial_vae.py --data folder:holiday/

It registers one network and one preset. The objective is the package's own VAE: it takes latents of any shape.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

from torch import Tensor, nn

from gen_dist.config import NetworkConfig, OptimizerConfig, TrainConfig, VaeConfig, networks
from gen_dist.errors import ConfigError
from gen_dist.networks import Decoder, Encoder
from gen_dist.presets import add_preset


@networks.register
@dataclass(frozen=True)
class SpatialConfig(NetworkConfig):
    """Residual blocks at each resolution, with GroupNorm and SiLU; latents of `latent_dim` channels at the last."""

    encoder: ClassVar[str] = f"{__name__}:SpatialEncoder"
    decoder: ClassVar[str] = f"{__name__}:SpatialDecoder"
    kind: Literal["spatial"] = "spatial"
    latent_dim: int = 4
    feature_maps: tuple[int, ...] = (16, 32, 32)
    """Channels at each resolution, that of the image first; each next resolution has half the side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.feature_maps:
            raise ConfigError("feature_maps is empty; name at least one number")
        for count in self.feature_maps:
            if count < 4 or count % 4:
                raise ConfigError(f"feature_maps {count} is not a multiple of 4, the channels of a group")

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """See NetworkConfig."""
        factor = 2 ** (len(self.feature_maps) - 1)
        height, width = image_shape[1:]
        if height % factor or width % factor:
            raise ConfigError(f"images of {height} x {width} cannot be halved {len(self.feature_maps) - 1} times")
        return self.latent_dim, height // factor, width // factor


class Block(nn.Module):
    """Feature maps [B, C, h, w] plus a correction: normalization, SiLU and convolution, twice (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.GroupNorm(channels // 4, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)),
            *(nn.GroupNorm(channels // 4, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)),
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)  # each block starts as the identity

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape."""
        corrected: Tensor = maps + self.layers(maps)
        return corrected


class SpatialEncoder(Encoder):
    """Images float32 [B, C, H, W] -> [B, outputs, h, w]."""

    def __init__(self, config: SpatialConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        widths = config.feature_maps
        layers: list[nn.Module] = [nn.Conv2d(image_shape[0], widths[0], 3, padding=1), Block(widths[0])]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), Block(after)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(widths[-1] // 4, widths[-1]), nn.SiLU())
        self.last = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the posterior's parameters, [B, outputs, h, w]."""
        parameters: Tensor = self.last(self.layers(images))
        return parameters


class SpatialDecoder(Decoder):
    """Latents float32 [B, inputs, h, w] -> [B, C, H, W]."""

    def __init__(self, config: SpatialConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__()
        widths = config.feature_maps[::-1]
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1), Block(widths[0])]
        for before, after in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(before, after, 3, padding=1), Block(after)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(widths[-1] // 4, widths[-1]), nn.SiLU())
        self.last = nn.Conv2d(widths[-1], image_shape[0], 3, padding=1)

    @property
    def last_convolution(self) -> nn.Conv2d:
        """See Decoder; an adaptive weight of a discriminator's term needs it."""
        return self.last

    def features(self, latents: Tensor) -> Tensor:
        """Return the maps before the last convolution."""
        maps: Tensor = self.layers(latents)
        return maps

    def start_at(self, image: Tensor) -> None:
        """Start every image at the mean colour of `image`, [C, H, W]."""
        assert self.last.bias is not None
        self.last.bias.data.copy_(image.mean(dim=(1, 2)))

    def forward(self, latents: Tensor) -> Tensor:
        """Return logits or means of pixels, [B, C, H, W]."""
        decoded: Tensor = self.last(self.features(latents))
        return decoded


add_preset(
    "spatial-vae",
    replace(
        TrainConfig(),
        data="cifar10",
        steps=20_000,
        global_batch_size=64,
        learning_rate=2e-3,
        network=SpatialConfig(),
        objective=VaeConfig(likelihood="gaussian"),
        optimization=OptimizerConfig(betas=(0.9, 0.99), warmup_steps=200, decay="cosine", ema_decay=0.999),
    ),
    "VAE with latents [4, 8, 8] for images of 32 x 32",
)
