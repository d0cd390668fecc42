"""Configs of the objectives, by kind. They also state facts for readers that must not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NamedTuple, get_args

from tyro.conf import Suppress

from gen_dist.config.checked import Checked, at_least, finite_and_at_least
from gen_dist.config.networks import RoleName
from gen_dist.errors import ConfigError
from gen_dist.plugins.registry import Registry

Likelihood = Literal["bernoulli", "gaussian", "laplace", "discretized-logistic"]
Capability = Literal["samples", "encoder", "posterior", "likelihood"]
GradientEstimator = Literal["total", "path"]
GanLoss = Literal["non_saturating", "least_squares", "hinge", "wasserstein"]
Conditioning = Literal["none", "concat", "projection"]
Augmentation = Literal["colour", "translation", "cutout"]
Transformation = Literal[
    "mirror",
    "turn",
    "shift",
    "scale",
    "rotation",
    "stretch",
    "drift",
    "brightness",
    "contrast",
    "negative",
    "hue",
    "saturation",
    "cutout",
]
RandomAugmentation = Literal["blit", "geometric", "colour", Transformation]


class FigureName(NamedTuple):
    """Name and unit of a figure of metrics.jsonl, for people."""

    title: str
    unit: str = "nats per image"
    short: str = ""
    """Name on the screen; the title if empty."""


@dataclass(frozen=True)
class ObjectiveConfig(Checked):
    """Base of the objectives' configs, which `objectives` lists by kind."""

    kind: Suppress[str] = ""
    implementation: ClassVar[str]
    """Class of the objective, as `module:Class`; see `gen_dist.objectives.base.Objective`."""
    family: ClassVar[str]
    """Name that groups objectives with the same textbook properties; `vae` and `gan` are compared with each other."""
    family_name: ClassVar[str]
    """Name of the family in a sentence."""
    lacks: ClassVar[Mapping[Capability, str]]
    """Missing capabilities, each with the reason as a clause:

    - samples: latents drawn from a prior decode to new images;
    - encoder: images map to latents and can be reconstructed;
    - posterior: the encoder gives a distribution over latents, on the prior's scale;
    - likelihood: the decoder gives a likelihood of pixels.
    """
    roles: ClassVar[tuple[RoleName, ...]] = get_args(RoleName)
    """Roles of the networks that the objective builds."""
    phase_names: ClassVar[Mapping[str, str]] = {}
    """Short names of the phases for the screen, in the order of their colours in charts."""

    @property
    def figure_names(self) -> Mapping[str, FigureName]:
        """Names for people of the objective's figures, by their names in metrics.jsonl without split and phase."""
        return {}

    @property
    def test_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of `Objective.evaluate`. The first is the headline; lower is better."""
        return ()

    def trains(self, role: RoleName) -> bool:
        """Return True if a phase trains the network of this role."""
        return role in self.roles

    @property
    def periods(self) -> tuple[int, ...]:
        """Periods of phases and penalties, in steps; the schedule repeats after their least common multiple."""
        return (1,)

    def refuse_steps(self, steps: int) -> None:
        """Raise ConfigError if a run of so many steps would end before a part of the objective begins."""


objectives = Registry(
    "objective", ObjectiveConfig, "gen_dist.objectives", ("implementation", "family", "family_name", "lacks")
)
"""Configs of objectives by kind."""


@objectives.register
@dataclass(frozen=True)
class AutoencoderConfig(ObjectiveConfig):
    """Autoencoder: minimizes the reconstruction error alone. It has no prior, so it cannot generate."""

    implementation: ClassVar[str] = "gen_dist.objectives.autoencoder:Autoencoder"
    family: ClassVar[str] = "autoencoder"
    family_name: ClassVar[str] = "autoencoder"
    roles: ClassVar[tuple[RoleName, ...]] = ("encoder", "decoder")
    lacks: ClassVar[Mapping[Capability, str]] = {
        "samples": "an autoencoder has no prior over its latents to draw samples from",
        "posterior": "an autoencoder has codes of arbitrary scale, not a posterior",
        "likelihood": "an autoencoder has no prior over its latents, so no likelihood",
    }
    kind: Suppress[Literal["autoencoder"]] = "autoencoder"
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Reconstruction error: `bernoulli` is the cross-entropy of pixels in [0, 1], `gaussian` the squared error."""

    @property
    def test_metrics(self) -> tuple[str, ...]:
        """See ObjectiveConfig."""
        return ("reconstruction_error",)

    @property
    def figure_names(self) -> Mapping[str, FigureName]:
        """See ObjectiveConfig."""
        unit = "nats per image" if self.likelihood == "bernoulli" else "squared error per image"
        return {
            "loss": FigureName("loss", unit),
            "reconstruction_error": FigureName("reconstruction error", unit, "reconstruction"),
        }


