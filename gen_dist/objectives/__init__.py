"""Objectives, one file each. An objective owns its networks and the ordered phases that train them."""

from typing import Any

from gen_dist.config import TrainConfig
from gen_dist.config.labels import LabelScheme, scheme_of
from gen_dist.data.values import PLAIN, ValueScale
from gen_dist.errors import ConfigError, shortened
from gen_dist.objectives.base import Objective, takes_any_labels
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.plugins.registry import load
from gen_dist.plugins.surroundings import watched

__all__ = ["Batch", "Objective", "Phase", "TurnResult", "build_objective"]


def build_objective(
    config: TrainConfig, image_shape: tuple[int, int, int], classes: int | LabelScheme, values: ValueScale = PLAIN
) -> Objective:
    """Build the objective of a config; torch's random state initializes its networks.

    Args:
        config: config of the run.
        image_shape: (C, H, W).
        classes: meaning of the images' labels; or their number of classes, 1 if they have no labels.
        values: values of the images.

    Raises:
        ConfigError: the network does not fit the images, the objective needs labels, or its likelihood is not one of
            such values.
    """
    labels = scheme_of(classes)
    with watched():
        implementation: Any = load(config.objective.implementation)
        takes_any = takes_any_labels(implementation)
        given = labels if takes_any else labels.classes
        made: Objective = implementation(config.objective, config.roles, image_shape, given)
    if made.conditional and not takes_any and labels.kind != "classes":
        raise ConfigError(
            f"objective {config.objective.kind} takes classes alone, and the labels of these images are {labels.kind}: "
            f"{shortened(', '.join(labels.names))}; leave out its conditioning, or use another objective"
        )
    made.take_values(values)
    return made
