"""A generator with a pairing loss covers all of 25 modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gen_dist.config import MlpConfig, OptimizerConfig, R3ganConfig, TrainConfig
from gen_dist.data import Dataset, Split
from gen_dist.inference.model import GenerativeModel
from gen_dist.networks.mlp import MlpDecoder, MlpEncoder
from gen_dist.networks.players import Discriminator, Generator
from gen_dist.parallel.processes import start_processes
from gen_dist.training.trainer import Trainer

MODES = 25
DEVIATION = 3.0
"""Standard deviation of each mode, in pixel levels of 0..255."""
NEAR = 4 * DEVIATION
"""Distance to a mode within which 99.7 % of its images are. Neighbours are 120 levels apart, the nearest modes 117."""
SAMPLES = 10_000


def ring() -> NDArray[np.float64]:
    """Centres of the modes, [MODES, 4 pixels]: on a circle of radius 100 in two pixels, at five times the angle in two.

    On a circle in one plane they would be 25 levels apart. A small network learns the whole circle for thousands of
    steps there, and a generator of the circle would count as one of all modes.
    """
    angles = 2 * np.pi * np.arange(MODES) / MODES
    waves = [wave(turns * angles) for turns in (1, 5) for wave in (np.cos, np.sin)]
    return 127.5 + 100.0 * np.stack(waves, axis=1)


def images_of_modes(count: int, seed: int) -> Split:
    """Draw images of 2 x 2 pixels, Gaussian about a random mode, which is their label."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, MODES, count)
    pixels = ring()[labels] + DEVIATION * chance.standard_normal((count, 4))
    return Split("modes", np.rint(pixels).clip(0, 255).astype(np.uint8).reshape(count, 1, 2, 2), labels)


def shares_of_modes(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute the share of images near each mode, [MODES]. The sum is the share near any mode."""
    distances = np.linalg.norm(images.reshape(-1, 1, 4).astype(np.float64) - ring(), axis=2)
    near = distances.min(axis=1) <= NEAR
    shares: NDArray[np.float64] = np.bincount(distances.argmin(axis=1)[near], minlength=MODES) / len(images)
    return shares


def modes_covered(shares: NDArray[np.float64]) -> int:
    """Count the modes with at least a quarter of an equal share."""
    return int((shares >= 0.25 / MODES).sum())


def test_coverage_detects_missing_and_mixed_modes() -> None:
    split = images_of_modes(SAMPLES, seed=2)
    shares = shares_of_modes(split.images)
    assert modes_covered(shares) == MODES
    assert shares.sum() == pytest.approx(0.997, abs=0.003)
    assert modes_covered(shares_of_modes(split.images[split.labels != 7])) == MODES - 1
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, SAMPLES)
    curve = np.stack([wave(turns * angles) for turns in (1, 5) for wave in (np.cos, np.sin)], axis=1)
    assert modes_covered(shares_of_modes((127.5 + 100 * curve).astype(np.uint8))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pairing_covers_every_mode_of_a_ring(seed: int) -> None:
    config = TrainConfig(
        steps=4000,
        global_batch_size=256,
        learning_rate=3e-3,
        seed=seed,
        precision="float32",
        device="cpu",
        network=MlpConfig(hidden_sizes=(128, 128), activation="tanh", latent_dim=4),
        objective=R3ganConfig(penalty_weight=0.05),
        optimization=OptimizerConfig(betas=(0.5, 0.99), warmup_steps=20, decay="cosine", ema_decay=0.99),
    )
    train = images_of_modes(20_000, seed=0)
    dataset = Dataset(train, images_of_modes(1000, seed=1), tuple(map(str, range(MODES))), digest="modes")
    trainer = Trainer(config, dataset, start_processes(config))
    _separate_modes(trainer)
    for step in range(config.steps):
        trainer.run_step(step)
    model = GenerativeModel(trainer.best_objective, config, dataset.image_shape, dataset.class_names)
    shares = shares_of_modes(model.sample(SAMPLES).numpy())
    trainer.close()
    assert modes_covered(shares) == MODES, shares
    assert shares.sum() > 0.7, shares.sum()


def _separate_modes(trainer: Trainer) -> None:
    """Enlarge the initial weights of the first layers, so that near latents can be in different modes."""
    generator, discriminator = (trainer.objective.networks[name] for name in ("generator", "discriminator"))
    assert isinstance(generator, Generator) and isinstance(generator.decoder, MlpDecoder)
    assert isinstance(discriminator, Discriminator) and isinstance(discriminator.encoder, MlpEncoder)
    with torch.no_grad():
        for layers, factor in ((generator.decoder.layers, 20.0), (discriminator.encoder.layers, 3.0)):
            weight = layers[0].weight
            assert isinstance(weight, torch.Tensor)
            weight.mul_(factor)