@objectives.register
@dataclass(frozen=True)
class VaeConfig(ObjectiveConfig):
    """Variational autoencoder: loss = nll + beta * kl, the negative ELBO at beta 1 (Kingma & Welling 2014, eq. 10)."""

    implementation: ClassVar[str] = "gen_dist.objectives.vae:Vae"
    family: ClassVar[str] = "vae"
    family_name: ClassVar[str] = "variational autoencoder"
    roles: ClassVar[tuple[RoleName, ...]] = ("encoder", "decoder")
    lacks: ClassVar[Mapping[Capability, str]] = {}
    kind: Suppress[Literal["vae"]] = "vae"
    likelihood: Likelihood = "bernoulli"
    """p(x given z): `bernoulli` on logits; or, with means from the decoder and one scale for all pixels, a `gaussian`
    or `laplace` density, or `discretized-logistic`, the probability of whole numbers (Kingma et al. 2016)."""
    gaussian_scale: float | None = None
    """Standard deviation of the Gaussian likelihood, in units of intensities in [0, 1]. None learns it."""
    likelihood_scale: float | None = None
    """Scale of the likelihoods `laplace` and `discretized-logistic`, in units of intensities in [0, 1]. None learns it.
    """
    beta: float = 1.0
    """Weight of the KL term (Higgins et al. 2017)."""
    kl_warmup_steps: int = 0
    """Steps over which the KL weight rises linearly from 0 to beta. 0 starts at beta."""
    importance_samples: int = 1
    """Latent samples K per image. K > 1 trains the importance-weighted bound (Burda et al. 2016, eq. 8)."""
    gradient: GradientEstimator = "total"
    """Gradient of the encoder. `path` flows through the latents alone and omits a term of zero mean: its variance is
    higher than that of `total` at first, and lower once the encoder is near the posterior (Roeder et al. 2017; K > 1:
    Tucker et al. 2019). The loss of `path` has the KL of the sample, not its mean."""
    conditioning: Literal["none", "concat"] = "none"
    """Input of labels. `none`: no labels. `concat`: the decoder takes latents and labels, so that p(x given z, y) is
    learned (Sohn et al. 2015); the posterior is one of the image alone, and encoding needs no label."""
    dynamic_binarization: bool = False
    """Draw each pixel from Bernoulli(intensity) at every use, so that the likelihood is one of binary data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("importance_samples", self.importance_samples, 1)
        at_least("kl_warmup_steps", self.kl_warmup_steps, 0)
        finite_and_at_least("beta", self.beta, 0.0)
        if self.gaussian_scale is not None and self.likelihood != "gaussian":
            raise ConfigError("gaussian_scale goes with likelihood gaussian; leave it out or set likelihood gaussian")
        if self.likelihood_scale is not None and self.likelihood in ("bernoulli", "gaussian"):
            raise ConfigError(
                "likelihood_scale goes with likelihood laplace or discretized-logistic; leave it out, or use "
                "gaussian_scale for gaussian"
            )
        for name in ("gaussian_scale", "likelihood_scale"):
            scale = getattr(self, name)
            if scale is not None and not (math.isfinite(scale) and scale > 0):
                raise ConfigError(f"{name} {scale} is not a positive number")
        if self.dynamic_binarization and self.likelihood != "bernoulli":
            raise ConfigError("dynamic_binarization makes binary data and goes with likelihood bernoulli only")
        if self.importance_samples > 1 and (self.beta != 1.0 or self.kl_warmup_steps):
            raise ConfigError(
                f"importance_samples {self.importance_samples} trains one bound with no separate KL term; "
                "use beta 1 and kl_warmup_steps 0"
            )

    @property
    def test_metrics(self) -> tuple[str, ...]:
        """See ObjectiveConfig."""
        bound = (f"negative_bound_k{self.importance_samples}",) if self.importance_samples > 1 else ()
        return ("negative_elbo", "nll", "kl", *bound)

    @property
    def figure_names(self) -> Mapping[str, FigureName]:
        """See ObjectiveConfig. `nll` is -log p(x given z): -log p(x) is what importance samples estimate."""
        weight = "" if self.beta == 1.0 else f" with {self.beta:g} times the KL term"
        return {
            "loss": FigureName(f"loss{weight}", short="loss"),
            "negative_elbo": FigureName("negative ELBO"),
            "nll": FigureName("reconstruction term of the negative ELBO", short="reconstruction"),
            "kl": FigureName("KL term of the negative ELBO", short="KL"),
            f"negative_bound_k{self.importance_samples}": FigureName(
                f"negative bound of {self.importance_samples} importance samples", short="bound"
            ),
        }


_OF_ADAPTING = ("ada_target", "ada_images", "ada_every")
"""Options of `ada` that say how its probability adapts."""


COLOUR_TRANSFORMATIONS: frozenset[Transformation] = frozenset(
    {"brightness", "contrast", "negative", "hue", "saturation"}
)
_GROUPS: Mapping[str, frozenset[Transformation]] = {
    "blit": frozenset({"mirror", "turn", "shift"}),
    "geometric": frozenset({"scale", "rotation", "stretch", "drift"}),
    "colour": COLOUR_TRANSFORMATIONS,
}


def transformations(kinds: Sequence[str]) -> frozenset[str]:
    """Transformations of words of `ada`: a group has several, any other word is one."""
    return frozenset().union(*(_GROUPS.get(kind, {kind}) for kind in kinds))


def ignored_ada(kinds: Sequence[str], probability: float | None) -> tuple[str, ...]:
    """Names of the options that have no effect beside these values of `ada` and `ada_probability`."""
    if not kinds:
        return ("ada_probability", *_OF_ADAPTING, "ada_colour")
    adapting = () if probability is None else _OF_ADAPTING
    return adapting if transformations(kinds) & COLOUR_TRANSFORMATIONS else (*adapting, "ada_colour")


@dataclass(frozen=True)
class AdversarialConfig(ObjectiveConfig):
    """Base of the configs of GANs: classes, augmentation and noise in the discriminator's input."""

    family: ClassVar[str] = "gan"
    family_name: ClassVar[str] = "GAN"
    roles: ClassVar[tuple[RoleName, ...]] = ("generator", "discriminator")
    lacks: ClassVar[Mapping[Capability, str]] = {
        "encoder": "a GAN has no encoder",
        "posterior": "a GAN has no encoder",
        "likelihood": "a GAN has no likelihood",
    }
    phase_names: ClassVar[Mapping[str, str]] = {"discriminator": "D", "generator": "G"}
    conditioning: Conditioning = "none"
    """Class input of the networks. `none`: no classes. `concat`: one-hot latents and a channel of the image (Mirza &
    Osindero 2014). `projection` in the discriminator, concat in the generator (Miyato & Koyama 2018)."""
    augmentation: tuple[Augmentation, ...] = ()
    """Augmentations of real and generated images in the discriminator's input, against overfitting of small data sets
    (Zhao et al. 2020)."""
    instance_noise: float = 0.0
    """Standard deviation of noise on real and generated images in the discriminator's input, where black and white are
    2 apart. It keeps the discriminator from classifying images by their background alone (Soenderby et al. 2017)."""
    freeze_discriminator: int = 0
    """Layers or blocks of the discriminator, from the image on, that stay as they are in the run of `--from` (Mo et al.
    2020)."""
    ada: tuple[RandomAugmentation, ...] = ()
    """Augmentations of real and generated images in the discriminator's input, each made with a probability that adapts
    to its overfitting (Karras et al. 2020a). `blit`: `mirror`, `turn` by 90 degrees, `shift` by whole pixels;
    `geometric`: `scale`, `stretch`, `rotation`, `drift` by fractions of pixels; `colour`: `brightness`, `contrast`,
    `negative`, and of colour images `hue` and `saturation`; `cutout`. The paper's choice is the first three groups;
    leave out what makes another thing of an image, such as `mirror` of a digit."""
    ada_probability: float | None = None
    """Fixed probability of the augmentations of `ada`. None adapts it."""
    ada_target: float = 0.6
    """Mean sign of the scores of training images, at which the probability stays; above it rises, below it falls."""
    ada_images: int = 500_000
    """Training images over which the probability can rise from 0 to 1."""
    ada_every: int = 4
    """Steps between two changes of the probability."""
    ada_colour: float = 1.0
    """Factor of the probability for the transformations of `colour`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_and_at_least("instance_noise", self.instance_noise, 0.0)
        at_least("freeze_discriminator", self.freeze_discriminator, 0)
        at_least("ada_images", self.ada_images, 1)
        at_least("ada_every", self.ada_every, 1)
        for name in ("ada_probability", "ada_colour"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} {value} is not in 0..1")
        if not -1 < self.ada_target < 1:
            raise ConfigError(f"ada_target {self.ada_target} is not between -1 and 1, as a mean sign is")
        self._refuse_ignored_ada()

    def _refuse_ignored_ada(self) -> None:
        """Raise ConfigError if an option of `ada` is given that the others leave without effect."""
        default = {field.name: field.default for field in fields(self)}
        ignored = ignored_ada(self.ada, self.ada_probability)
        given = [name for name in ignored if getattr(self, name) != default[name]]
        adapting = [name for name in given if name in _OF_ADAPTING]
        if given and not self.ada:
            raise ConfigError(
                f"{given[0]} {getattr(self, given[0])} without augmentations; add --ada blit geometric colour, or "
                f"leave it out ({default[given[0]]})"
            )
        if adapting:
            raise ConfigError(
                f"{adapting[0]} {getattr(self, adapting[0])} with ada_probability {self.ada_probability}, which is "
                f"fixed; leave out one of them (--ada-probability None, or {default[adapting[0]]})"
            )
        if given:
            raise ConfigError(
                f"ada_colour {self.ada_colour} without a change of colour in ada {' '.join(self.ada)}; add colour, or "
                f"leave it out ({default['ada_colour']})"
            )

    @property
    def adapts_augmentation(self) -> bool:
        """True if the probability of augmentations follows the scores."""
        return bool(self.ada) and self.ada_probability is None


@objectives.register
@dataclass(frozen=True)
class GanConfig(AdversarialConfig):
    """Generative adversarial network: a generator and a discriminator (Goodfellow et al. 2014)."""

    implementation: ClassVar[str] = "gen_dist.objectives.shared_scores:SharedScoresGan"
    kind: Suppress[Literal["gan"]] = "gan"
    loss: Literal["non_saturating", "least_squares", "hinge"] = "non_saturating"
    """`non_saturating` on logits (Goodfellow et al. 2014), `least_squares` (Mao et al. 2017) or `hinge` (Lim & Ye
    2017)."""
    generator_every: int = 1
    """Period of the generator's updates in steps; the discriminator is updated at every step."""
    penalty_weight: float = 0.0
    """gamma: the squared gradients of scores at real images (R1: Mescheder et al. 2018) have weight gamma / 2."""
    penalty_every: int = 1
    """Period of the penalty in steps; its weight is multiplied by the period (Karras et al. 2020)."""
    style_mixing: float = 0.0
    """Share of generated images that take two styles, from a random place of the synthesis on the second one (Karras et
    al. 2019). Only with network stylegan2, as the two options below."""
    path_length_weight: float = 0.0
    """Weight of the generator's path-length regularization (Karras et al. 2020, eq. 4); 2 in the paper."""
    path_length_every: int = 4
    """Period of that regularization in steps; its weight is multiplied by the number of the generator's turns in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("generator_every", self.generator_every, 1)
        at_least("penalty_every", self.penalty_every, 1)
        at_least("path_length_every", self.path_length_every, 1)
        finite_and_at_least("penalty_weight", self.penalty_weight, 0.0)
        finite_and_at_least("path_length_weight", self.path_length_weight, 0.0)
        if not 0 <= self.style_mixing <= 1:
            raise ConfigError(f"style_mixing {self.style_mixing} is not in 0..1")

    @property
    def options_of_styles(self) -> list[str]:
        """Names of the given options that need a generator with styles."""
        return [name for name in ("style_mixing", "path_length_weight") if getattr(self, name)]

    @property
    def periods(self) -> tuple[int, ...]:
        """See ObjectiveConfig."""
        penalty = self.penalty_every if self.penalty_weight else 1
        lengths = self.path_length_every if self.path_length_weight else 1
        return self.generator_every, penalty, lengths


@objectives.register
@dataclass(frozen=True)
class WganGpConfig(AdversarialConfig):
    """Wasserstein GAN with gradient penalty (Gulrajani et al. 2017)."""

    implementation: ClassVar[str] = "gen_dist.objectives.wgan_gp:WganGp"
    phase_names: ClassVar[Mapping[str, str]] = {"critic": "critic", "generator": "G"}
    kind: Suppress[Literal["wgan-gp"]] = "wgan-gp"
    generator_every: int = 5
    """Critic updates per generator update."""
    penalty_weight: float = 10.0
    """Weight of the gradient penalty."""
    penalty_every: int = 1
    """Period of the penalty in steps; its weight is multiplied by the period."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapts_augmentation:
            raise ConfigError(
                "ada with wgan-gp: a critic's scores have no zero that tells overfitting; add --ada-probability 0.3, "
                "or another, to fix it"
            )
        at_least("generator_every", self.generator_every, 1)
        at_least("penalty_every", self.penalty_every, 1)
        finite_and_at_least("penalty_weight", self.penalty_weight, 0.0)

    @property
    def periods(self) -> tuple[int, ...]:
        """See ObjectiveConfig."""
        return self.generator_every, self.penalty_every


