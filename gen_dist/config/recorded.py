"""Metrics that every evaluation while training records, and the direction in which they are better."""

from __future__ import annotations

from collections.abc import Sequence

from gen_dist.config.objectives import ObjectiveConfig
from gen_dist.errors import ConfigError

MORE_IS_BETTER = ("diversity", "diversity_ratio", "classes_found", "sure_ratio", "label_accuracy")
"""Checks of samples of which more is better; less is of all other metrics."""
SAMPLE_CHECKS = (*MORE_IS_BETTER, "class_variation")
"""Checks of samples that are single numbers. Those of classes are there for images with classes alone."""


MEASURED = "evaluation/"
"""Start of the names of metrics that `evaluate_metrics` asks for."""


def recorded_metrics(objective: ObjectiveConfig, measured: Sequence[str] = ()) -> list[str]:
    """Names of the metrics of an objective's evaluations, as metrics.jsonl has them; its headline first.

    Those of `measured`, the `evaluate_metrics` of a config, have their counts behind them there.
    """
    checks = [] if "samples" in objective.lacks else [f"samples/{name}" for name in SAMPLE_CHECKS]
    return [*(f"test/{name}" for name in objective.test_metrics), *checks, *(MEASURED + name for name in measured)]


def recorded_metric(name: str, objective: ObjectiveConfig, measured: Sequence[str] = ()) -> str:
    """Full name of a metric that a user names with or without its prefix.

    Raises:
        ConfigError: evaluations while training do not record it.
    """
    known = recorded_metrics(objective, measured)
    found = [one for one in known if name in (one, one.rpartition("/")[2])]
    if not found:
        raise ConfigError(
            f"keep_best {name!r} is not recorded while training; use one of {', '.join(known)}, or name it in "
            "--evaluate-metrics, too"
        )
    return found[0]
