"""Replay of single steps, which is possible since a step is a function of config, data and the state before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from gen_dist.config import TrainConfig
from gen_dist.data import open_dataset
from gen_dist.errors import ConfigError
from gen_dist.parallel.processes import start_processes
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.reading import config_of_run
from gen_dist.training.trainer import Trainer


def replay(run_path: Path, step: int, announce: Callable[[str], None] = print) -> dict[str, float | list[float]]:
    """Compute the logs of one step of a run, from the newest checkpoint before it or from the initial weights.

    The run directory is not changed. One process is enough, even if several trained the run.

    Args:
        run_path: directory of the run.
        step: optimizer step, 1 .. steps of the run, as in metrics.jsonl.
        announce: takes progress lines.

    Raises:
        CheckpointError: the directory has no run.
        ConfigError: the run has no such step.
    """
    config = config_of_run(run_path)
    if not 1 <= step <= config.steps:
        raise ConfigError(f"step {step} is not one of the run's steps 1 to {config.steps}")
    with trainer_at(run_path, config, step - 1, announce) as (trainer, first):
        origin = f"the checkpoint of step {first}" if first else "the initial weights"
        announce(f"replaying from {origin}: {step - first} steps")
        for done in range(first, step):
            logs = trainer.run_step(done)
        return trainer.average_logs([logs])[0]


@contextlib.contextmanager
def trainer_at(
    run_path: Path, config: TrainConfig, at_most: int, announce: Callable[[str], None]
) -> Iterator[tuple[Trainer, int]]:
    """Context manager with a trainer in one process, and its step: of the newest checkpoint up to `at_most`, or 0."""
    found = checkpoints.load_newest(run_path, announce, at_most=at_most)
    processes = start_processes(config)
    trainer = Trainer(config, open_dataset(config.data, config.data_root, config.packing, announce), processes)
    try:
        if found:
            trainer.load(found[0])
        yield trainer, found[0].step if found else 0
    finally:
        trainer.close()
