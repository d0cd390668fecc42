"""Fitting of a prior to a trained model's latents of training images, for `gen-dist fit-prior`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gen_dist.data import Split
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import ConfigError, UserError, number_of
from gen_dist.inference.fitted_prior import FittedPrior, networks_digest, write_fitted_prior
from gen_dist.inference.latent_rows import rows_at_once
from gen_dist.inference.latent_walks import MOST_DIRECTIONS, principal_directions
from gen_dist.inference.loading import home_of, model_of, read_checkpoint
from gen_dist.inference.model import GenerativeModel
from gen_dist.kernels import Key, normal
from gen_dist.randomness import Stream
from gen_dist.records.checkpoint import is_checkpoint
from gen_dist.records.run_data import open_run_data
from gen_dist.records.run_mark import is_run
from gen_dist.records.run_paths import RunPaths, WhichCheckpoint

COMPONENTS = 50
MOST_IMAGES = 50_000
"""Training images whose latents are used, spread over the split."""
MOST_OF_LARGE = 4000
"""The same for latents of more than `MOST_DIRECTIONS` numbers, whose directions come from the latents themselves."""
MIXED = 64
"""Most principal components that the mixture is of; those after them are independent."""
IMAGES_PER_COMPONENT = 20
"""Images of a Gaussian at least, for its covariance."""
_ITERATIONS = 200


def fit_prior(
    run: Path,
    components: int = COMPONENTS,
    *,
    data: str | None = None,
    data_root: str | None = None,
    device: str = "cpu",
    checkpoint: WhichCheckpoint = "newest",
    announce: Callable[[str], None] = print,
) -> Path:
    """Fit a prior to the latents of training images and write it in the run directory; returns its file.

    Latents are draws of the posteriors, keyed, or what the encoder gives where there is none. Equal weights and data
    give an equal prior.

    Args:
        run: run directory, or one checkpoint in it.
        components: Gaussians of the mixture. Fewer are fitted to few images, with a line.
        data: where the data are now, if they have moved since the run.
        data_root: directory with torchvision's data sets, if it has moved since the run.
        device: where to encode.
        checkpoint: that of a run directory: the newest whole one, or the best that the run keeps.
        announce: takes lines on what is fitted.

    Raises:
        ConfigError: a checkpoint is not in a run directory.
        UserError: the model has no encoder, its latents are codes or not finite, or there are too few images.
        CheckpointError: there is no run or checkpoint, or the prior cannot be written.
        DataError: the data are missing or others.
    """
    if components < 1:
        raise ConfigError(f"components {components} is less than 1")
    if is_checkpoint(run) and not is_run(home_of(run)):
        raise ConfigError(
            f"{run} is a checkpoint outside of a run, so its fitted prior would have no place; name the run directory, "
            "or one of its checkpoints"
        )
    read, config = read_checkpoint(run, announce, checkpoint)
    if reason := config.objective.lacks.get("encoder"):
        raise UserError(f"a prior is fitted to latents of images: {reason}; leave it out")
    digest = read.facts["data_digest"]
    model = model_of(read, config, device)
    if model.objective.codebook_size:
        raise UserError("a mixture of Gaussians draws no codes, and the latents of this model are codes of a codebook")
    train = open_run_data(run, config, announce, digest=digest, data=data, data_root=data_root).train.sample
    latents = latents_of(model, train)
    most = max(1, len(latents) // IMAGES_PER_COMPONENT)
    if components > most:
        announce(f"{components} Gaussians need {components * IMAGES_PER_COMPONENT:,} images: {most} are fitted")
    prior = fitted(
        latents.flatten(1),
        min(components, most),
        {"step": str(read.step), "weights": networks_digest(model.objective.networks)},
        config.seed,
    )
    file = RunPaths(home_of(run)).fitted_prior
    write_fitted_prior(file, prior)
    announce(prior.told)
    return file


def latents_of(model: GenerativeModel, train: Split) -> Tensor:
    """Latents of up to `MOST_IMAGES` training images, float32 [N, *latent_shape] on the CPU.

    Raises:
        UserError: they are not finite, or there are fewer than two images.
    """
    width = int(np.prod(model.objective.latent_shape))
    total = len(train.labels)
    rows = evenly_spaced(min(total, MOST_IMAGES if width <= MOST_DIRECTIONS else MOST_OF_LARGE), total)
    if total < 2:
        raise UserError(f"the training split has {number_of(total, 'image')}: too few to fit a prior to")
    size = rows_at_once(model).rows
    parts = []
    for first in tqdm(range(0, len(rows), size), desc="encoding", unit="batch", leave=False, disable=None):
        images = torch.from_numpy(train.images[rows[first : first + size]])
        mean, logvar = model.encode(images)
        mean = mean.cpu()
        if logvar is not None:
            key = Key(torch.tensor([model.config.seed, 0]), Stream.FITTED_LATENTS, first)
            noise = normal(key, len(mean), width).view_as(mean)
            mean = mean + (logvar.cpu() / 2).exp() * noise
        parts.append(mean)
    latents = torch.cat(parts)
    if not bool(torch.isfinite(latents).all()):
        raise UserError("the model's latents are not finite: its training has diverged; name an earlier checkpoint")
    return latents


def fitted(latents: Tensor, components: int, facts: dict[str, str], seed: int) -> FittedPrior:
    """A mixture of so many Gaussians, fitted to latents [N, D] by expectation maximization (scikit-learn)."""
    from sklearn.mixture import GaussianMixture

    wide = latents.double().numpy()
    centre, directions, deviations, _ = principal_directions(wide)
    kept = min(len(directions), MOST_DIRECTIONS, max(1, int((deviations > 1e-9 * max(deviations[0], 1e-300)).sum())))
    directions, deviations = directions[:kept], deviations[:kept]
    mixed = min(kept, MIXED)
    scale = max(float(deviations[0]), 1e-12)
    points = (wide - centre) @ directions[:mixed].T / scale  # the library's tolerances are of numbers near 1
    mixture = GaussianMixture(
        components, covariance_type="full", reg_covar=1e-6, max_iter=_ITERATIONS, random_state=seed % 2**32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged: 200 iterations do
        mixture.fit(points)
    return FittedPrior(
        weights=torch.from_numpy(mixture.weights_ / mixture.weights_.sum()),
        means=torch.from_numpy(mixture.means_ * scale),
        factors=torch.from_numpy(np.linalg.cholesky(mixture.covariances_) * scale),
        centre=torch.from_numpy(centre),
        directions=torch.from_numpy(directions.copy()),
        deviations=torch.from_numpy(deviations[mixed:].copy()),
        facts=facts | {"images": str(len(latents)), "components": str(components)},
    )
