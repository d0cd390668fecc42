"""The config of a run: frozen dataclasses that check their own values. It does not import torch, so --help is quick.

The config of an objective or a network also states facts for readers that must not import torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from tyro.conf import Suppress

from gen_dist.errors import ConfigError, UnknownNameError
from gen_dist.registry import Registry

Activation = Literal["relu", "tanh", "leaky_relu", "silu"]
Decay = Literal["constant", "linear", "cosine"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
WandbMode = Literal["disabled", "offline", "online"]

_UNKNOWN_NAMES = ("unexpected_keyword_argument", "extra_forbidden", "union_tag_invalid")
"""pydantic's names of errors about options and kinds that do not exist."""


@dataclass(frozen=True)
class _Checked:
    """Base of configs: it refuses values that a field's type does not name."""

    def __post_init__(self) -> None:
        """Raise ConfigError if a Literal field, or a tuple of them, has a value outside its choices."""
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is ClassVar:
                continue
            options = {hint, *get_args(hint)}
            choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
            value = getattr(self, name)
            for one in value if get_origin(hint) is tuple else (value,):
                if choices and one not in choices and not (one is None and NoneType in options):
                    raise ConfigError(f"{name} {one!r} is not one of {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Packing and memory of a data source."""

    image_size: int | None = None
    """Side in pixels: images are resized by their shorter side, then cropped at the centre. None keeps the source's
    size where all images share one, and is 64 for `folder:`."""
    channels: Literal[1, 3] | None = None
    """1 for grayscale, 3 for RGB. None keeps the source's channels; folders with any coloured image become RGB."""
    test_fraction: float = 0.1
    """Share of the images held out for testing if the source has no test split."""
    unreadable_images: Literal["skip", "error"] = "skip"
    """Treatment of unreadable images: skip them with a warning, or stop with an error."""
    synthetic_images: int = 4096
    """Number of training images that `synthetic` makes."""
    resident_budget_mib: int = 2048
    """Largest data set held in device memory, in MiB; a thread reads larger ones from disk."""
    cache_dir: str | None = None
    """Directory of packed images. None is $GEN_DIST_CACHE, else ~/.cache/gen_dist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            _at_least("image_size", self.image_size, 4)
        _at_least("synthetic_images", self.synthetic_images, 1)
        _at_least("resident_budget_mib", self.resident_budget_mib, 0)
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction {self.test_fraction} is not between 0 and 1")


@dataclass(frozen=True)
class NetworkConfig(_Checked):
    """Base of the networks' configs, which `networks` lists by kind.

    A network has four roles: encoder, decoder, generator and discriminator. Encoder and discriminator are instances of
    its `encoder` class, decoder and generator of its `decoder` class.
    """

    kind: Suppress[str] = ""
    encoder: ClassVar[str]
    """Class from images to outputs, as `module:Class`; see `gen_dist.networks.base.Encoder`."""
    decoder: ClassVar[str]
    """Class from latents to images, as `module:Class`; see `gen_dist.networks.base.Decoder`."""
    latent_dim: int = 20
    """Number of latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("latent_dim", self.latent_dim, 1)


networks = Registry("network", NetworkConfig, "gen_dist.networks")
"""Configs of networks by kind."""


@networks.register
@dataclass(frozen=True)
class MlpConfig(NetworkConfig):
    """Fully connected encoder and decoder; the decoder mirrors the encoder."""

    encoder: ClassVar[str] = "gen_dist.networks.mlp:MlpEncoder"
    decoder: ClassVar[str] = "gen_dist.networks.mlp:MlpDecoder"
    kind: Suppress[Literal["mlp"]] = "mlp"
    hidden_sizes: tuple[int, ...] = (400,)
    """Widths of the encoder's hidden layers, images first; the decoder has them in reverse."""
    activation: Activation = "relu"
    """Nonlinearity after each hidden layer; `leaky_relu` has slope 0.2, as is usual in GANs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden_sizes:
            raise ConfigError("hidden_sizes is empty; name at least one width")
        for size in self.hidden_sizes:
            _at_least("hidden_sizes", size, 1)


@networks.register
@dataclass(frozen=True)
class ConvConfig(NetworkConfig):
    """Strided Conv2d encoder and ConvTranspose2d decoder, for any image size."""

    encoder: ClassVar[str] = "gen_dist.networks.conv:ConvEncoder"
    decoder: ClassVar[str] = "gen_dist.networks.conv:ConvDecoder"
    kind: Suppress[Literal["conv"]] = "conv"
    feature_maps: tuple[int, ...] = (32, 64)
    """Channels after each of the encoder's convolutions, which halve the sides; the decoder has them in reverse."""
    hidden_size: int = 256
    """Width of the fully connected layer between the convolutions and the latents."""
    activation: Activation = "relu"
    """Nonlinearity after each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("hidden_size", self.hidden_size, 1)
        if not self.feature_maps:
            raise ConfigError("feature_maps is empty; name at least one number")
        for count in self.feature_maps:
            _at_least("feature_maps", count, 1)


Norm = Literal["batch", "group", "none"]


@networks.register
@dataclass(frozen=True)
class DcganConfig(NetworkConfig):
    """Strided convolutions to a side of 4 to 7 pixels, and transposed ones back (Radford et al. 2016)."""

    encoder: ClassVar[str] = "gen_dist.networks.dcgan:DcganEncoder"
    decoder: ClassVar[str] = "gen_dist.networks.dcgan:DcganDecoder"
    kind: Suppress[Literal["dcgan"]] = "dcgan"
    feature_maps: int = 64
    """Channels at half the image's side; each further halving doubles them."""
    latent_dim: int = 100
    """Number of latents."""
    generator_norm: Norm = "batch"
    """Normalization in the generator or decoder, except at its output."""
    discriminator_norm: Norm = "batch"
    """Normalization in the discriminator or encoder, except in its first layer."""
    spectral_norm: bool = False
    """Divide each weight of the discriminator or encoder by its largest singular value (Miyato et al. 2018)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("feature_maps", self.feature_maps, 1)


@networks.register
@dataclass(frozen=True)
class ResnetConfig(NetworkConfig):
    """Residual blocks at each resolution, for generators and discriminators."""

    kind: Suppress[Literal["resnet"]] = "resnet"
    block: Literal["sngan", "r3gan"] = "sngan"
    """`sngan`: two 3 x 3 convolutions (Miyato et al. 2018). `r3gan`: a bottleneck of grouped convolutions, initially
    the identity, with bilinear resampling and leaky ReLU (Huang et al. 2024)."""
    feature_maps: tuple[int, ...] = (128, 128, 128, 128)
    """Channels at each resolution, that of the image first; each next resolution has half the side."""
    blocks: int = 1
    """Residual blocks at each resolution."""
    latent_dim: int = 128
    """Number of latents."""
    generator_norm: Norm = "none"
    """Normalization in the generator or decoder."""
    discriminator_norm: Norm = "none"
    """Normalization in the discriminator or encoder."""
    spectral_norm: bool = False
    """Divide each weight of the discriminator or encoder by its largest singular value (Miyato et al. 2018)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("blocks", self.blocks, 1)
        if len(self.feature_maps) < 2:
            raise ConfigError(f"feature_maps {self.feature_maps} names fewer than two resolutions")
        for count in self.feature_maps:
            _at_least("feature_maps", count, 1)

    @property
    def encoder(self) -> str:  # type: ignore[override]
        """See NetworkConfig."""
        return {"sngan": "gen_dist.networks.sngan:SnganEncoder", "r3gan": "gen_dist.networks.r3gan:R3ganEncoder"}[
            self.block
        ]

    @property
    def decoder(self) -> str:  # type: ignore[override]
        """See NetworkConfig."""
        return {"sngan": "gen_dist.networks.sngan:SnganDecoder", "r3gan": "gen_dist.networks.r3gan:R3ganDecoder"}[
            self.block
        ]


Likelihood = Literal["bernoulli", "gaussian"]


Capability = Literal["samples", "encoder", "posterior", "likelihood"]


class FigureName(NamedTuple):
    """Name and unit of a figure of metrics.jsonl, for people."""

    title: str
    unit: str = "nats per image"
    short: str = ""
    """Name on the screen; the title if empty."""


@dataclass(frozen=True)
class ObjectiveConfig(_Checked):
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

    @property
    def periods(self) -> tuple[int, ...]:
        """Periods of phases and penalties, in steps; the schedule repeats after their least common multiple."""
        return (1,)


objectives = Registry("objective", ObjectiveConfig, "gen_dist.objectives")
"""Configs of objectives by kind."""


@objectives.register
@dataclass(frozen=True)
class AutoencoderConfig(ObjectiveConfig):
    """Autoencoder: minimizes the reconstruction error alone. It has no prior, so it cannot generate."""

    implementation: ClassVar[str] = "gen_dist.objectives.autoencoder:Autoencoder"
    family: ClassVar[str] = "autoencoder"
    family_name: ClassVar[str] = "autoencoder"
    lacks: ClassVar[Mapping[Capability, str]] = {
        "samples": "an autoencoder has no prior over its latents to draw samples from",
        "posterior": "an autoencoder has codes of arbitrary scale, not a posterior",
        "likelihood": "an autoencoder has no prior over its latents, so no likelihood",
    }
    kind: Suppress[Literal["autoencoder"]] = "autoencoder"
    likelihood: Likelihood = "bernoulli"
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


GradientEstimator = Literal["total", "path"]


@objectives.register
@dataclass(frozen=True)
class VaeConfig(ObjectiveConfig):
    """Variational autoencoder: loss = nll + beta * kl, the negative ELBO at beta 1 (Kingma & Welling 2014, eq. 10)."""

    implementation: ClassVar[str] = "gen_dist.objectives.vae:Vae"
    family: ClassVar[str] = "vae"
    family_name: ClassVar[str] = "variational autoencoder"
    lacks: ClassVar[Mapping[Capability, str]] = {}
    kind: Suppress[Literal["vae"]] = "vae"
    likelihood: Likelihood = "bernoulli"
    """p(x given z): `bernoulli` on logits, or `gaussian` with mean from the decoder and one scale for all pixels."""
    gaussian_scale: float | None = None
    """Standard deviation of the Gaussian likelihood, in units of intensities in [0, 1]. None learns it."""
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
    dynamic_binarization: bool = False
    """Draw each pixel from Bernoulli(intensity) at every use, so that the likelihood is one of binary data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("importance_samples", self.importance_samples, 1)
        _at_least("kl_warmup_steps", self.kl_warmup_steps, 0)
        _finite_and_at_least("beta", self.beta, 0.0)
        if self.gaussian_scale is not None:
            if self.likelihood != "gaussian":
                raise ConfigError(
                    "gaussian_scale goes with likelihood gaussian; leave it out or set likelihood gaussian"
                )
            if not (math.isfinite(self.gaussian_scale) and self.gaussian_scale > 0):
                raise ConfigError(f"gaussian_scale {self.gaussian_scale} is not a positive number")
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


GanLoss = Literal["non_saturating", "least_squares", "hinge", "wasserstein"]
Conditioning = Literal["none", "concat", "projection"]
Augmentation = Literal["colour", "translation", "cutout"]


@dataclass(frozen=True)
class AdversarialConfig(ObjectiveConfig):
    """Base of the configs of GANs: classes, augmentation and noise in the discriminator's input."""

    family: ClassVar[str] = "gan"
    family_name: ClassVar[str] = "GAN"
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

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite_and_at_least("instance_noise", self.instance_noise, 0.0)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("generator_every", self.generator_every, 1)

    @property
    def periods(self) -> tuple[int, ...]:
        """See ObjectiveConfig."""
        return (self.generator_every,)


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
        _at_least("generator_every", self.generator_every, 1)
        _at_least("penalty_every", self.penalty_every, 1)
        _finite_and_at_least("penalty_weight", self.penalty_weight, 0.0)

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
        _at_least("penalty_every", self.penalty_every, 1)
        _finite_and_at_least("penalty_weight", self.penalty_weight, 0.0)

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
        _finite_and_at_least("reconstruction_weight", self.reconstruction_weight, 0.0)
        _finite_and_at_least("beta", self.beta, 0.0)

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


@dataclass(frozen=True)
class OptimizerConfig(_Checked):
    """Optimizer of every phase, as in torch.optim."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Algorithm; the momentum of `sgd` is the first of the betas."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moments."""
    epsilon: float = 1e-8
    """Adam's term for numerical stability."""
    weight_decay: float = 0.0
    """L2 penalty (`adam`, `sgd`) or decoupled decay (`adamw`)."""
    clip_norm: float | None = None
    """Largest global L2 norm of the gradients; larger ones are scaled down to it. None does not clip."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Decay = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    ema_decay: float | None = None
    """Decay per step of the moving average of weights, which sampling and evaluation use. None keeps no average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("ema_decay", self.ema_decay)):
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} {value} is not in [0, 1)")
        _finite_and_at_least("epsilon", self.epsilon, 0.0)
        _finite_and_at_least("weight_decay", self.weight_decay, 0.0)
        _at_least("warmup_steps", self.warmup_steps, 0)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm {self.clip_norm} is not positive; leave it out to switch clipping off")


