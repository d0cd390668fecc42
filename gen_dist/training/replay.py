"""Replay of single steps, which is possible since a step is a function of config, data and the state before it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gen_dist.config import Device, TrainConfig
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.parallel.processes import settings_kept, start_processes
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.environment import ENVIRONMENT_SHAPE
from gen_dist.records.reading import config_of_run, read_object
from gen_dist.records.run_data import open_run_data
from gen_dist.records.run_paths import RunPaths
from gen_dist.training.trainer import Trainer


@settings_kept()
def replay(
    run_path: Path,
    step: int,
    announce: Callable[[str], None] = print,
    *,
    device: Device | None = None,
    data: str | None = None,
    data_root: str | None = None,
) -> dict[str, float | list[float]]:
    """Compute the logs of one step of a run, from the newest checkpoint before it or from the initial weights.

    The run directory is not changed. One process is enough, even if several trained the run.

    Args:
        run_path: directory of the run.
        step: optimizer step, 1 .. steps of the run, as in metrics.jsonl.
        announce: takes progress lines.
        device: where to compute. None is the run's device, or the CPU if this machine has no GPU.
        data: where the data are now, such as folder:/new/place, if they have moved since the run.
        data_root: directory with torchvision's data sets, if it has moved since the run.

    Raises:
        CheckpointError: the directory has no run.
        ConfigError: the run has no such step, or `device` is cuda and there is no GPU.
    """
    config = config_of_run(run_path)
    on_gpu = _trained_on_gpu(run_path, config)
    if device or (config.device == "cuda" and not torch.cuda.is_available()):
        config = dataclasses.replace(config, device=device or "cpu")
    if on_gpu and (config.device == "cpu" or not torch.cuda.is_available()):
        announce(
            "the run was trained on a GPU and is replayed on the CPU: the images of the step are the same, but noise "
            "and rounding are not, so the losses differ"
        )
    if not 1 <= step <= config.steps:
        raise ConfigError(f"step {step} is not one of the run's steps 1 to {config.steps}")
    with trainer_at(run_path, config, step - 1, announce, data=data, data_root=data_root) as (trainer, first):
        origin = f"the checkpoint of step {first}" if first else "the initial weights"
        announce(f"replaying from {origin}: {step - first} steps")
        for done in range(first, step):
            logs = trainer.run_step(done)
        return trainer.average_logs([logs])[0]


@contextlib.contextmanager
def trainer_at(
    run_path: Path,
    config: TrainConfig,
    at_most: int,
    announce: Callable[[str], None],
    *,
    data: str | None = None,
    data_root: str | None = None,
) -> Iterator[tuple[Trainer, int]]:
    """Context manager with a trainer in one process, and its step: of the newest checkpoint up to `at_most`, or 0."""
    found = checkpoints.load_newest(run_path, announce, at_most=at_most)
    facts = found[0].facts if found else checkpoints.newest(run_path, checkpoints.read_facts, announce) or {}
    processes = start_processes(config)
    dataset = open_run_data(run_path, config, announce, digest=facts.get("data_digest"), data=data, data_root=data_root)
    trainer = Trainer(config, dataset, processes)
    try:
        if found:
            trainer.load(found[0])
        else:
            trainer.start()
        yield trainer, found[0].step if found else 0
    finally:
        trainer.close()


def _trained_on_gpu(run_path: Path, config: TrainConfig) -> bool:
    """True if the last start of a run had a GPU, by its config or environment.json."""
    with contextlib.suppress(FileNotFoundError, CheckpointError):
        found = read_object(RunPaths(run_path).environment, ENVIRONMENT_SHAPE, "")
        return config.device == "cuda" or (config.device == "auto" and bool(found.get("gpus")))
    return config.device == "cuda"
