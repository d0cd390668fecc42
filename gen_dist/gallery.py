"""Which pictures a run makes of its model, and from what; how they are drawn is in pictures.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gen_dist import pictures
from gen_dist.data import Dataset
from gen_dist.model import GenerativeModel

GRID_IMAGES = 64
MANIFOLD_SIDE = 20
TRAVERSAL_DIRECTIONS = 10
TRAVERSAL_STEPS = 11
SCATTER_IMAGES = 5000


class Gallery:
    """Pictures of one run. The same latents and test images are shown each time, so that pictures compare."""

    def __init__(self, model: GenerativeModel, dataset: Dataset, run_path: Path) -> None:
        self._model = model
        self._dataset = dataset
        self._run_path = run_path

    def at_step(self, step: int) -> dict[str, Path]:
        """Samples from the prior and reconstructions of test images, as far as the model has them."""
        made: dict[str, Path] = {}
        name = f"step_{step:08d}.png"
        if self._model.objective.generates:
            made["samples"] = self._place("samples", name)
            pictures.save_grid(made["samples"], self._model.sample(GRID_IMAGES).cpu().numpy())
        if self._model.objective.encodes:
            made["reconstructions"] = self._place("reconstructions", name)
            originals = self._dataset.test.images[self._spread(GRID_IMAGES)]
            reconstructions = self._model.reconstruct(torch.from_numpy(originals)).cpu().numpy()
            pictures.save_reconstructions(made["reconstructions"], originals, reconstructions)
        return made

    def _spread(self, count: int) -> np.ndarray:
        """Places of some test images spread over the split: many sources are in order of their classes."""
        available = len(self._dataset.test.images)
        return np.arange(min(count, available)) * available // min(count, available)

    def _place(self, directory: str, name: str) -> Path:
        (self._run_path / directory).mkdir(exist_ok=True)
        return self._run_path / directory / name

    def at_end(self, records: list[dict[str, Any]]) -> dict[str, Path]:
        """The latent manifold, posterior means by class, and the curves of the records of metrics.jsonl."""
        made: dict[str, Path] = {}
        if records:
            made["curves"] = self._run_path / "curves.png"
            pictures.save_curves(made["curves"], records)
        if not self._model.objective.encodes:
            return made
        shown = self._spread(SCATTER_IMAGES)
        test = self._dataset.test
        means = self._model.encode(torch.from_numpy(test.images[shown]))[0].cpu().numpy()
        made["latent_scatter"] = self._run_path / "latent_scatter.png"
        pictures.save_scatter(made["latent_scatter"], means, test.labels[shown], self._dataset.class_names)
        made["latent_manifold"] = self._run_path / "latent_manifold.png"
        self._save_manifold(made["latent_manifold"], means)
        return made

    def _save_manifold(self, path: Path, means: np.ndarray) -> None:
        """With two latents and a prior the whole plane, else walks along the principal posterior directions."""
        if self._model.objective.latent_dim == 2 and self._model.objective.generates:
            latents = pictures.manifold_latents(MANIFOLD_SIDE, MANIFOLD_SIDE)
            columns, captions = MANIFOLD_SIDE, None
            title = "decoded latents at equal steps of prior probability"
        else:
            latents, shares = pictures.principal_traversals(means, TRAVERSAL_DIRECTIONS, TRAVERSAL_STEPS)
            columns = TRAVERSAL_STEPS
            captions = [f"direction {row + 1}, {share:.0%} of variance" for row, share in enumerate(shares)]
            title = "walks along the principal directions of the posterior means, -2.5 to +2.5 standard deviations"
        images = self._model.images(torch.from_numpy(latents)).cpu().numpy()
        pictures.save_manifold(path, images, columns, captions, title)
