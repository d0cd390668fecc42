"""Config of latent autoencoders: the first stages of latent diffusion models and of token models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Suppress

from gen_dist.config.checked import finite_and_at_least
from gen_dist.config.networks import RoleName
from gen_dist.config.objectives import Capability, FigureName, ObjectiveConfig, objectives
from gen_dist.errors import ConfigError

BottleneckName = Literal["kl", "none"]


@objectives.register
@dataclass(frozen=True)
class LatentAutoencoderConfig(ObjectiveConfig):
    """Autoencoder with latents for other models to learn (Esser et al. 2021; Rombach et al. 2022)."""

    implementation: ClassVar[str] = "gen_dist.objectives.latent_autoencoder:LatentAutoencoder"
    family: ClassVar[str] = "latent-autoencoder"
    family_name: ClassVar[str] = "latent autoencoder"
    roles: ClassVar[tuple[RoleName, ...]] = ("encoder", "decoder", "discriminator")
    lacks: ClassVar[Mapping[Capability, str]] = {
        "samples": "a latent autoencoder has no useful prior over its latents: another model has to learn them",
        "posterior": "latents of a latent autoencoder have a scale of their own, not that of a prior",
        "likelihood": "the errors of a latent autoencoder are no likelihood of pixels",
    }
    phase_names: ClassVar[Mapping[str, str]] = {"discriminator": "D", "autoencoder": "AE"}
    kind: Suppress[Literal["latent-autoencoder"]] = "latent-autoencoder"
    bottleneck: BottleneckName = "kl"
    """Latents between encoder and decoder. `kl`: a Gaussian posterior with a small KL term. `none`: as encoded."""
    kl_weight: float = 1e-6
    """Weight of the KL term of `kl`, which is a sum over latents."""
    reconstruction: Literal["l1", "l2"] = "l1"
    """Error of a pixel in -1..1: absolute or squared. It is summed over pixels."""
    log_scale: float | None = 0.0
    """Logarithm s of the error's scale: a pixel with error e has the loss e / exp(s) + s. None learns it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_and_at_least("kl_weight", self.kl_weight, 0.0)
        if self.log_scale is not None and not abs(self.log_scale) <= 50:
            raise ConfigError(f"log_scale {self.log_scale} is not a number from -50 to 50")

    @property
    def test_metrics(self) -> tuple[str, ...]:
        """See ObjectiveConfig."""
        return ("reconstruction_error", *({"kl": ("kl",)}.get(self.bottleneck, ())))

    @property
    def figure_names(self) -> Mapping[str, FigureName]:
        """See ObjectiveConfig."""
        unit = "absolute error per image" if self.reconstruction == "l1" else "squared error per image"
        return {
            "reconstruction_error": FigureName("reconstruction error", unit, "reconstruction"),
            "kl": FigureName("KL divergence from the standard normal", short="KL"),
        }
