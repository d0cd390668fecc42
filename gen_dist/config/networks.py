"""Configs of the networks, by kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from tyro.conf import Suppress

from gen_dist.config.checked import Checked, at_least
from gen_dist.config.data import FORMS, Form
from gen_dist.errors import ConfigError
from gen_dist.plugins.registry import Registry

Activation = Literal["relu", "tanh", "leaky_relu", "silu"]
Norm = Literal["batch", "group", "none"]
RoleName = Literal["encoder", "decoder", "generator", "discriminator"]
PerceptualFeatures = Literal["efficientnet-lite0", "vgg16"]
"""Frozen networks of perceptual distances; see `gen_dist.networks.perceptual`."""
TO_OUTPUTS: tuple[RoleName, ...] = ("encoder", "discriminator")
"""Roles whose networks are of a config's `encoder` class."""
TO_IMAGES: tuple[RoleName, ...] = ("decoder", "generator")
"""Roles whose networks are of a config's `decoder` class."""
USUAL_SIDES: Mapping[str, tuple[RoleName, ...]] = {
    "latent_dim": ("encoder", *TO_IMAGES),
    "generator_norm": TO_IMAGES,
    "discriminator_norm": TO_OUTPUTS,
    "spectral_norm": TO_OUTPUTS,
}
"""Roles whose networks these options change in each kind of this package, as its `one_sided`."""


@dataclass(frozen=True)
class NetworkConfig(Checked):
    """Base of the networks' configs, which `networks` lists by kind.

    A network has four roles: encoder, decoder, generator and discriminator. Encoder and discriminator are instances of
    its `encoder` class, decoder and generator of its `decoder` class.
    """

    kind: Suppress[str] = ""
    encoder: ClassVar[str]
    """Class from images to outputs, as `module:Class`; see `gen_dist.networks.base.Encoder`."""
    decoder: ClassVar[str]
    """Class from latents to images, as `module:Class`; see `gen_dist.networks.base.Decoder`."""
    unbounded_images: ClassVar[bool] = False
    """True if generated images are the generator's last layer as it is, without the tanh of other GANs."""
    forms: ClassVar[tuple[Form, ...]] = ("images",)
    """Forms of data that it takes: signals are [B, C, 1, L], vectors [B, D, 1, 1]."""
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = {}
    """Roles whose networks an option changes. An option that is not named here changes those of all roles."""
    latent_dim: int = 20
    """Number of latents; of their channels, if each has a place in the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("latent_dim", self.latent_dim, 1)

    def changes(self, option: str, role: RoleName) -> bool:
        """Return True if the network of a role depends on this option."""
        known = any(one.name == option for one in dataclasses.fields(self))
        return known and role in self.one_sided.get(option, (*TO_OUTPUTS, *TO_IMAGES))

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of one image's latents: (D,) for a vector. A network whose latents have places returns (C, h, w).

        Its encoder then gives [B, outputs, h, w], and its decoder takes [B, inputs, h, w].

        Args:
            image_shape: (C, H, W) of the images.

        Raises:
            ConfigError: the network does not fit the images.
        """
        return (self.latent_dim,)


networks = Registry("network", NetworkConfig, "gen_dist.networks")
"""Configs of networks by kind."""


