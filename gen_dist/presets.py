"""Named configs. `gen-dist train NAME` trains one; every option overrides its value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gen_dist.config import (
    AutoencoderConfig,
    AutoencoderKlConfig,
    ConvConfig,
    DataConfig,
    DcganConfig,
    FastganConfig,
    GanConfig,
    LatentAutoencoderConfig,
    MlpConfig,
    OptimizerConfig,
    PatchganConfig,
    ProjectedConfig,
    R3ganConfig,
    ResnetConfig,
    ScheduleConfig,
    Stylegan2Config,
    TrainConfig,
    VaeConfig,
    VaeGanConfig,
    WganGpConfig,
    networks,
    objectives,
)
from gen_dist.errors import ConfigError
from gen_dist.plugins.tables import Table

_PRESETS: "Table[Preset]" = Table("preset")


@dataclass(frozen=True)
class Preset:
    """A named config and its expected result."""

    config: TrainConfig
    description: str
    """One line without a full stop."""
    expected: str | None = None
    """Result on the test split of full MNIST, or of 10,000 samples. None if not measured."""
    seconds: int | None = None
    """Training time on two CPU cores (AMD EPYC, family 25), without evaluation, pictures and checkpoints."""


def add_preset(
    name: str, config: TrainConfig, description: str, *, expected: str | None = None, seconds: int | None = None
) -> None:
    """Add a preset, also from a module that registers an objective or a network.

    Raises:
        ConfigError: the name is taken.
    """
    _PRESETS.add(name, Preset(replace(config, preset=name), description, expected, seconds))


def presets() -> Mapping[str, Preset]:
    """All presets by name, including those of modules that register their own objectives or networks."""
    objectives.configs(), networks.configs()  # imports such modules
    return _PRESETS.parts


def get_preset(name: str) -> TrainConfig:
    """Config of a preset.

    Raises:
        ConfigError: no preset has this name; the message lists all names.
    """
    if name not in _PRESETS.parts and name not in presets():
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(_PRESETS.parts)}")
    return _PRESETS.parts[name].config


# Three epochs of 60,000 images. Tuned on full MNIST for the least time to a test negative ELBO of 105.6: a high rate
# that falls to 0, a smaller beta2 than Adam's default, since squared gradients change fast in so short a run, and the
# largest batch that needs no more images. The test split is a sixth of an epoch's images: further evaluations than
# the one at the end would cost more than all else that so short a run records.
_MNIST = TrainConfig(
    steps=940,
    global_batch_size=192,
    learning_rate=1e-2,
    checkpoint_every=470,
    sample_every=470,
    evaluate_every=940,
    optimization=OptimizerConfig(betas=(0.9, 0.98), warmup_steps=80, decay="linear"),
)

# 5.75 epochs of 60,000 images. Without noise the discriminator classifies 93 % of the images by details, mostly of the
# background, and its gradient says little about the digit.
_MNIST_GAN = TrainConfig(
    steps=5400,
    global_batch_size=64,
    learning_rate=3e-4,
    checkpoint_every=800,
    sample_every=800,
    evaluate_every=800,
    network=DcganConfig(feature_maps=32, latent_dim=64),
    objective=GanConfig(instance_noise=0.6),
    optimization=OptimizerConfig(betas=(0.5, 0.999), ema_decay=0.999),
)

# Tuned on full MNIST by sweeps (gen_dist/README.md, "GANs on MNIST"). A layer that sees the whole digit matters most:
# without it a score is a sum over places, every stroke looks right, and a third of the digits are none. Noise falls to
# a half, so that the discriminator sees edges in the end. The rate is nearly three times as high, and falls to 0. The
# fully connected GAN wins by noise and rate as well.
_DIGITS_GAN = replace(
    _MNIST_GAN,
    steps=4000,
    learning_rate=8e-4,
    checkpoint_every=1000,
    sample_every=1000,
    evaluate_every=1000,
    network=DcganConfig(feature_maps=32, hidden_size=512, latent_dim=64),
    objective=GanConfig(instance_noise=0.4),
    optimization=OptimizerConfig(betas=(0.5, 0.999), decay="linear", ema_decay=0.999),
    schedule=ScheduleConfig(final_instance_noise=0.2),
)

_CIFAR10_GAN = replace(
    _MNIST_GAN,
    data="cifar10",
    steps=100_000,
    learning_rate=2e-4,
    checkpoint_every=2000,
    sample_every=2000,
    evaluate_every=2000,
    objective=GanConfig(),
    optimization=OptimizerConfig(betas=(0.0, 0.9), decay="linear", ema_decay=0.9999),
)

add_preset(
    "ae-mnist",
    replace(_MNIST, objective=AutoencoderConfig(), learning_rate=8e-3),
    "autoencoder 784-400-20: reconstructs, cannot generate",
    expected="reconstruction error 66.7 nats",
    seconds=7,
)
add_preset(
    "vae-mnist",
    _MNIST,
    "variational autoencoder 784-400-20, the textbook's network",
    expected="negative ELBO 105.4 nats",
    seconds=7,
)
add_preset(
    "vae-conv-mnist",
    replace(_MNIST, network=ConvConfig(), learning_rate=3e-3),
    "the same with Conv2d encoder and ConvTranspose2d decoder",
    expected="negative ELBO 107.5 nats",
    seconds=57,
)
add_preset(
    "beta-vae-mnist",
    replace(_MNIST, objective=VaeConfig(beta=4.0), network=MlpConfig(latent_dim=10)),
    "KL term weighted by 4: fewer, more separate latents",
    expected="negative ELBO 122.4 nats",
    seconds=9,
)
add_preset(
    "iwae-mnist",
    replace(
        _MNIST,
        steps=20000,
        global_batch_size=200,
        learning_rate=3e-3,
        checkpoint_every=1000,
        sample_every=2000,
        evaluate_every=1000,
        network=MlpConfig(hidden_sizes=(200, 200), activation="tanh", latent_dim=50),
        objective=VaeConfig(dynamic_binarization=True, gradient="path"),
        optimization=OptimizerConfig(warmup_steps=500, decay="cosine", epsilon=1e-4, ema_decay=0.999),
    ),
    "784-200-200-50, tanh, dynamic binarization; --importance-samples K",
    expected="negative ELBO 94.3 nats",
    seconds=183,
)
add_preset(
    "vae-2d-mnist",
    replace(
        _MNIST,
        steps=1400,
        evaluate_every=1400,
        learning_rate=6e-3,
        network=MlpConfig(hidden_sizes=(400, 200), latent_dim=2),
    ),
    "two latents, for a picture of the whole manifold",
    expected="negative ELBO 143.2 nats",
    seconds=12,
)
add_preset(
    "gan-mnist",
    replace(
        _DIGITS_GAN,
        steps=10_000,
        learning_rate=1e-3,
        network=MlpConfig(hidden_sizes=(512, 256), activation="leaky_relu", latent_dim=64),
    ),
    "the textbook's fully connected GAN: LeakyReLU, logits loss, tanh, and noise that falls",
)
add_preset(
    "cgan-mnist",
    replace(
        _DIGITS_GAN,
        steps=5600,
        checkpoint_every=1400,
        sample_every=1400,
        evaluate_every=1400,
        objective=GanConfig(conditioning="concat", instance_noise=0.3),
        schedule=ScheduleConfig(final_instance_noise=0.1),
    ),
    "conditional convolutional GAN: choose the digit",
    expected="99 % of the digits have the requested class, FID 0.14 in digit features",
    seconds=542,
)
add_preset(
    "dcgan-mnist",
    _DIGITS_GAN,
    "strided convolutions, a fully connected layer and batch normalization, 28 x 28",
    expected="FID 0.39 in digit features, precision 0.88, class imbalance 0.03",
    seconds=298,
)
add_preset(
    "dcgan-64",
    replace(
        _MNIST_GAN,
        steps=5000,
        data="cifar10",
        packing=DataConfig(image_size=64),
        learning_rate=2e-4,
        network=DcganConfig(),
        objective=GanConfig(),
        optimization=OptimizerConfig(betas=(0.5, 0.999)),
    ),
    "the DCGAN of PyTorch's examples, 64 x 64, for comparison",
)
add_preset(
    "wgan-gp-mnist",
    replace(
        _MNIST_GAN,
        steps=10_000,
        learning_rate=2e-4,
        network=DcganConfig(feature_maps=32, latent_dim=64, discriminator_norm="none"),
        objective=WganGpConfig(),
        optimization=OptimizerConfig(betas=(0.0, 0.9), ema_decay=0.999),
    ),
    "Wasserstein GAN with gradient penalty, 5 critic steps per generator step",
)
add_preset(
    "sngan-cifar10",
    replace(
        _CIFAR10_GAN,
        network=ResnetConfig(generator_norm="batch", spectral_norm=True),
        objective=GanConfig(loss="hinge", generator_every=5),
    ),
    "residual GAN with hinge loss and spectral normalization",
)
add_preset(
    "r3gan-mnist",
    replace(
        _DIGITS_GAN,
        steps=5000,
        learning_rate=1.8e-3,
        # Without centring, a hidden layer in the generator makes all samples one image, which a discriminator of single
        # images does not see (gen_dist/README.md, "GANs on MNIST").
        network=DcganConfig(feature_maps=48, hidden_size=256, centred_hidden=True, latent_dim=64),
        discriminator=DcganConfig(feature_maps=32, hidden_size=256, latent_dim=64, discriminator_norm="group"),
        objective=R3ganConfig(penalty_weight=0.01, penalty_every=8, instance_noise=0.3),
        optimization=OptimizerConfig(betas=(0.0, 0.9), decay="linear", ema_decay=0.999),
        schedule=ScheduleConfig(final_instance_noise=0.2),
    ),
    "relativistic pairing GAN with R1 and R2 penalties, without batch normalization in its discriminator",
    expected="FID 1.0 in digit features, precision 0.87, class imbalance 0.06",
    seconds=425,
)
add_preset(
    "r3gan-cifar10",
    replace(
        _CIFAR10_GAN,
        network=ResnetConfig(block="r3gan", feature_maps=(64, 128, 256, 256), blocks=1, latent_dim=64),
        objective=R3ganConfig(penalty_weight=0.05, augmentation=("colour", "translation", "cutout")),
        optimization=OptimizerConfig(betas=(0.0, 0.99), ema_decay=0.999),
    ),
    "the same without normalization, on residual blocks of grouped convolutions",
)
add_preset(
    "r3gan-cifar10-paper",
    # As the authors' configuration CIFAR10 (train.py in the code of Huang et al. 2024, and its README: batch 512,
    # mirrored images, classes): four resolutions of 768 channels with two blocks each, 20.7 million weights in the
    # generator and 20.7 million in the discriminator. Values go by half a cosine wave over 20 million images. Classes
    # enter our generator as one-hot latents, theirs through an embedding.
    replace(
        _CIFAR10_GAN,
        steps=39_063,
        global_batch_size=512,
        learning_rate=2e-4,
        augment=("flip",),
        network=ResnetConfig(block="r3gan", feature_maps=(768, 768, 768, 768), blocks=2, latent_dim=64),
        objective=R3ganConfig(
            conditioning="projection",
            penalty_weight=0.05,
            ada=("blit", "geometric", "colour", "cutout"),
            ada_probability=0.0,
            ada_colour=0.5,
        ),
        optimization=OptimizerConfig(betas=(0.0, 0.9)),
        schedule=ScheduleConfig(
            schedule_images=20_000_000,
            final_learning_rate=5e-5,
            final_beta2=0.99,
            final_ema_images=5_000_000,
            final_penalty_weight=0.005,
            final_ada_probability=0.55,
        ),
    ),
    "the recipe of the R3GAN paper with its schedules: for large GPUs",
)
add_preset(
    "stylegan2-cifar10",
    # Near the authors' configuration for CIFAR-10 (`cifar` in the code of Karras et al. 2020a): two mapping layers,
    # rate, R1 at every 16th step with lazy scaling, neither path lengths nor mixed styles. It has a quarter to a half
    # of their 512 channels; their discriminator has no residual connections, and compares 32 images in place of 4.
    replace(
        _CIFAR10_GAN,
        learning_rate=2.5e-3,
        network=Stylegan2Config(latent_dim=128, style_dim=128, mapping_layers=2, channel_base=4096, channel_max=256),
        objective=GanConfig(penalty_weight=0.01, penalty_every=16),
        optimization=OptimizerConfig(betas=(0.0, 0.99), lazy_scaling=True, ema_decay=0.999),
    ),
    "mapping network, modulated convolutions and noise inputs, with R1 penalties",
)
add_preset(
    "stylegan2-mnist",
    replace(
        _DIGITS_GAN,
        steps=5000,
        learning_rate=3e-3,
        network=Stylegan2Config(latent_dim=64, style_dim=64, mapping_layers=2, channel_base=512, channel_max=64),
        # The paper's discriminator lets all samples become one image in so few steps, with the authors' code as with
        # this one; batch normalization sees that they are alike at once. At the generator's rate it would learn too
        # fast (gen_dist/README.md, "StyleGAN2 on digits").
        discriminator=_DIGITS_GAN.network,
        objective=GanConfig(instance_noise=0.8),
        optimization=OptimizerConfig(
            betas=(0.0, 0.99), decay="linear", discriminator_rate_factor=0.04, ema_decay=0.999
        ),
        schedule=ScheduleConfig(final_instance_noise=0.3),
    ),
    "StyleGAN2's generator on digits, with the discriminator of dcgan-mnist at a lower rate",
    expected="FID 2.4 in digit features, precision 0.73, class imbalance 0.08",
    seconds=706,
)
_FEW_IMAGES = replace(
    _CIFAR10_GAN,
    data="folder:images",
    packing=DataConfig(image_size=64, channels=3),
    steps=20_000,
    global_batch_size=16,
    # Five times that of Sauer et al. 2021, whose runs are of millions of images: in thousands, images at their rate are
    # black and white blots (gen_dist/README.md, "A GAN of 1,000 horses").
    learning_rate=1e-3,
    augment=("flip",),
    network=FastganConfig(feature_maps=32),
    # Norm, loss, augmentation and betas as in their code, whose networks have two to four times the channels.
    discriminator=ProjectedConfig(feature_maps=16, discriminator_norm="batch"),
    objective=GanConfig(loss="hinge", augmentation=("colour", "translation", "cutout")),
    optimization=OptimizerConfig(betas=(0.0, 0.99), ema_decay=0.999),
)
add_preset(
    "few-images-64",
    _FEW_IMAGES,
    "hundreds of images of a folder: FastGAN's generator, a discriminator on pretrained features",
)
add_preset(
    "few-images-128",
    replace(_FEW_IMAGES, packing=DataConfig(image_size=128, channels=3)),
    "the same for images of 128 x 128",
)
add_preset(
    "vae-gan-mnist",
    replace(_MNIST_GAN, objective=VaeGanConfig()),
    "VAE with reconstructions compared in a discriminator's features",
)

# Ten epochs of the embedded digits' 4,000 training images.
_MNIST_LATENTS = replace(
    _MNIST,
    steps=1250,
    global_batch_size=32,
    learning_rate=2e-3,
    checkpoint_every=625,
    sample_every=625,
    evaluate_every=1250,
    network=AutoencoderKlConfig(feature_maps=(16, 32, 32), blocks=1, latent_dim=3, groups=8),
    objective=LatentAutoencoderConfig(),
    optimization=OptimizerConfig(betas=(0.9, 0.98), warmup_steps=80, decay="cosine"),
)

# The published recipe: betas and rate, which grows with the batch, as in the code of Rombach et al. 2022.
_LATENTS = replace(
    _MNIST_LATENTS,
    steps=500_000,
    global_batch_size=64,
    learning_rate=4.5e-6,
    checkpoint_every=5000,
    sample_every=5000,
    evaluate_every=25_000,
    data="folder:images",
    packing=DataConfig(image_size=256, channels=3),
    network=AutoencoderKlConfig(latent_dim=4),
    discriminator=PatchganConfig(),
    objective=LatentAutoencoderConfig(
        perceptual_weight=1.0, log_scale=None, adversarial_weight=0.5, adversarial_start=50_001
    ),
    optimization=OptimizerConfig(betas=(0.5, 0.9), rate_per_image=True, ema_decay=0.999),
)
_VQ = LatentAutoencoderConfig(
    bottleneck="vq",
    codebook_size=8192,
    codebook_update="gradient",
    # The published penalty is a mean over latents beside a mean over pixels; sums of both keep that ratio, 16.
    codebook_weight=16.0,
    perceptual_weight=1.0,
    adversarial_weight=0.75,
    adaptive_limit=1e4 * 3 * 256**2,
)
_CIFAR10_LATENTS = replace(
    _LATENTS,
    data="cifar10",
    packing=DataConfig(),
    steps=20_000,
    global_batch_size=32,
    learning_rate=1e-5,
    evaluate_every=5000,
    network=AutoencoderKlConfig(feature_maps=(32, 64, 128), latent_dim=4),
    discriminator=PatchganConfig(feature_maps=32, layers=2),
    objective=LatentAutoencoderConfig(adversarial_weight=0.5, adversarial_start=10_000),
)

add_preset(
    "kl-mnist",
    _MNIST_LATENTS,
    "latent autoencoder: a residual network to 3 x 7 x 7 latents with a small KL term",
)
add_preset(
    "vq-mnist",
    replace(_MNIST_LATENTS, objective=LatentAutoencoderConfig(bottleneck="vq", codebook_size=256)),
    "the same with 7 x 7 codes out of 256",
)
add_preset(
    "kl-f4-cifar10",
    _CIFAR10_LATENTS,
    "latents 4 x 8 x 8 of images of 32 x 32, with a discriminator of patches",
)
add_preset(
    "vq-f4-cifar10",
    replace(
        _CIFAR10_LATENTS,
        objective=LatentAutoencoderConfig(
            bottleneck="vq", codebook_size=1024, adversarial_weight=0.5, adversarial_start=10_000, adaptive_limit=1e8
        ),
    ),
    "8 x 8 codes out of 1,024",
)
add_preset(
    "kl-f8",
    _LATENTS,
    "the first stage of Stable Diffusion, for images of 256 x 256: latents 4 x 32 x 32",
)
add_preset(
    "kl-f4",
    replace(_LATENTS, network=AutoencoderKlConfig(feature_maps=(128, 256, 512), latent_dim=3)),
    "the same with latents 3 x 64 x 64",
)
add_preset(
    "vq-f4",
    replace(_LATENTS, network=AutoencoderKlConfig(feature_maps=(128, 256, 512), latent_dim=3), objective=_VQ),
    "the same with 64 x 64 codes out of 8,192",
)
