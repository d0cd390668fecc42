"""Replay: since a run is a function of config, data and step, any step of it can be run again alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gen_dist import checkpoint as checkpoints
from gen_dist import parallel
from gen_dist.config import TrainConfig
from gen_dist.data import open_dataset
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.trainer import Trainer


def replay(run_path: Path, step: int, announce: Callable[[str], None] = print) -> dict[str, float | list[float]]:
    """The logs of one step of a run, from the newest checkpoint before it or from the initial weights.

    Nothing in the run directory is changed. It runs in one process, whatever number trained the run.

    Args:
        run_path: directory of the run.
        step: optimizer step, 1 .. steps of the run, as in metrics.jsonl.
        announce: takes lines on what is done.

    Raises:
        CheckpointError: the directory holds no run.
        ConfigError: the run has no such step.
    """
    config_path = run_path / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{run_path} is no run directory: it has no config.json")
    config = TrainConfig.from_json(config_path.read_text(errors="replace"), str(config_path))
    if not 1 <= step <= config.steps:
        raise ConfigError(f"step {step} is not one of the run's steps 1 to {config.steps}")
    found = checkpoints.load_newest(run_path, announce, at_most=step - 1)
    processes = parallel.start_processes(config)
    trainer = Trainer(config, open_dataset(config.data, config.data_root, config.packing, announce), processes)
    try:
        first = 0
        if found:
            trainer.load(found[0])
            first = found[0].step
        origin = f"the checkpoint of step {first}" if found else "the initial weights"
        announce(f"replaying from {origin}: {step - first} steps")
        for done in range(first, step):
            logs = trainer.run_step(done)
        return trainer.average_logs([logs])[0]
    finally:
        trainer.close()
