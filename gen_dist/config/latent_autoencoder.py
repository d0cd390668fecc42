"""Config of latent autoencoders: the first stages of latent diffusion models and of token models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Suppress

from gen_dist.config.checked import at_least, finite_and_at_least
from gen_dist.config.networks import PerceptualFeatures, RoleName
from gen_dist.config.objectives import Capability, FigureName, ObjectiveConfig, objectives
from gen_dist.errors import ConfigError

BottleneckName = Literal["kl", "vq", "fsq", "none"]


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
    """Latents between encoder and decoder. `kl`: a Gaussian posterior with a small KL term. `vq`: the nearest code of a
    codebook (van den Oord et al. 2017). `fsq`: rounded to fixed levels (Mentzer et al. 2023). `none`: as encoded."""
    kl_weight: float = 1e-6
    """Weight of the KL term of `kl`, which is a sum over latents."""
    codebook_size: int = 512
    """Number of codes of `vq`; a batch needs as many places."""
    codebook_update: Literal["gradient", "moving_average"] = "moving_average"
    """Codes of `vq` follow their gradient, or the moving averages of the vectors that take them."""
    codebook_decay: float = 0.99
    """Decay per step of those averages, and of the codes' usage."""
    codebook_weight: float = 1.0
    """Weight of the penalty of `vq`, a sum over latents."""
    commitment: float = 0.25
    """Weight, within the penalty of `vq`, of the encoder's distance from its codes."""
    code_restart: float = 0.03
    """A code of `vq` whose share of the places falls below this part of an even share is drawn again. 0: never."""
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    """Levels of each channel of `fsq`."""
    reconstruction: Literal["l1", "l2"] = "l1"
    """Error of a pixel in -1..1: absolute or squared. It is summed over pixels."""
    log_scale: float | None = 0.0
    """Logarithm s of the error's scale: a pixel with error e has the loss e / exp(s) + s. None learns it."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance, which is added to the error of every pixel. 0 computes none."""
    perceptual_features: PerceptualFeatures = "efficientnet-lite0"
    """Network of the perceptual distance. `vgg16` needs `vgg_weights`, and the package lpips."""
    vgg_weights: str | None = None
    """File of torchvision's weights of VGG16."""
    adversarial_weight: float = 0.0
    """Weight of the discriminator's term, a mean over images and patches. 0 trains no discriminator."""
    adversarial_loss: Literal["hinge", "non_saturating"] = "hinge"
    """Loss of the discriminator, half its terms' sum, and of the term: `hinge` (Lim & Ye 2017) or `non_saturating`
    (Goodfellow et al. 2014)."""
    adversarial_start: int = 0
    """Step at which the discriminator and its term begin."""
    adaptive_weight: bool = True
    """Also weight the term so that it and the error have equal gradients in the decoder's last convolution (Esser et
    al. 2021, eq. 7)."""
    adaptive_limit: float = 1e4
    """Largest adaptive weight, before `adversarial_weight`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_and_at_least("kl_weight", self.kl_weight, 0.0)
        if self.log_scale is not None and not abs(self.log_scale) <= 50:
            raise ConfigError(f"log_scale {self.log_scale} is not a number from -50 to 50")
        at_least("codebook_size", self.codebook_size, 2)
        for name in ("codebook_weight", "commitment", "code_restart", "perceptual_weight"):
            finite_and_at_least(name, getattr(self, name), 0.0)
        if not 0 <= self.codebook_decay < 1:
            raise ConfigError(f"codebook_decay {self.codebook_decay} is not in [0, 1)")
        if not self.code_restart < 1:
            raise ConfigError(f"code_restart {self.code_restart} is not below 1: the even share itself would be dead")
        for levels in self.fsq_levels:
            at_least("fsq_levels", levels, 2)
        finite_and_at_least("adversarial_weight", self.adversarial_weight, 0.0)
        at_least("adversarial_start", self.adversarial_start, 0)
        finite_and_at_least("adaptive_limit", self.adaptive_limit, 0.0)

    def trains(self, role: RoleName) -> bool:
        """See ObjectiveConfig."""
        return super().trains(role) and (role != "discriminator" or self.adversarial_weight > 0)

    def refuse_steps(self, steps: int) -> None:
        """See ObjectiveConfig."""
        if self.adversarial_weight and self.adversarial_start >= steps:
            raise ConfigError(
                f"adversarial_start {self.adversarial_start} is after the last step, {steps - 1}: the discriminator "
                "would never be trained; use more steps, an earlier start, or adversarial_weight 0"
            )

    @property
    def test_metrics(self) -> tuple[str, ...]:
        """See ObjectiveConfig."""
        of_bottleneck = {"kl": ("kl",), "vq": ("quantization_error",)}
        return ("reconstruction_error", *of_bottleneck.get(self.bottleneck, ()))

    @property
    def figure_names(self) -> Mapping[str, FigureName]:
        """See ObjectiveConfig."""
        unit = "absolute error per image" if self.reconstruction == "l1" else "squared error per image"
        return {
            "reconstruction_error": FigureName("reconstruction error", unit, "reconstruction"),
            "perceptual_distance": FigureName("perceptual distance", "mean over images", "perceptual"),
            "adversarial": FigureName("discriminator's term", "mean over patches"),
            "adaptive_weight": FigureName("adaptive weight of the discriminator's term", ""),
            "quantization_error": FigureName("distance from the codes", "squared error per image", "quantization"),
            "kl": FigureName("KL divergence from the standard normal", short="KL"),
        }
