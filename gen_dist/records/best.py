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
from gen_dist.config.recorded import MORE_IS_BETTER
from gen_dist.errors import CheckpointError
from gen_dist.records.checkpoint import newest, read_facts
from gen_dist.records.run_paths import RunPaths


class Best(NamedTuple):
    """The best evaluation of a run."""

    metric: str
    step: int
    value: float


def best_of_facts(config: TrainConfig, facts: Mapping[str, Any]) -> Best | None:
    """The best evaluation up to a checkpoint, by the metric of the config; None without one.

    A config without a metric keeps what its run has, as it is.
    """
    found = facts.get("best")
    return Best(**found) if found and config.keep_best in (None, found["metric"]) else None


def better(
    best: Best | None, metric: str, step: int, value: float | None, more_is_better: Collection[str] = MORE_IS_BETTER
) -> Best | None:
    """The best evaluation after one more. A value that is missing or not finite is never the best, and of equal ones
    the first is."""
    if value is None or not math.isfinite(value):
        return best
    sign = -1.0 if metric.rpartition("/")[2] in more_is_better else 1.0
    return best if best and sign * best.value <= sign * value else Best(metric, step, value)


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
