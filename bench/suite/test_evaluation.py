"""Cost of evaluating a model: `python -m pytest bench/suite/test_evaluation.py`.

bench/costs/evaluation_cost.py times whole evaluations of trained runs, by stages.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.measuring.measured import Measurement, preset_on
from gen_dist.data import Dataset
from gen_dist.evaluation.features import feature_network
from gen_dist.evaluation.marginal_likelihood import negative_log_likelihoods
from gen_dist.evaluation.metrics import frechet, kernel, neighbours
from gen_dist.objectives import Batch
from gen_dist.objectives.evaluating import evaluating
from gen_dist.objectives.vae import Vae
from gen_dist.parallel.processes import start_processes
from gen_dist.training.trainer import Trainer

SAMPLES = 2000
ROUNDS = 5
NLL_IMAGES, NLL_SAMPLES = 4, 5000


@pytest.fixture(scope="module")
def features(digits: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """The digit network's features of two sets of digits, both [2,000, F]."""
    network = feature_network("digits", device)
    with torch.no_grad():
        first, second = (
            network.of_images(torch.from_numpy(digits.train.images[start : start + SAMPLES].copy()).to(device))[0]
            for start in (0, SAMPLES)
        )
    return first, second


@pytest.fixture
def trainer(digits: Dataset, device: torch.device) -> Trainer:
    """Untrained trainer of `vae-mnist`: the cost of a metric does not depend on the model's quality."""
    config = preset_on("vae-mnist", device)
    return Trainer(config, digits, start_processes(config))


def test_features(measurement: Measurement, digits: Dataset, device: torch.device) -> None:
    """The digit network on 2,000 images."""
    network = feature_network("digits", device)
    images = torch.from_numpy(digits.train.images[:SAMPLES].copy()).to(device)
    with torch.no_grad():
        measurement.time(lambda: network.of_images(images), rounds=ROUNDS, images=SAMPLES)


@pytest.mark.parametrize("metric", ["fid", "kid", "prdc"])
def test_distance(measurement: Measurement, metric: str, features: tuple[Tensor, Tensor]) -> None:
    """Distance of 2,000 samples' features to as many test images', including the statistics of the test images."""
    distances: dict[str, Callable[[Tensor, Tensor], object]] = {"fid": fid, "kid": kid, "prdc": prdc}
    measurement.time(lambda: distances[metric](*features), rounds=ROUNDS, images=SAMPLES)


def test_negative_elbo(measurement: Measurement, trainer: Trainer, digits: Dataset) -> None:
    """`vae-mnist` on the test split."""
    split = digits.test
    measurement.time(lambda: trainer.evaluate(split), rounds=ROUNDS, warmup_rounds=2, images=len(split.images))


def test_importance_sampled_nll(
    measurement: Measurement, trainer: Trainer, digits: Dataset, device: torch.device
) -> None:
    """`vae-mnist`, 5,000 latents an image."""
    images = torch.from_numpy(digits.test.images[:NLL_IMAGES].copy()).to(device)
    labels = torch.from_numpy(digits.test.labels[:NLL_IMAGES].copy()).to(device)
    batch = Batch(images, labels, torch.tensor([0, 0], device=device), 0)
    with evaluating(trainer.best_objective) as objective:
        assert isinstance(objective, Vae)
        measurement.time(
            lambda: negative_log_likelihoods(objective, batch, NLL_SAMPLES), rounds=ROUNDS, images=NLL_IMAGES
        )


def fid(real: Tensor, fake: Tensor) -> float:
    """Frechet distance."""
    return frechet.frechet_distance(frechet.moments(real), frechet.moments(fake))


def kid(real: Tensor, fake: Tensor) -> float:
    """Kernel distance."""
    first, second = (kernel.self_kernel_sum(points, points) for points in (real, fake))
    return kernel.squared_mmd(first, second, kernel.kernel_sum(real, fake), (len(real), len(fake)))


def prdc(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Precision, recall, density, coverage."""
    radii = [neighbours.neighbour_radii(points, 0, len(points)) for points in (real, fake)]
    return neighbours.ball_counts(real, radii[0], fake, radii[1]).metrics(len(real))
