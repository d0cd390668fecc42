"""A generator that learns by pairs leaves out none of 25 modes."""

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
"""Of each mode, in levels of the 256."""
NEAR = 4 * DEVIATION
"""So near to a mode are 99.7 % of its images. Neighbouring modes are 120 levels apart, the nearest of all 117."""
SAMPLES = 10_000


def ring() -> NDArray[np.float64]:
    """The modes, [MODES, 4 pixels]: on a closed curve of radius 100 in two pixels, five times as fast in two more.

    In one plane they would be 25 levels apart on a circle, where a small network takes them for the circle itself for
    thousands of steps; a generator of the circle would be counted as one of all modes.
    """
    angles = 2 * np.pi * np.arange(MODES) / MODES
    waves = [wave(turns * angles) for turns in (1, 5) for wave in (np.cos, np.sin)]
    return 127.5 + 100.0 * np.stack(waves, axis=1)


def images_of_modes(count: int, seed: int) -> Split:
    """Images of 2 x 2 pixels, Gaussian about a mode drawn at random, which is their label."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, MODES, count)
    pixels = ring()[labels] + DEVIATION * chance.standard_normal((count, 4))
    return Split("modes", np.rint(pixels).clip(0, 255).astype(np.uint8).reshape(count, 1, 2, 2), labels)


def shares_of_modes(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Share of the images that are near each mode, [MODES]: their sum is the share that is near any."""
    distances = np.linalg.norm(images.reshape(-1, 1, 4).astype(np.float64) - ring(), axis=2)
    near = distances.min(axis=1) <= NEAR
    shares: NDArray[np.float64] = np.bincount(distances.argmin(axis=1)[near], minlength=MODES) / len(images)
    return shares


def modes_covered(shares: NDArray[np.float64]) -> int:
    """Modes with at least a quarter of their due."""
    return int((shares >= 0.25 / MODES).sum())


def test_real_images_cover_all_modes_and_those_that_leave_one_out_or_lie_between_them_do_not() -> None:
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
    _let_modes_be_told_apart(trainer)
    for step in range(config.steps):
        trainer.run_step(step)
    model = GenerativeModel(trainer.best_objective, config, dataset.image_shape, dataset.class_names)
    shares = shares_of_modes(model.sample(SAMPLES).numpy())
    trainer.close()
    assert modes_covered(shares) == MODES, shares
    assert shares.sum() > 0.7, shares.sum()


def _let_modes_be_told_apart(trainer: Trainer) -> None:
    """First layers that start with larger weights: a generator can then jump from mode to mode between latents."""
    generator, discriminator = (trainer.objective.networks[name] for name in ("generator", "discriminator"))
    assert isinstance(generator, Generator) and isinstance(generator.decoder, MlpDecoder)
    assert isinstance(discriminator, Discriminator) and isinstance(discriminator.encoder, MlpEncoder)
    with torch.no_grad():
        for layers, factor in ((generator.decoder.layers, 20.0), (discriminator.encoder.layers, 3.0)):
            weight = layers[0].weight
            assert isinstance(weight, torch.Tensor)
            weight.mul_(factor)
