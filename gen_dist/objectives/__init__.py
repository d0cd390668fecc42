"""Objectives, one file each. An objective owns its networks and the ordered phases that train them."""

from gen_dist.config import TrainConfig
from gen_dist.data.values import PLAIN, ValueScale
from gen_dist.objectives.base import Objective
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.plugins.registry import load
from gen_dist.plugins.surroundings import watched

__all__ = ["Batch", "Objective", "Phase", "TurnResult", "build_objective"]


def build_objective(
    config: TrainConfig, image_shape: tuple[int, int, int], classes: int, values: ValueScale = PLAIN
) -> Objective:
    """Build the objective of a config; torch's random state initializes its networks.

    Args:
        config: config of the run.
        image_shape: (C, H, W).
        classes: number of classes of the images, 1 if they have no labels.
        values: values of the images.

    Raises:
        ConfigError: the network does not fit the images, the objective needs labels, or its likelihood is not one of
            such values.
    """
    with watched():
        made: Objective = load(config.objective.implementation)(config.objective, config.roles, image_shape, classes)
    made.take_values(values)
    return made
