"""Config of the values that change while a run trains, beside the learning rate's warm-up and decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gen_dist.config.checked import Checked, at_least, finite_and_at_least
from gen_dist.config.objectives import ObjectiveConfig
from gen_dist.config.optimization import OptimizerConfig
from gen_dist.errors import ConfigError

SCHEDULED_OBJECTIVE = ("penalty_weight", "instance_noise", "ada_probability")
"""Options of objectives with a final value, which reach phases in `Batch.scheduled`."""


@dataclass(frozen=True)
class ScheduleConfig(Checked):
    """Final values of some options. A value goes from the option's to the final one by half a cosine wave, as in the
    code of Huang et al. 2024. None does not change it."""

    schedule_images: int | None = None
    """Training images after which scheduled values stay at their final ones. None is all of the run."""
    final_learning_rate: float | None = None
    """Final learning rate, in place of a decay; with `rate_per_image`, that of a batch of one image."""
    final_beta2: float | None = None
    """Final decay rate of Adam's second moments."""
    final_ema_images: int | None = None
    """Final half-life of the moving average of weights in images; it begins at 0. In place of `ema_decay`."""
    final_penalty_weight: float | None = None
    """Final weight of the gradient penalty."""
    final_instance_noise: float | None = None
    """Final standard deviation of the noise in the discriminator's input."""
    final_ada_probability: float | None = None
    """Final probability of the augmentations of `ada`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("schedule_images", "final_ema_images"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1)
        for name in ("final_learning_rate", "final_penalty_weight", "final_instance_noise"):
            if (value := getattr(self, name)) is not None:
                finite_and_at_least(name, value, 0.0)
        if self.final_beta2 is not None and not 0 <= self.final_beta2 < 1:
            raise ConfigError(f"final_beta2 {self.final_beta2} is not in [0, 1)")
        if self.final_ada_probability is not None and not 0 <= self.final_ada_probability <= 1:
            raise ConfigError(f"final_ada_probability {self.final_ada_probability} is not in 0..1")
        if self.schedule_images is not None and not any(
            value is not None for name, value in vars(self).items() if name.startswith("final_")
        ):
            raise ConfigError(
                f"schedule_images {self.schedule_images} without a value to schedule; add one, such as "
                "--final-learning-rate, or leave it out"
            )

    @property
    def spans_the_run(self) -> bool:
        """True if values at a step depend on the number of steps of the run."""
        return self.schedule_images is None and self != ScheduleConfig()

    def refuse_others(self, objective: ObjectiveConfig, optimization: OptimizerConfig) -> None:
        """Raise ConfigError if a run of this objective and optimizer does not have what is scheduled."""
        if self.final_learning_rate is not None and optimization.decay != "constant":
            raise ConfigError(
                f"final_learning_rate {self.final_learning_rate} with decay {optimization.decay}, which ends at 0; add "
                "--decay constant, or leave one out"
            )
        if self.final_beta2 is not None and optimization.optimizer == "sgd":
            raise ConfigError(f"final_beta2 {self.final_beta2} needs adam or adamw, not sgd; leave it out")
        if self.final_ema_images is not None and optimization.ema_decay is not None:
            raise ConfigError(
                f"final_ema_images {self.final_ema_images} is in place of ema_decay {optimization.ema_decay}; add "
                "--ema-decay None, or leave one out"
            )
        for name in SCHEDULED_OBJECTIVE:
            final, first = getattr(self, f"final_{name}"), getattr(objective, name, None)
            if final is not None and (first is None or (name != "ada_probability" and not first)):
                option = name.replace("_", "-")
                raise ConfigError(
                    f"final_{name} {final} needs a value to begin at, and objective {objective.kind} has none; add "
                    f"--{option}, or leave it out (--final-{option} None)"
                )

    def progress(self, images: int, images_of_run: int) -> float:
        """Part of the way to the final values after so many images, 0..1: half a cosine wave."""
        whole = self.schedule_images or images_of_run
        return 0.5 - 0.5 * math.cos(math.pi * min(1.0, images / whole))

    def of_objective(self, objective: ObjectiveConfig, progress: float) -> Mapping[str, float]:
        """Scheduled values of an objective's options, by name."""
        return {
            name: _between(getattr(objective, name), final, progress)
            for name in SCHEDULED_OBJECTIVE
            if (final := getattr(self, f"final_{name}")) is not None
        }

    def beta2(self, optimization: OptimizerConfig, progress: float) -> float | None:
        """Scheduled decay rate of second moments; None if it is not scheduled."""
        return None if self.final_beta2 is None else _between(optimization.betas[1], self.final_beta2, progress)

    def learning_rate(self, highest: float, progress: float) -> float:
        """Learning rate after the warm-up, if it is scheduled."""
        return highest if self.final_learning_rate is None else _between(highest, self.final_learning_rate, progress)

    def newest_weight(self, batch: int, progress: float) -> float | None:
        """Weight of the newest weights in a moving average whose half-life is scheduled; None if it is not."""
        if self.final_ema_images is None:
            return None
        half_life = _between(0.0, float(self.final_ema_images), progress)
        return 1.0 - 0.5 ** (batch / half_life) if half_life > 0 else 1.0


def _between(first: float, final: float, progress: float) -> float:
    return first + progress * (final - first)