@objectives.register
@dataclass(frozen=True)
class R3ganConfig(AdversarialConfig):
    """Relativistic pairing GAN with R1 and R2 penalties (Huang et al. 2024)."""

    implementation: ClassVar[str] = "gen_dist.objectives.r3gan:R3gan"
    kind: Suppress[Literal["r3gan"]] = "r3gan"
    penalty_weight: float = 1.0
    """gamma: the squared gradients at real images (R1) and at generated ones (R2) have weight gamma / 2 each."""
    penalty_every: int = 1
    """Period of the penalties in steps; their weight is multiplied by the period (Karras et al. 2020)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("penalty_every", self.penalty_every, 1)
        finite_and_at_least("penalty_weight", self.penalty_weight, 0.0)

    @property
    def periods(self) -> tuple[int, ...]:
        """See ObjectiveConfig."""
        return (self.penalty_every,)


@objectives.register
@dataclass(frozen=True)
class VaeGanConfig(ObjectiveConfig):
    """VAE with a GAN's generator as decoder: reconstructions are compared in the discriminator's features (Larsen et
    al. 2016)."""

    implementation: ClassVar[str] = "gen_dist.objectives.vae_gan:VaeGan"
    family: ClassVar[str] = "vae-gan"
    family_name: ClassVar[str] = "VAE-GAN"
    roles: ClassVar[tuple[RoleName, ...]] = ("encoder", "generator", "discriminator")
    lacks: ClassVar[Mapping[Capability, str]] = {
        "likelihood": "the generator of a VAE-GAN gives images, not a likelihood of pixels",
    }
    phase_names: ClassVar[Mapping[str, str]] = {"discriminator": "D", "generator": "G", "encoder": "encoder"}
    kind: Suppress[Literal["vae-gan"]] = "vae-gan"
    reconstruction_weight: float = 1e-2
    """gamma: weight of the feature-space reconstruction against the adversarial term in the generator's loss."""
    beta: float = 1.0
    """Weight of the KL term in the encoder's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_and_at_least("reconstruction_weight", self.reconstruction_weight, 0.0)
        finite_and_at_least("beta", self.beta, 0.0)

    @property
    def test_metrics(self) -> tuple[str, ...]:
        """See ObjectiveConfig."""
        return "reconstruction_error", "kl"

    @property
    def figure_names(self) -> Mapping[str, FigureName]:
        """See ObjectiveConfig."""
        return {
            "reconstruction_error": FigureName("reconstruction error", "squared error per image", "reconstruction"),
            "feature_error": FigureName("error of the reconstructions in features", "half the squared error per image"),
            "kl": FigureName("KL divergence from the prior", short="KL"),
        }
