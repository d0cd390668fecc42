"""Named configs, a few lines each. `gen-dist train NAME` runs one; every option overrides its value."""

from dataclasses import replace

from gen_dist.config import (
    AutoencoderConfig,
    ConvConfig,
    DataConfig,
    DcganConfig,
    GanConfig,
    MlpConfig,
    OptimizerConfig,
    R3ganConfig,
    ResnetConfig,
    TrainConfig,
    VaeConfig,
    VaeGanConfig,
    WganGpConfig,
)
from gen_dist.errors import ConfigError

# Three epochs of 60,000 images. Tuned on full MNIST for the least time to a test negative ELBO of 105.6: a high rate
# that falls to 0, a shorter memory of squared gradients than Adam's usual one, for they change fast in so short a run,
# and the largest batch that needs no more images. The test split is a sixth of an epoch's images: looking at it in
# between, and not at the end alone, would cost more than all else that so short a run records.
_MNIST = TrainConfig(
    steps=940,
    global_batch_size=192,
    learning_rate=1e-2,
    checkpoint_every=470,
    sample_every=470,
    evaluate_every=940,
    optimization=OptimizerConfig(betas=(0.9, 0.98), warmup_steps=80, decay="linear"),
)

# Five epochs and three quarters of 60,000 images. Tuned on full MNIST for even shares of the digits. Noise does most
# for them: without it the discriminator tells 93 % of the images by details, mostly of the background, and says little
# of what is drawn.
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

PRESETS: dict[str, TrainConfig] = {
    "ae-mnist": replace(_MNIST, objective=AutoencoderConfig(), learning_rate=8e-3),
    "vae-mnist": _MNIST,
    "vae-conv-mnist": replace(_MNIST, network=ConvConfig(), learning_rate=3e-3),
    "beta-vae-mnist": replace(_MNIST, objective=VaeConfig(beta=4.0), network=MlpConfig(latent_dim=10)),
    "iwae-mnist": replace(
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
    "vae-2d-mnist": replace(
        _MNIST,
        steps=1400,
        evaluate_every=1400,
        learning_rate=6e-3,
        network=MlpConfig(hidden_sizes=(400, 200), latent_dim=2),
    ),
    "gan-mnist": replace(
        _MNIST_GAN,
        steps=10_000,
        learning_rate=2e-4,
        network=MlpConfig(hidden_sizes=(512, 256), activation="leaky_relu", latent_dim=64),
        objective=GanConfig(),
    ),
    "cgan-mnist": replace(
        _MNIST_GAN,
        steps=4600,
        learning_rate=4e-4,
        objective=GanConfig(conditioning="concat", instance_noise=0.3),
        optimization=OptimizerConfig(betas=(0.5, 0.999), decay="linear", ema_decay=0.999),
    ),
    "dcgan-mnist": _MNIST_GAN,
    "dcgan-64": replace(
        _MNIST_GAN,
        steps=5000,
        data="cifar10",
        packing=DataConfig(image_size=64),
        learning_rate=2e-4,
        network=DcganConfig(),
        objective=GanConfig(),
        optimization=OptimizerConfig(betas=(0.5, 0.999)),
    ),
    "wgan-gp-mnist": replace(
        _MNIST_GAN,
        steps=10_000,
        learning_rate=2e-4,
        network=DcganConfig(feature_maps=32, latent_dim=64, discriminator_norm="none"),
        objective=WganGpConfig(),
        optimization=OptimizerConfig(betas=(0.0, 0.9), ema_decay=0.999),
    ),
    "sngan-cifar10": replace(
        _CIFAR10_GAN,
        network=ResnetConfig(generator_norm="batch", spectral_norm=True),
        objective=GanConfig(loss="hinge", generator_every=5),
    ),
    "r3gan-mnist": replace(
        _MNIST_GAN,
        steps=4200,
        learning_rate=7e-4,
        network=DcganConfig(feature_maps=32, latent_dim=64, discriminator_norm="group"),
        objective=R3ganConfig(penalty_weight=0.2, penalty_every=8, instance_noise=0.4),
        optimization=OptimizerConfig(betas=(0.0, 0.99), decay="linear", ema_decay=0.999),
    ),
    "r3gan-cifar10": replace(
        _CIFAR10_GAN,
        network=ResnetConfig(block="r3gan", feature_maps=(64, 128, 256, 256), blocks=1, latent_dim=64),
        objective=R3ganConfig(penalty_weight=0.05, augmentation=("colour", "translation", "cutout")),
        optimization=OptimizerConfig(betas=(0.0, 0.99), ema_decay=0.999),
    ),
    "vae-gan-mnist": replace(_MNIST_GAN, objective=VaeGanConfig()),
}
"""Presets by name."""

DESCRIPTIONS: dict[str, str] = {
    "ae-mnist": "autoencoder 784-400-20: reconstructs, cannot generate",
    "vae-mnist": "variational autoencoder 784-400-20, the textbook's net",
    "vae-conv-mnist": "the same with Conv2d encoder and ConvTranspose2d decoder",
    "beta-vae-mnist": "KL term weighted by 4: fewer, more separate latents",
    "iwae-mnist": "784-200-200-50, tanh, dynamic binarization; --importance-samples K",
    "vae-2d-mnist": "two latents, for a picture of the whole manifold",
    "gan-mnist": "fully connected GAN, the textbook's: LeakyReLU, logits loss, tanh",
    "cgan-mnist": "conditional convolutional GAN: choose the digit",
    "dcgan-mnist": "strided convolutions and batch normalization, 28 x 28",
    "dcgan-64": "the DCGAN of PyTorch's examples, 64 x 64, for comparison",
    "wgan-gp-mnist": "Wasserstein GAN with gradient penalty, 5 critic steps a generator step",
    "sngan-cifar10": "residual GAN with hinge loss and spectral normalization",
    "r3gan-mnist": "relativistic pairing GAN with R1 and R2 penalties",
    "r3gan-cifar10": "the same without normalization, on residual blocks of grouped convolutions",
    "vae-gan-mnist": "VAE whose reconstructions are compared in a discriminator's features",
}
"""What each preset is, in one line."""

PRESETS = {name: replace(config, preset=name) for name, config in PRESETS.items()}


def get_preset(name: str) -> TrainConfig:
    """The config of a preset.

    Raises:
        ConfigError: there is none of that name; lists those there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
