"""The augmentation of a run's training images, on the device, before a step."""

from __future__ import annotations

from collections.abc import Callable

from gen_dist.config import TrainConfig
from gen_dist.config.augmentation import image_changes
from gen_dist.data import Dataset
from gen_dist.data.augmenting import DRAWS, augmented, refuse_bad_changes
from gen_dist.objectives import Batch
from gen_dist.objectives.augmentation import uniform
from gen_dist.randomness import Stream


def choose_changes(config: TrainConfig, dataset: Dataset) -> Callable[[Batch], Batch] | None:
    """Choose the function that changes the images of a micro-batch; None if a config asks for no changes.

    Raises:
        ConfigError: the images cannot be changed so.
    """
    changes = image_changes(config.augment)
    refuse_bad_changes(changes, dataset.image_shape, dataset.scale.form)
    if not config.augment:
        return None

    def changed(batch: Batch) -> Batch:
        draws = uniform(batch.key(Stream.IMAGE_CHANGES), len(batch.images), DRAWS)
        return batch._replace(images=augmented(batch.images, changes, dataset.scale, draws))

    return changed
