"""The config of a run: frozen dataclasses, checked when they are made. No torch in here, so that --help is quick."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Suppress

from gen_dist.errors import ConfigError

Activation = Literal["relu", "tanh", "leaky_relu", "silu"]
Decay = Literal["constant", "linear", "cosine"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
WandbMode = Literal["disabled", "offline", "online"]


@dataclass(frozen=True)
class DataConfig:
    """How a source of images is packed and held."""

    image_size: int | None = None
    """Side in pixels: images are resized by their shorter side, then cropped at the centre. None keeps the size of
    sources whose images are all alike, and is 64 for `folder:`."""
    channels: Literal[1, 3] | None = None
    """1 for grayscale, 3 for RGB. None keeps what the source has; folders with any coloured image become RGB."""
    test_fraction: float = 0.1
    """Share of the images held out for testing where the source has no test split of its own."""
    unreadable_images: Literal["skip", "error"] = "skip"
    """What to do with files that are no readable images: leave them out with a warning, or stop."""
    synthetic_images: int = 4096
    """Number of training images that `synthetic` makes."""
    resident_budget_mib: int = 2048
    """Images are held in device memory up to this size in MiB; larger sets are gathered from disk by a thread."""
    cache_dir: str | None = None
    """Where packed images are kept. None is $GEN_DIST_CACHE, else ~/.cache/gen_dist."""

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.image_size is not None:
            _at_least("image_size", self.image_size, 4)
        _at_least("synthetic_images", self.synthetic_images, 1)
        _at_least("resident_budget_mib", self.resident_budget_mib, 0)
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction {self.test_fraction} is not between 0 and 1")


@dataclass(frozen=True)
class MlpConfig:
    """Fully connected encoder and decoder; the decoder mirrors the encoder."""

    kind: Suppress[Literal["mlp"]] = "mlp"
    hidden_sizes: tuple[int, ...] = (400,)
    """Widths of the encoder's hidden layers, images first; the decoder has them in reverse."""
    activation: Activation = "relu"
    """Nonlinearity after each hidden layer."""
    latent_dim: int = 20
    """Number of latents."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _at_least("latent_dim", self.latent_dim, 1)
        if not self.hidden_sizes:
            raise ConfigError("hidden_sizes is empty; name at least one width")
        for size in self.hidden_sizes:
            _at_least("hidden_sizes", size, 1)


@dataclass(frozen=True)
class ConvConfig:
    """Strided Conv2d encoder and ConvTranspose2d decoder, for any image size."""

    kind: Suppress[Literal["conv"]] = "conv"
    feature_maps: tuple[int, ...] = (32, 64)
    """Numbers of channels after the encoder's convolutions, each halving the side; the decoder has them in reverse."""
    hidden_size: int = 256
    """Width of the fully connected layer between the convolutions and the latents."""
    activation: Activation = "relu"
    """Nonlinearity after each layer."""
    latent_dim: int = 20
    """Number of latents."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _at_least("latent_dim", self.latent_dim, 1)
        _at_least("hidden_size", self.hidden_size, 1)
        if not self.feature_maps:
            raise ConfigError("feature_maps is empty; name at least one number")
        for count in self.feature_maps:
            _at_least("feature_maps", count, 1)


Likelihood = Literal["bernoulli", "gaussian"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder: the reconstruction error alone. It has no prior, so it cannot generate."""

    kind: Suppress[Literal["autoencoder"]] = "autoencoder"
    likelihood: Likelihood = "bernoulli"
    """Reconstruction error: `bernoulli` is the cross-entropy of pixels in [0, 1], `gaussian` the squared error."""

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True)
class VaeConfig:
    """Variational autoencoder: loss = nll + beta * kl, the negative ELBO at beta 1 (Kingma & Welling 2014, eq. 10)."""

    kind: Suppress[Literal["vae"]] = "vae"
    likelihood: Likelihood = "bernoulli"
    """p(x given z): `bernoulli` on logits, or `gaussian` with mean from the decoder and one scale for all pixels."""
    gaussian_scale: float | None = None
    """Standard deviation of the Gaussian likelihood in pixel units ([0, 1]). None learns it."""
    beta: float = 1.0
    """Weight of the KL term (Higgins et al. 2017)."""
    kl_warmup_steps: int = 0
    """Steps over which the KL weight rises linearly from 0 to beta. 0 starts at beta."""
    importance_samples: int = 1
    """Latent samples K per image. K > 1 trains the importance-weighted bound (Burda et al. 2016, eq. 8)."""
    dynamic_binarization: bool = False
    """Draw each pixel from Bernoulli(intensity) anew at every use, so that the likelihood is one of binary data."""

    def __post_init__(self) -> None:
        _check_choices(self)
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


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of every phase, as in torch.optim."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Algorithm; `sgd` takes its momentum from the first of the betas."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moment."""
    epsilon: float = 1e-8
    """Adam's term for numerical stability."""
    weight_decay: float = 0.0
    """L2 penalty (`adam`, `sgd`) or decoupled decay (`adamw`)."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global L2 norm. None does not clip."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Decay = "constant"
    """What the learning rate does after the warm-up: stay, or fall to 0 at the last step."""
    ema_decay: float | None = None
    """Decay per step of the moving average of the weights that sampling and testing use. None keeps no average."""

    def __post_init__(self) -> None:
        _check_choices(self)
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("ema_decay", self.ema_decay)):
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} {value} is not in [0, 1)")
        _finite_and_at_least("epsilon", self.epsilon, 0.0)
        _finite_and_at_least("weight_decay", self.weight_decay, 0.0)
        _at_least("warmup_steps", self.warmup_steps, 0)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm {self.clip_norm} is not positive; leave it out to switch clipping off")


NetworkConfig = MlpConfig | ConvConfig
ObjectiveConfig = AutoencoderConfig | VaeConfig


class _ByKind:
    """Marks a union that JSON tells apart by `kind`: errors then speak of the one that is meant, not of the first."""

    def __get_pydantic_core_schema__(self, union: Any, handler: Any) -> Any:
        from pydantic import Field  # not above: --help would wait for it

        return handler.generate_schema(Annotated[union, Field(discriminator="kind")])


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Two runs of one config on one data set are the same run."""

    preset: Suppress[str] = "custom"
    data: str = "mnist5k"
    """Images to learn: mnist5k, mnist, fashion_mnist, kmnist, cifar10, svhn, folder:PATH, parquet:PATH, synthetic."""
    data_root: str = "data"
    """Directory with the torchvision data sets (it holds MNIST/raw and the like); downloads go there."""
    steps: int = 2000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 128
    """Images per optimizer step over all processes and accumulated micro-batches."""
    accumulation: int = 1
    """Micro-batches that each process adds up per optimizer step, for batches that do not fit in memory."""
    learning_rate: float = 1e-3
    """Highest learning rate of the schedule."""
    seed: int = 0
    """Key of all randomness: initial weights, order of the images, noise. 0 to 2^63 - 1."""
    precision: Precision = "auto"
    """Arithmetic of the networks; losses are float32. `auto` is what `accelerate launch --mixed_precision` says, else
    bf16 on GPUs that have it, else float32."""
    compile: bool = False
    """Compile each phase with torch.compile."""
    device: Device = "auto"
    """Where to train; `auto` takes a GPU if there is one."""
    run_dir: str | None = None
    """Directory that the run writes to and resumes from. None is runs/PRESET."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and on SIGTERM or SIGINT."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    sample_every: int = 500
    """Steps between pictures of samples and reconstructions."""
    evaluate_every: int = 500
    """Steps between evaluations on the test split; one is also made at the end."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl; each is the mean over the steps since the line before."""
    wandb: WandbMode | None = None
    """Weights & Biases logging: disabled, offline or online. None takes $WANDB_MODE, else disabled."""
    packing: DataConfig = field(default_factory=DataConfig)
    network: Annotated[NetworkConfig, _ByKind()] = field(default_factory=MlpConfig)
    objective: Annotated[ObjectiveConfig, _ByKind()] = field(default_factory=VaeConfig)
    optimization: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _check_choices(self)
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
        """Where the run writes; `~` and `~user` at its start become the home directory.

        Raises:
            ConfigError: there is no such home directory.
        """
        if self.run_dir is None:
            return Path("runs") / self.preset
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
            ConfigError: the text is no JSON, or has unknown names or values of a wrong type or out of range.
        """
        from pydantic import ConfigDict, TypeAdapter, ValidationError  # 70 ms that only --config needs

        for cls in _config_classes():
            cls.__pydantic_config__ = ConfigDict(extra="forbid")
        try:
            return TypeAdapter(TrainConfig).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")  # pydantic's name for our own errors
            raise ConfigError(": ".join(filter(None, (source, place, message)))) from None


def _config_classes() -> tuple[Any, ...]:
    return (DataConfig, OptimizerConfig, TrainConfig, *get_args(NetworkConfig), *get_args(ObjectiveConfig))


def _check_choices(config: object) -> None:
    """Raise ConfigError if a field of some named choices has another value."""
    for name, hint in get_type_hints(type(config)).items():
        options = {hint, *get_args(hint)}
        choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
        value = getattr(config, name)
        if choices and value not in choices and not (value is None and NoneType in options):
            raise ConfigError(f"{name} {value!r} is not one of {', '.join(map(str, choices))}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} {value} is less than {least}")


def _finite_and_at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name} {value} is not a number of at least {least}")
