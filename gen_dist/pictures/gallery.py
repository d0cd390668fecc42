"""Which pictures a run makes of its model, and from what; how they are drawn is in pictures.py and charts.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gen_dist.data import Dataset
from gen_dist.data.subsets import evenly_spaced
from gen_dist.inference import latent_walks
from gen_dist.inference.model import GenerativeModel
from gen_dist.pictures import charts
from gen_dist.pictures import grids as pictures
from gen_dist.pictures.curves import has_curves, save_curves
from gen_dist.records.run_paths import RunPaths

GRID_IMAGES = 64
GRID_CLASSES = 20
"""Rows of a conditional model's samples, one a class; of more classes, some spread over all are shown."""
GRID_COLUMNS = 8
MANIFOLD_SIDE = 20
TRAVERSAL_DIRECTIONS = 10
TRAVERSAL_STEPS = 11
SCATTER_IMAGES = 5000
INTERPOLATIONS = 8
INTERPOLATION_STEPS = 11


class Gallery:
    """Pictures of one run. The same latents and test images are shown each time, so that pictures compare."""

    def __init__(self, model: GenerativeModel, dataset: Dataset, run_path: Path) -> None:
        self._model = model
        self._dataset = dataset
        self._paths = RunPaths(run_path)

    def at_step(self, step: int) -> dict[str, Path]:
        """Samples from the prior and reconstructions of test images, as far as the model has them."""
        made: dict[str, Path] = {}
        if self._model.objective.generates:
            made["samples"] = self._place("samples", step)
            self._save_samples(made["samples"])
        if self._model.objective.encodes:
            made["reconstructions"] = self._place("reconstructions", step)
            originals = self._dataset.test.images[self._some_test_images(GRID_IMAGES)]
            reconstructions = self._model.reconstruct(torch.from_numpy(originals)).cpu().numpy()
            pictures.save_reconstructions(made["reconstructions"], originals, reconstructions)
        return made

    def at_end(self, records: list[dict[str, Any]]) -> dict[str, Path]:
        """The latent space by images and by classes, and the charts of what the records of metrics.jsonl have."""
        made: dict[str, Path] = {}
        if has_curves(records):
            made["curves"] = self._paths.final_pictures["curves"]
            save_curves(made["curves"], records)
        if any(charts.has_class_shares(record, self._dataset.class_names) for record in records):
            made["class_shares"] = self._paths.final_pictures["class_shares"]
            charts.save_class_shares(made["class_shares"], records, self._dataset.class_names)
        if any(charts.has_scores(record) for record in records):
            made["scores"] = self._paths.final_pictures["scores"]
            charts.save_scores(made["scores"], records)
        if self._model.objective.generates:
            made["interpolations"] = self._paths.final_pictures["interpolations"]
            self._save_interpolations(made["interpolations"])
        if self._model.objective.encodes:
            made |= self._of_posterior()
        return made

    def _save_samples(self, path: Path) -> None:
        """Samples from the prior; of a conditional model a row for each class."""
        if not self._model.conditional:
            pictures.save_grid(path, self._model.sample(GRID_IMAGES).cpu().numpy(), GRID_COLUMNS)
            return
        classes = self._some_classes(GRID_CLASSES)
        samples = self._model.sample(len(classes) * GRID_COLUMNS, torch.from_numpy(classes.repeat(GRID_COLUMNS)))
        captions = [self._dataset.class_names[label] for label in classes]
        pictures.save_grid(path, samples.cpu().numpy(), GRID_COLUMNS, captions)

    def _save_interpolations(self, path: Path) -> None:
        """Walks between latents of the prior; of a conditional model each within one class."""
        ends = self._model.prior_latents(2 * INTERPOLATIONS).cpu().numpy()
        walks = latent_walks.great_circles(ends[::2], ends[1::2], INTERPOLATION_STEPS)
        latents = torch.from_numpy(walks)
        title = "walks between latents of the prior, along great circles"
        if not self._model.conditional:
            images = self._model.images(latents)
            captions = None
        else:
            classes = np.resize(self._some_classes(INTERPOLATIONS), INTERPOLATIONS)
            images = self._model.images(latents, torch.from_numpy(classes.repeat(INTERPOLATION_STEPS)))
            captions = [self._dataset.class_names[label] for label in classes]
        pictures.save_strips(path, images.cpu().numpy(), INTERPOLATION_STEPS, captions, title)

    def _of_posterior(self) -> dict[str, Path]:
        """Posterior means by class, and what latents among them decode to."""
        made: dict[str, Path] = {}
        shown = self._some_test_images(SCATTER_IMAGES)
        test = self._dataset.test
        means = self._model.encode(torch.from_numpy(test.images[shown]))[0].cpu().numpy()
        made["latent_scatter"] = self._paths.final_pictures["latent_scatter"]
        charts.save_scatter(made["latent_scatter"], means, test.labels[shown], self._dataset.class_names)
        made["latent_manifold"] = self._paths.final_pictures["latent_manifold"]
        self._save_manifold(made["latent_manifold"], means)
        return made

    def _save_manifold(self, path: Path, means: np.ndarray) -> None:
        """With two latents and a prior the whole plane, else walks along the principal posterior directions."""
        if self._model.objective.latent_dim == 2 and self._model.objective.generates:
            latents = latent_walks.manifold_latents(MANIFOLD_SIDE, MANIFOLD_SIDE)
            images = self._model.images(torch.from_numpy(latents)).cpu().numpy()
            title = "decoded latents at equal steps of prior probability"
            pictures.save_manifold(path, images, MANIFOLD_SIDE, title)
            return
        latents, shares = latent_walks.principal_traversals(means, TRAVERSAL_DIRECTIONS, TRAVERSAL_STEPS)
        images = self._model.images(torch.from_numpy(latents)).cpu().numpy()
        captions = [f"direction {row + 1}, {share:.0%} of variance" for row, share in enumerate(shares)]
        title = "walks along the principal directions of the posterior means, -2.5 to +2.5 standard deviations"
        pictures.save_strips(path, images, TRAVERSAL_STEPS, captions, title)

    def _some_classes(self, count: int) -> np.ndarray:
        """Labels of up to `count` classes, spread over all."""
        classes = len(self._dataset.class_names)
        return evenly_spaced(min(count, classes), classes)

    def _some_test_images(self, count: int) -> np.ndarray:
        """Places of up to `count` test images, spread over the split."""
        available = len(self._dataset.test.images)
        return evenly_spaced(min(count, available), available)

    def _place(self, series: str, step: int) -> Path:
        self._paths.picture_series[series].mkdir(exist_ok=True)
        return self._paths.picture(series, step)
