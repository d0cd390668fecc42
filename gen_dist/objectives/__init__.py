"""Objectives, one file each. An objective owns its networks and the ordered phases that train them."""

from typing import Any

from gen_dist.config import TrainConfig
from gen_dist.config.data import Form
from gen_dist.config.labels import LabelScheme, scheme_of
from gen_dist.config.options import of_roles
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
        ConfigError: the network does not fit the images, the objective needs labels, its likelihood is not one of such
            values, or networks or options are for images and the data are not.
    """
    _refuse_form(config, values.form)
    labels = scheme_of(classes)
    with watched():
        implementation: Any = load(config.objective.implementation)
        takes_any = takes_any_labels(implementation)
        given = labels if takes_any else labels.classes
        if not takes_any and getattr(config.objective, "conditioning", "none") != "none":
            _refuse_labels(config, implementation, labels)
        try:
            made: Objective = implementation(config.objective, config.roles, image_shape, given)
        except ConfigError as error:
            error.args = (of_roles(str(error), config),)
            raise
    if made.conditional and not takes_any:
        _refuse_labels(config, implementation, labels)
    made.take_values(values)
    return made


def _refuse_labels(config: TrainConfig, implementation: type[Objective], labels: LabelScheme) -> None:
    """Raise ConfigError if labels are other than classes, for an objective that takes a number of classes."""
    if labels.kind == "classes":
        return
    outside = not implementation.__module__.startswith(f"{__name__}.")
    own = f", or say takes_any_labels = True in {implementation.__name__}, which then gets a LabelScheme for the number"
    raise ConfigError(
        f"objective {config.objective.kind} takes classes alone, and the labels of these images are {labels.kind}: "
        f"{shortened(', '.join(labels.names))}; leave out its conditioning{own if outside else ''}"
    )


def _refuse_form(config: TrainConfig, form: Form) -> None:
    """Raise ConfigError if a network or option is for images, and the data are not."""
    if form == "images":
        return
    for role in config.objective.roles:
        network = getattr(config.roles, role)
        if form not in network.forms:
            raise ConfigError(
                f"{role} {network.kind} takes {' or '.join(network.forms)}, and the data are {form}; use --network mlp"
            )
    for name in ("augmentation", "ada", "perceptual_weight"):
        if value := getattr(config.objective, name, None):
            given = " ".join(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{name} {given} is for images, and the data are {form}; leave it out")
