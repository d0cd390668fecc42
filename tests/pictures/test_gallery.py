"""The pictures of a run follow from the abilities of its model and the content of its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gen_dist.config import GanConfig
from gen_dist.data import Dataset, Split
from gen_dist.inference.model import GenerativeModel
from gen_dist.objectives import build_objective
from gen_dist.pictures import gallery as module
from gen_dist.pictures.gallery import Gallery
from tests.support.digits import read_png
from tests.support.runs import small_config, small_dataset


class LabelledGenerator:
    """A conditional model without encoder. The intensity of an image is its label; latents have no effect."""

    config = GanConfig()
    conditional = True
    encodes = False
    generates = True
    latent_shape = (3,)

    def __init__(self) -> None:
        self.objective = self
        self.device = torch.device("cpu")
        self.asked: list[Tensor] = []

    def prior_latents(self, count: int, seed: int = 0) -> Tensor:
        return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))

    def sample(self, count: int, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        return self.images(self.prior_latents(count, seed), labels)

    def images(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None and len(labels) == len(latents)
        self.asked.append(labels)
        return labels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)


def labelled_dataset(classes: int) -> Dataset:
    split = Split("a split", np.zeros((classes, 1, 8, 8), np.uint8), np.arange(classes))
    return Dataset(split, split, tuple(f"class {label}" for label in range(classes)), "")


def gallery_of(model: Any, dataset: Dataset, path: Path) -> Gallery:
    return Gallery(model, dataset, path)


def vae(objective: str) -> tuple[GenerativeModel, Dataset]:
    config = small_config(objective)
    dataset = small_dataset(config)
    built = build_objective(config, dataset.image_shape, len(dataset.class_names)).eval()
    return GenerativeModel(built, config, dataset.image_shape, dataset.class_names), dataset


def test_a_model_without_encoder_has_no_latent_pictures(tmp_path):
    gallery = gallery_of(LabelledGenerator(), labelled_dataset(10), tmp_path)
    assert gallery.at_step(5) == {"samples": tmp_path / "samples/step_00000005.png"}
    made = gallery.at_end([{"step": 1, "train/generator/loss": 1.0}])
    assert made == {"curves": tmp_path / "curves.png", "interpolations": tmp_path / "interpolations.png"}
    assert all(picture.exists() for picture in made.values())


def test_a_vae_makes_interpolations_besides_its_other_pictures(tmp_path):
    made = gallery_of(*vae("vae"), tmp_path).at_end([])
    assert list(made) == ["interpolations", "latent_scatter", "latent_manifold"]
    shown = read_png(made["interpolations"])
    scale = 2
    assert shown.shape[1] == 11 * 28 * scale + 24


def test_an_autoencoder_generates_nothing(tmp_path):
    gallery = gallery_of(*vae("autoencoder"), tmp_path)
    assert set(gallery.at_step(5)) == {"reconstructions"}
    assert set(gallery.at_end([])) == {"latent_scatter", "latent_manifold"}


def test_classes_and_scores_have_pictures_if_recorded(tmp_path):
    gallery = gallery_of(LabelledGenerator(), labelled_dataset(10), tmp_path)
    records: list[dict[str, Any]] = [{"step": 1, "samples/class_shares": [0.1] * 10}]
    assert set(gallery.at_end(records)) - {"curves", "interpolations"} == {"class_shares"}
    records.append({"step": 2, "scores/real": [0.05] * 20, "scores/fake": [0.05] * 20, "train/loss": 1.0})
    made = gallery.at_end(records)
    assert set(made) - {"curves", "interpolations"} == {"class_shares", "scores"}
    assert all(picture.exists() for picture in made.values())


def test_records_of_lists_alone_make_no_curves_and_no_error(tmp_path):
    gallery = gallery_of(LabelledGenerator(), labelled_dataset(10), tmp_path)
    assert "curves" not in gallery.at_end([{"step": 1, "samples/class_shares": [0.1] * 10}])


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_a_conditional_model_has_rows_and_walks_of_one_class(tmp_path, classes):
    model = LabelledGenerator()
    gallery = gallery_of(model, labelled_dataset(classes), tmp_path)
    gallery.at_step(1)
    gallery.at_end([])
    of_samples, of_walks = (labels.numpy() for labels in model.asked)
    rows = of_samples.reshape(-1, module.GRID_COLUMNS)
    assert len(rows) == min(classes, module.GRID_CLASSES)
    assert (rows == rows[:, :1]).all() and len(set(rows[:, 0])) == len(rows)
    if classes <= module.GRID_CLASSES:
        assert rows[:, 0].tolist() == list(range(classes))
    walks = of_walks.reshape(module.INTERPOLATIONS, module.INTERPOLATION_STEPS)
    assert (walks == walks[:, :1]).all() and len(set(walks[:, 0])) == min(classes, module.INTERPOLATIONS)
    assert walks.max() < classes


def test_pictures_of_two_checks_show_the_same_latents(tmp_path):
    gallery = gallery_of(*vae("vae"), tmp_path)
    first, second = gallery.at_step(1), gallery.at_step(2)
    assert first["samples"].read_bytes() == second["samples"].read_bytes()
