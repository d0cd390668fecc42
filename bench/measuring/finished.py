"""Trainings of benchmarks, which end the program with their run if a signal stops them."""

from __future__ import annotations

import sys
from typing import Any

from gen_dist.config import TrainConfig
from gen_dist.training.outcome import Outcome
from gen_dist.training.run import train  # here, since `gen_dist.train` would import it within what is timed


def train_to_the_end(config: TrainConfig, **options: Any) -> Outcome:
    """Train; exit if a signal stopped the run: figures of a part of it would stand for the whole.

    Args:
        config: the run.
        options: of `train`.
    """
    outcome = train(config, **options)
    if not outcome.finished:
        sys.exit(f"stopped at step {outcome.step:,} of {outcome.run_path.name}")
    return outcome
