"""Named configs, a few lines each. `launch/train.py NAME` runs one; every option overrides its value."""

from dataclasses import replace

from gen_dist.config import AutoencoderConfig, ConvConfig, MlpConfig, OptimizerConfig, TrainConfig, VaeConfig
from gen_dist.errors import ConfigError

# Three epochs of 60,000 images. Tuned on full MNIST for the least time to a test negative ELBO of 105.6: a high rate
# that falls to 0, a shorter memory of squared gradients than Adam's usual one, for they change fast in so short a run,
# and the largest batch that needs no more images.
_MNIST = TrainConfig(
    steps=940,
    global_batch_size=192,
    learning_rate=1e-2,
    checkpoint_every=235,
    sample_every=235,
    evaluate_every=235,
    optimization=OptimizerConfig(betas=(0.9, 0.98), warmup_steps=80, decay="linear"),
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
        objective=VaeConfig(dynamic_binarization=True),
        optimization=OptimizerConfig(warmup_steps=500, decay="cosine", epsilon=1e-4, ema_decay=0.999),
    ),
    "vae-2d-mnist": replace(
        _MNIST, steps=1400, learning_rate=6e-3, network=MlpConfig(hidden_sizes=(400, 200), latent_dim=2)
    ),
}
"""Presets by name."""

DESCRIPTIONS: dict[str, str] = {
    "ae-mnist": "autoencoder 784-400-20: reconstructs, cannot generate",
    "vae-mnist": "variational autoencoder 784-400-20, the textbook's net",
    "vae-conv-mnist": "the same with Conv2d encoder and ConvTranspose2d decoder",
    "beta-vae-mnist": "KL term weighted by 4: fewer, more separate latents",
    "iwae-mnist": "784-200-200-50, tanh, dynamic binarization; --importance-samples K",
    "vae-2d-mnist": "two latents, for a picture of the whole manifold",
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