def smallest_sides(feature_maps: Sequence[int], image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the smallest map of a network that halves both sides between its resolutions.

    Args:
        feature_maps: channels at each resolution, that of the image first.
        image_shape: (C, H, W) of the images.

    Raises:
        ConfigError: a halving would have a remainder; the line names sizes that have none.
    """
    height, width = image_shape[1:]
    levels = len(feature_maps)
    step = 2 ** (levels - 1)
    if height % step or width % step:
        rounded = [
            (max(step, width // step * step), max(step, height // step * step)),
            (-(-width // step) * step, -(-height // step) * step),
        ]
        nearest = " or ".join(dict.fromkeys(str(w) if w == h else f"{w}x{h}" for w, h in rounded))
        # The largest power of two that divides both sides gives the number of halvings.
        halvings = (math.gcd(height, width) & -math.gcd(height, width)).bit_length() - 1
        fewer = f", or --feature-maps with {halvings + 1} numbers at most" if halvings else ""
        raise ConfigError(
            f"{levels} feature_maps halve both sides of an image {levels - 1} times, which {height} x {width} do not "
            f"allow; use --image-size {nearest}{fewer}"
        )
    return height // step, width // step


@dataclass(frozen=True)
class Roles:
    """The network of each role; an objective builds those that it has."""

    encoder: NetworkConfig
    decoder: NetworkConfig
    generator: NetworkConfig
    discriminator: NetworkConfig

    @classmethod
    def all_of(cls, network: NetworkConfig) -> Self:
        """One network for every role."""
        return cls(network, network, network, network)

    def latent_shape(self, decoder: RoleName, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of the latents that a decoder or generator takes.

        Raises:
            ConfigError: the network does not fit the images.
        """
        config: NetworkConfig = getattr(self, decoder)
        return config.latent_shape(image_shape)

    def shared_latent_shape(self, decoder: RoleName, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of the latents between the encoder and a decoder or generator.

        Raises:
            ConfigError: the two differ in it, or a network does not fit the images.
        """
        given, taken = self.encoder.latent_shape(image_shape), self.latent_shape(decoder, image_shape)
        if given != taken:
            raise ConfigError(
                f"the encoder gives latents of {' x '.join(map(str, given))}, the {decoder} takes "
                f"{' x '.join(map(str, taken))}; set latent_dim of both, or use networks of one kind"
            )
        return given


@networks.register
@dataclass(frozen=True)
class MlpConfig(NetworkConfig):
    """Fully connected encoder and decoder; the decoder mirrors the encoder."""

    encoder: ClassVar[str] = "gen_dist.networks.mlp:MlpEncoder"
    decoder: ClassVar[str] = "gen_dist.networks.mlp:MlpDecoder"
    forms: ClassVar[tuple[Form, ...]] = FORMS
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = USUAL_SIDES
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
            at_least("hidden_sizes", size, 1)


@networks.register
@dataclass(frozen=True)
class ConvConfig(NetworkConfig):
    """Strided Conv2d encoder and ConvTranspose2d decoder, for any image size."""

    encoder: ClassVar[str] = "gen_dist.networks.conv:ConvEncoder"
    decoder: ClassVar[str] = "gen_dist.networks.conv:ConvDecoder"
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = USUAL_SIDES
    kind: Suppress[Literal["conv"]] = "conv"
    feature_maps: tuple[int, ...] = (32, 64)
    """Channels after each of the encoder's convolutions, which halve the sides; the decoder has them in reverse."""
    hidden_size: int = 256
    """Width of the fully connected layer between the convolutions and the latents."""
    activation: Activation = "relu"
    """Nonlinearity after each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("hidden_size", self.hidden_size, 1)
        if not self.feature_maps:
            raise ConfigError("feature_maps is empty; name at least one number")
        for count in self.feature_maps:
            at_least("feature_maps", count, 1)


@networks.register
@dataclass(frozen=True)
class DcganConfig(NetworkConfig):
    """Strided convolutions to a side of 4 to 7 pixels, and transposed ones back (Radford et al. 2016)."""

    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = {**USUAL_SIDES, "centred_hidden": TO_IMAGES}
    encoder: ClassVar[str] = "gen_dist.networks.dcgan:DcganEncoder"
    decoder: ClassVar[str] = "gen_dist.networks.dcgan:DcganDecoder"
    kind: Suppress[Literal["dcgan"]] = "dcgan"
    feature_maps: int = 64
    """Channels at half the image's side; each further halving doubles them."""
    hidden_size: int | None = None
    """Width of a fully connected layer between the smallest map and the score, and between the latents and that map, as
    in the networks of Chen et al. 2016 for digits: without it a score is a sum over places, and no layer sees the whole
    image. None has no such layer (Radford et al. 2016)."""
    centred_hidden: bool = False
    """Normalize that layer of the generator or decoder after its ReLU instead of before it, so that the mean of its
    outputs over the batch starts at 0. The mean that a ReLU leaves is the same for all latents: where a discriminator
    sees each image by itself, the generator learns along it first, and all samples become one image."""
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
        at_least("feature_maps", self.feature_maps, 1)
        if self.hidden_size is not None:
            at_least("hidden_size", self.hidden_size, 1)
        if self.centred_hidden and self.hidden_size is None:
            raise ConfigError("centred_hidden without a hidden layer; add --hidden-size 512 or --no-centred-hidden")
        if self.centred_hidden and self.generator_norm != "batch":
            raise ConfigError(
                f"centred_hidden goes with generator_norm batch, not {self.generator_norm}; use --generator-norm batch "
                "or --no-centred-hidden"
            )


@networks.register
@dataclass(frozen=True)
class ResnetConfig(NetworkConfig):
    """Residual blocks at each resolution, for generators and discriminators."""

    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = {**USUAL_SIDES, "conditional_norm": TO_IMAGES}
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
    conditional_norm: bool = False
    """Let the scale and shift of the generator's batch normalization depend on the class, which then enters the
    generator there alone (Miyato & Koyama 2018). Only with block sngan, and without classes it changes nothing."""
    attention_factor: int | None = None
    """Self-attention of both networks at this fraction of the image's side: 2 is half (Zhang et al. 2019). Only with
    block sngan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("blocks", self.blocks, 1)
        if self.block != "sngan" and (self.conditional_norm or self.attention_factor is not None):
            name = "conditional_norm" if self.conditional_norm else "attention_factor"
            raise ConfigError(f"{name} goes with block sngan, not {self.block}; leave it out, or use --block sngan")
        if self.conditional_norm and self.generator_norm != "batch":
            raise ConfigError(
                f"conditional_norm goes with generator_norm batch, not {self.generator_norm}; use --generator-norm "
                "batch"
            )
        if len(self.feature_maps) < 2:
            raise ConfigError(f"feature_maps {self.feature_maps} names fewer than two resolutions")
        factors = [2**level for level in range(1, len(self.feature_maps))]
        if self.attention_factor not in (None, *factors):
            raise ConfigError(f"attention_factor {self.attention_factor} is not one of {', '.join(map(str, factors))}")
        for count in self.feature_maps:
            at_least("feature_maps", count, 1)

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


@networks.register
@dataclass(frozen=True)
class Stylegan2Config(NetworkConfig):
    """Generator of modulated convolutions and residual discriminator of StyleGAN2 (Karras et al. 2020).

    The defaults are configuration F of the paper.
    """

    encoder: ClassVar[str] = "gen_dist.networks.stylegan2_discriminator:Stylegan2Encoder"
    decoder: ClassVar[str] = "gen_dist.networks.stylegan2:Stylegan2Decoder"
    unbounded_images: ClassVar[bool] = True
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = {
        **USUAL_SIDES,
        **dict.fromkeys(("style_dim", "mapping_layers", "mapping_rate", "noise"), TO_IMAGES),
        "minibatch_group": TO_OUTPUTS,
    }
    kind: Suppress[Literal["stylegan2"]] = "stylegan2"
    latent_dim: int = 512
    """Number of latents."""
    style_dim: int = 512
    """Width of the mapping network, and numbers in a style."""
    mapping_layers: int = 8
    """Fully connected layers from normalized latents to the style."""
    mapping_rate: float = 0.01
    """Learning rate of the mapping network, as a fraction of that of the other layers."""
    channel_base: int = 32768
    """A map of side S has channel_base / S channels."""
    channel_max: int = 512
    """Largest number of channels of a map."""
    noise: Literal["keyed", "fixed"] = "keyed"
    """Noise inputs of the generator in training: `keyed` draws them for each image, `fixed` has one map for all.
    Samples of a trained model have the fixed maps, so that latents alone decide an image."""
    minibatch_group: int = 4
    """Images in a row of the global batch whose standard deviation is one more map of the discriminator. 1 has no such
    map. It has to divide the images of every micro-batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("style_dim", "mapping_layers", "channel_base", "channel_max", "minibatch_group"):
            at_least(name, getattr(self, name), 1)
        if not (math.isfinite(self.mapping_rate) and self.mapping_rate > 0):
            raise ConfigError(f"mapping_rate {self.mapping_rate} is not a positive number")

    def channels(self, side: int) -> int:
        """Channels of a map with this shorter side."""
        return max(1, min(self.channel_max, self.channel_base // side))


@networks.register
@dataclass(frozen=True)
class AutoencoderKlConfig(NetworkConfig):
    """Residual encoder and decoder of latent diffusion models (Rombach et al. 2022, appendix G): latents [C, h, w].

    Its weights have the names and shapes of AutoencoderKL in diffusers.
    """

    encoder: ClassVar[str] = "gen_dist.networks.autoencoder_kl:AutoencoderKlEncoder"
    decoder: ClassVar[str] = "gen_dist.networks.autoencoder_kl:AutoencoderKlDecoder"
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = USUAL_SIDES
    kind: Suppress[Literal["autoencoder-kl"]] = "autoencoder-kl"
    latent_dim: int = 4
    """Channels of the latents."""
    feature_maps: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each resolution, that of the image first; each next resolution has half the side. Published: 128
    times the multipliers 1, 2, 4, 4, so latents have an eighth of the image's side."""
    blocks: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    middle_attention: bool = True
    """Attention between the two blocks at the smallest resolution."""
    attention_factors: tuple[int, ...] = ()
    """Also attention after each block at these fractions of the image's side: 16 is a sixteenth."""
    groups: int = 32
    """Groups of channels that are normalized together."""
    checkpointing: bool = False
    """Keep the inputs of some blocks alone for backward, which computes a few blocks again at a time: less memory,
    equal bits (with --compile, equal up to rounding)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("blocks", self.blocks, 1)
        at_least("groups", self.groups, 1)
        if not self.feature_maps:
            raise ConfigError("feature_maps is empty; name at least one number")
        for count in self.feature_maps:
            at_least("feature_maps", count, 1)
            if count % self.groups:
                divisor = math.gcd(*self.feature_maps)
                raise ConfigError(f"groups {self.groups} do not divide feature_maps {count}; use --groups {divisor}")
        factors = [2**level for level in range(len(self.feature_maps))]
        for factor in self.attention_factors:
            if factor not in factors:
                raise ConfigError(f"attention_factors {factor} is not one of {', '.join(map(str, factors))}")

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """See NetworkConfig."""
        return self.latent_dim, *smallest_sides(self.feature_maps, image_shape)


@networks.register
@dataclass(frozen=True)
class PatchganConfig(NetworkConfig):
    """Discriminator of overlapping patches: a map of logits (Isola et al. 2017, section 3.2.2)."""

    encoder: ClassVar[str] = "gen_dist.networks.patchgan:PatchganEncoder"
    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = USUAL_SIDES
    kind: Suppress[Literal["patchgan"]] = "patchgan"
    feature_maps: int = 64
    """Channels after the first convolution; each further one doubles them, up to eight times as many."""
    layers: int = 3
    """Convolutions of stride 2; two of stride 1 follow. With 3, a logit sees 70 x 70 pixels."""
    discriminator_norm: Norm = "batch"
    """Normalization, except in the first layer and the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("feature_maps", self.feature_maps, 1)
        at_least("layers", self.layers, 1)

    @property
    def decoder(self) -> str:  # type: ignore[override]
        """Refused: see NetworkConfig.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("patchgan is a discriminator alone; name it with --discriminator patchgan, not --network")

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of the map of logits, with `latent_dim` for its channels.

        Raises:
            ConfigError: the images are too small.
        """
        height, width = (side // 2**self.layers - 2 for side in image_shape[1:])
        if min(height, width) < 1:
            least = 3 * 2**self.layers
            fitting = (min(image_shape[1:]) // 3).bit_length() - 1
            fewer = f" or --discriminator.layers {fitting}" if fitting > 0 else ""
            raise ConfigError(
                f"patchgan with layers {self.layers} needs images of at least {least} x {least}, not "
                f"{image_shape[1]} x {image_shape[2]}; use --image-size {least}{fewer}"
            )
        return self.latent_dim, height, width