@dataclass(frozen=True)
class _ByKind:
    """Annotation of a field that JSON reads by its `kind`: the config of that kind in the registry, also in errors."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, _base: Any, handler: Any) -> Any:
        from pydantic import Field  # imported late: it would slow --help

        union: Any = Union[self.registry.configs()]  # noqa: UP007  a union of a tuple
        return handler.generate_schema(Annotated[union, Field(discriminator="kind")])


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """Everything that determines a run: two runs of one config on one data set are equal."""

    preset: Suppress[str] = "custom"
    data: str = "mnist5k"
    """Images to learn: mnist5k, mnist, fashion_mnist, kmnist, cifar10, svhn, folder:PATH, parquet:PATH, synthetic."""
    data_root: str = "data"
    """Directory of the torchvision data sets (MNIST/raw and the like) and of downloads."""
    steps: int = 2000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 128
    """Images per optimizer step over all processes and accumulated micro-batches."""
    accumulation: int = 1
    """Micro-batches per process and optimizer step, for batches that do not fit in memory; gradients are summed."""
    learning_rate: float = 1e-3
    """Highest learning rate of the schedule."""
    seed: int = 0
    """Key of all randomness: initial weights, order of the images, noise. 0 to 2^63 - 1."""
    precision: Precision = "auto"
    """Precision of the networks; losses are float32. `auto` takes that of `accelerate launch --mixed_precision`, else
    bf16 on GPUs that support it, else float32."""
    compile: bool = False
    """Compile each phase with torch.compile: steps are faster, and the start takes seconds to minutes longer."""
    cuda_graphs: bool = True
    """On one GPU, record the device work of a step as a CUDA graph and replay it as one launch; not in fp16. The graph
    keeps the memory of a step, so evaluation needs memory beside it."""
    sync_batch_norm: bool = False
    """Compute batch statistics over all processes, so that their number does not change the run. Otherwise each
    process normalizes its own images, as in the papers."""
    device: Device = "auto"
    """Device of the training; `auto` takes a GPU if there is one."""
    run_dir: str | None = None
    """Directory of the run, to write to and resume from. None is runs/PRESET."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and on SIGTERM, SIGINT or SIGHUP."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    sample_every: int = 500
    """Steps between pictures of samples and reconstructions."""
    evaluate_every: int = 500
    """Steps between evaluations on the test split; another is made at the end."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl; each line has means over the steps since the previous one."""
    wandb: WandbMode | None = None
    """Weights & Biases logging: disabled, offline or online. None takes $WANDB_MODE, else disabled."""
    packing: DataConfig = field(default_factory=DataConfig)
    network: Annotated[NetworkConfig, _ByKind(networks)] = field(default_factory=MlpConfig)
    objective: Annotated[ObjectiveConfig, _ByKind(objectives)] = field(default_factory=VaeConfig)
    optimization: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "global_batch_size", "accumulation", "keep_checkpoints"):
            _at_least(name, getattr(self, name), 1)
        for name in ("checkpoint_every", "sample_every", "evaluate_every", "log_every"):
            _at_least(name, getattr(self, name), 1)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate {self.learning_rate} is not a positive number")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} is not in 0 .. 2^63 - 1")
        if not self.data:
            raise ConfigError("data is empty; name a source such as mnist5k")

    @property
    def run_path(self) -> Path:
        """Directory of the run; `~` and `~user` at its start become the home directory.

        Raises:
            ConfigError: the home directory does not exist, or the name is empty.
        """
        if self.run_dir is None:
            return Path("runs") / self.preset
        if not self.run_dir.strip():  # as of `--run-dir "$UNSET"`
            raise ConfigError("run_dir is empty; name a directory such as runs/first, or . for the current one")
        try:
            return Path(self.run_dir).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"run_dir {self.run_dir}: there is no such home directory; write the path in full"
            ) from None

    def to_json(self) -> str:
        """The config as JSON text; `from_json` reads it back to an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, source: str) -> TrainConfig:
        """Read a config from JSON text; `source` names it in errors.

        Raises:
            ConfigError: the text is not JSON, or has values of a wrong type or out of range.
            UnknownNameError: it has options or kinds that this version does not have.
        """
        from pydantic import ConfigDict, TypeAdapter, ValidationError  # 70 ms that only --config needs

        parts = (*networks.configs(), *objectives.configs())
        cls: Any
        for cls in (DataConfig, OptimizerConfig, TrainConfig, *parts):
            cls.__pydantic_config__ = ConfigDict(extra="forbid")
        try:
            accepted = _without_lone_bytes(text)
            validated = TypeAdapter(TrainConfig).validate_json(accepted)
            return validated if accepted == text else _with_lone_bytes(validated)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")  # pydantic's prefix for our own errors
            line = ": ".join(filter(None, (source, place, message)))
            if first["type"] in _UNKNOWN_NAMES:
                raise UnknownNameError(
                    f"{line}; this gen_dist has no such name: it is mistyped, or of a newer version"
                ) from None
            raise ConfigError(line) from None


# Python holds a byte of a path that is not UTF-8 as half of a surrogate pair. JSON has it as \\udcXX, which pydantic
# refuses. Such a byte passes it as a character that Unicode leaves to private use, U+10FFXX.
_LONE_BYTE = re.compile(r"\\\\|\\ud[89ab]..\\ud[c-f]..|\\udc([89a-f][0-9a-f])")
_BYTES_BACK = {0x10FF00 + byte: 0xDC00 + byte for byte in range(0x80, 0x100)}


def _without_lone_bytes(text: str) -> str:
    return _LONE_BYTE.sub(lambda found: rf"\udbff\udf{found[1]}" if found[1] else found[0], text)


def _with_lone_bytes(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_BYTES_BACK)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in dataclasses.fields(value) if one.init]
        return dataclasses.replace(value, **{name: _with_lone_bytes(getattr(value, name)) for name in names})
    return value


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} {value} is less than {least}")


def _finite_and_at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name} {value} is not a number of at least {least}")
