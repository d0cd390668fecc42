"""Trainings of benchmarks, which end the program with their run if a signal stops them."""

from __future__ import annotations

import sys
from typing import Any

import gen_dist
from gen_dist.config import TrainConfig
from gen_dist.training.outcome import Outcome


def train_to_the_end(config: TrainConfig, **options: Any) -> Outcome:
    """Train; exit if a signal stopped the run: figures of a part of it would stand for the whole.

    Args:
        config: the run.
        options: of `gen_dist.train`.
    """
    outcome: Outcome = gen_dist.train(config, **options)
    if not outcome.finished:
        sys.exit(f"stopped at step {outcome.step:,} of {outcome.run_path.name}")
    return outcome
