"""The best checkpoint of a run, by a metric of its evaluations while it trains.

A checkpoint is saved whenever an evaluation is better than all before. Its facts, and those of every checkpoint after
it, name it; so a run that is resumed knows it, and removal of old checkpoints leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gen_dist.config import TrainConfig
from gen_dist.config.recorded import MEASURED, MORE_IS_BETTER
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.records.checkpoint import newest, read_facts
from gen_dist.records.run_paths import RunPaths


class Best(NamedTuple):
    """The best evaluation of a run."""

    metric: str
    step: int
    value: float
    measured_on: tuple[int, str | None] | None = None
    """Samples and feature network, as the config has them, of a metric of `evaluate_metrics`; None of others."""

    def facts(self) -> dict[str, Any]:
        """The fields that say something, as a checkpoint records them."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def best_of_facts(config: TrainConfig, facts: Mapping[str, Any], saved: TrainConfig) -> Best | None:
    """The best evaluation up to a checkpoint, by the metric of the config; None without one.

    A config without a metric keeps what its run has, as it is.

    Args:
        config: of the run as it goes on.
        facts: of the checkpoint.
        saved: config in the checkpoint. If the facts do not say what the best was measured on, it does: the versions
            that wrote such facts allowed no change of it.

    Raises:
        ConfigError: it was measured on other samples or features, so that no later evaluation compares with it.
    """
    found = facts.get("best")
    if not found or config.keep_best not in (None, found["metric"]):
        return None
    before = measured_on(saved, found["metric"])
    match found.get("measured_on"):
        case [int(samples), str() | None as features]:
            before = (samples, features)
    best = Best(found["metric"], found["step"], found["value"], before)
    now = measured_on(config, best.metric)
    if config.keep_best and before and now and before != now:
        was, would_be = (f"{count} samples with features {features}" for count, features in (before, now))
        raise ConfigError(
            f"keep_best {best.metric}: the best so far, of step {best.step}, was measured on {was}, and others would "
            f"be on {would_be}, which do not compare; give the same --evaluate-samples and --evaluate-features, or "
            "leave out --keep-best"
        )
    return best


def measured_on(config: TrainConfig, metric: str) -> tuple[int, str | None] | None:
    """Samples and feature network of a metric of `evaluate_metrics`; None for others."""
    return (config.evaluate_samples, config.evaluate_features) if metric.startswith(MEASURED) else None


def better(best: Best | None, one: Best, more_is_better: Collection[str] = MORE_IS_BETTER) -> Best | None:
    """The better of two evaluations. A value that is not finite is never the best, and of equal ones the first is."""
    if not math.isfinite(one.value):
        return best
    sign = -1.0 if one.metric.rpartition("/")[2] in more_is_better else 1.0
    return best if best and sign * best.value <= sign * one.value else one


def best_checkpoint(run: Path, announce: Callable[[str], None]) -> Path:
    """Directory of the best checkpoint of a run.

    Raises:
        CheckpointError: the run keeps none, has no checkpoint, or they cannot be read.
    """
    facts = newest(run, read_facts, announce)
    if facts is None:
        raise CheckpointError(f"{run} has no checkpoint yet; train one with gen-dist train PRESET --run-dir {run}")
    if not facts.get("best"):
        raise CheckpointError(
            f"{run} has no best checkpoint: it was trained without --keep-best, or its evaluations lack that metric; "
            "leave out --checkpoint best"
        )
    return RunPaths(run).checkpoint(facts["best"]["step"])
