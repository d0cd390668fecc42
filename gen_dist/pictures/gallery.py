"""The pictures that a run makes of its model. grids.py, charts.py and curves.py draw them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gen_dist.config.labels import Row
from gen_dist.data import Dataset
from gen_dist.data.subsets import evenly_spaced
from gen_dist.inference import latent_walks
from gen_dist.inference.model import GenerativeModel, label_tensor
from gen_dist.pictures import charts, grids
from gen_dist.pictures.curves import has_curves, save_curves
from gen_dist.pictures.lettering import lettering_of
from gen_dist.pictures.plots import bar_of, tiles
from gen_dist.records.run_paths import RunPaths

GRID_IMAGES = 64
GRID_CLASSES = 20
"""Rows of samples of a conditional model, one a class. If there are more classes, some spread over all are shown."""
GRID_COLUMNS = 8
MANIFOLD_SIDE = 20
TRAVERSAL_DIRECTIONS = 10
TRAVERSAL_STEPS = 11
SCATTER_IMAGES = 5000
INTERPOLATIONS = 8
INTERPOLATION_STEPS = 11


class Gallery:
    """Pictures of one run. They always show the same latents and test images, so that they can be compared."""

    def __init__(self, model: GenerativeModel, dataset: Dataset, run_path: Path) -> None:
        self._model = model
        self._dataset = dataset
        self._paths = RunPaths(run_path)

    def at_step(self, step: int) -> dict[str, Path]:
        """Draw samples from the prior and reconstructions of test images, if the model has a prior or an encoder."""
        draw: dict[str, Callable[[Path], None]] = {}
        if self._model.objective.generates:
            draw["samples"] = self._save_samples
        if self._model.objective.encodes:
            draw["reconstructions"] = self._save_reconstructions
        made = {series: self._paths.picture(series, step) for series in draw}
        for series, path in made.items():
            path.parent.mkdir(exist_ok=True)
            draw[series](path)
        return made

    def at_end(self, records: list[dict[str, Any]]) -> dict[str, Path]:
        """Draw the charts of the records of metrics.jsonl, and the latent space by images and by classes."""
        class_names = self._dataset.class_names
        draw: dict[str, Callable[[Path], None]] = {}
        if has_curves(records):
            draw["curves"] = partial(save_curves, records=records, objective=self._model.objective.config)
        found = class_names[: self._dataset.labels.known_classes]  # no sample is found to be of an unknown one
        if any(charts.has_class_shares(record, found) for record in records):
            draw["class_shares"] = partial(charts.save_class_shares, records=records, class_names=found)
        if any(charts.has_scores(record) for record in records):
            draw["scores"] = partial(charts.save_scores, records=records)
        if self._model.objective.generates:
            draw["interpolations"] = self._save_interpolations
        if self._model.objective.encodes:
            test = self._dataset.test
            shown = self._some_test_images(SCATTER_IMAGES)
            means = self._model.encode(torch.from_numpy(test.images[shown]))[0].flatten(1).cpu().numpy()
            # Labels of other kinds have no colours: all points have that of one class.
            of_shown = test.labels[shown] if self._dataset.labels.kind == "classes" else np.zeros(len(shown), np.int64)
            draw["latent_scatter"] = partial(
                charts.save_scatter, posterior_means=means, labels=of_shown, class_names=class_names
            )
            draw["latent_manifold"] = partial(self._save_manifold, means=means)
        made = {name: self._paths.final_pictures[name] for name in draw}
        for name, path in made.items():
            draw[name](path)
        return made

    def _save_reconstructions(self, path: Path) -> None:
        test, shown = self._dataset.test, self._some_test_images(GRID_IMAGES)
        originals = test.images[shown]
        labels = torch.from_numpy(test.labels[shown]) if self._model.conditional else None
        reconstructions = self._model.reconstruct(torch.from_numpy(originals), labels)
        scale = self._dataset.scale
        shown = tiles(reconstructions.cpu().numpy(), scale, under=originals)
        grids.save_reconstructions(path, tiles(originals, scale), shown, bar=bar_of(scale, pairs=True))

    def _save_samples(self, path: Path) -> None:
        """Draw samples from the prior, with one row a class, or label, for a conditional model."""
        if not self._model.conditional:
            grids.save_grid(path, self._shown(self._model.sample(GRID_IMAGES)), GRID_COLUMNS, bar=self._bar)
            return
        rows = self._some_labels(GRID_CLASSES)
        samples = self._model.sample(len(rows) * GRID_COLUMNS, self._each_for(rows, GRID_COLUMNS))
        captions = self._captions(rows)
        grids.save_grid(path, self._shown(samples), GRID_COLUMNS, captions, bar=self._bar)

    def _save_interpolations(self, path: Path) -> None:
        """Draw walks between latents of the prior, each within one class for a conditional model."""
        ends = self._model.prior_latents(2 * INTERPOLATIONS).cpu().numpy()
        latents = torch.from_numpy(latent_walks.great_circles(ends[::2], ends[1::2], INTERPOLATION_STEPS))
        title = "walks between latents of the prior, along great circles"
        if not self._model.conditional:
            images = self._model.images(latents)
            captions = None
        else:
            some = self._some_labels(INTERPOLATIONS)
            rows = [some[place % len(some)] for place in range(INTERPOLATIONS)]
            images = self._model.images(latents, self._each_for(rows, INTERPOLATION_STEPS))
            captions = self._captions(rows)
        grids.save_strips(path, self._shown(images), INTERPOLATION_STEPS, captions, title, bar=self._bar)

    def _save_manifold(self, path: Path, means: np.ndarray) -> None:
        """Draw the whole plane for two latents with a prior, else walks along the principal posterior directions."""
        if self._model.objective.latent_shape == (2,) and self._model.objective.generates:
            latents = latent_walks.manifold_latents(MANIFOLD_SIDE, MANIFOLD_SIDE)
            images = self._model.images(self._latents(latents), self._one_label_for(len(latents)))
            title = f"decoded latents at equal steps of prior probability{self._told_label}"
            grids.save_manifold(path, self._shown(images), MANIFOLD_SIDE, title, bar=self._bar)
            return
        latents, shares = latent_walks.principal_traversals(means, TRAVERSAL_DIRECTIONS, TRAVERSAL_STEPS)
        images = self._model.images(self._latents(latents), self._one_label_for(len(latents)))
        captions = [f"direction {row + 1}, {share:.0%} of variance" for row, share in enumerate(shares)]
        title = "walks along the principal directions of the posterior means, -2.5 to +2.5 standard deviations"
        title += self._told_label
        grids.save_strips(path, self._shown(images), TRAVERSAL_STEPS, captions, title, bar=self._bar)

    def _shown(self, images: torch.Tensor) -> np.ndarray:
        """Images of the model as uint8 [N, 1 or 3, H, W]."""
        return tiles(images.cpu().numpy(), self._dataset.scale)

    @property
    def _bar(self) -> grids.Bar | None:
        """Values of black and white, for images that are not 8-bit."""
        return bar_of(self._dataset.scale)

    def _latents(self, rows: np.ndarray) -> torch.Tensor:
        """Latents [N, *latent_shape] from rows [N, D] of all their values."""
        return torch.from_numpy(rows).view(-1, *self._model.objective.latent_shape)

    def _captions(self, rows: Sequence[Row]) -> list[str]:
        """Labels in letters that can be drawn."""
        labels = self._dataset.labels
        if labels.kind != "classes":
            return lettering_of([labels.caption(row) for row in rows]).names
        names = lettering_of(labels.names).names
        return [names[int(row[0])] for row in rows]

    def _some_labels(self, count: int) -> list[Row]:
        """Up to `count` labels: classes spread over all, or labels as training images have them."""
        labels = self._dataset.labels
        if labels.kind != "classes":
            return list(dict.fromkeys(labels.in_turn(count)))
        return [(float(label),) for label in evenly_spaced(min(count, labels.classes), labels.classes)]

    def _each_for(self, rows: Sequence[Row], times: int) -> torch.Tensor:
        """Labels in which each row stands for some images, one after another."""
        return label_tensor(self._dataset.labels, rows).repeat_interleave(times, dim=0)

    def _one_label_for(self, count: int) -> torch.Tensor | None:
        """The first label for `count` images of a conditional model."""
        return self._each_for(self._some_labels(1), count) if self._model.conditional else None

    @property
    def _told_label(self) -> str:
        return f", of {self._captions(self._some_labels(1))[0]}" if self._model.conditional else ""

    def _some_test_images(self, count: int) -> np.ndarray:
        """Places of up to `count` test images, spread over the split."""
        available = len(self._dataset.test.images)
        return evenly_spaced(min(count, available), available)
