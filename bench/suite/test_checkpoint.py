"""Saving and loading checkpoints: `python -m pytest bench/suite/test_checkpoint.py`."""

import itertools
from pathlib import Path

import pytest
import torch

from bench.measuring.measured import Measurement, preset_on
from gen_dist.data import Dataset
from gen_dist.parallel.processes import start_processes
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.training.trainer import Trainer

PRESETS = ("vae-mnist", "dcgan-mnist")
ROUNDS = 20


@pytest.mark.parametrize("preset", PRESETS)
def test_saving(measurement: Measurement, preset: str, digits: Dataset, device: torch.device, tmp_path: Path) -> None:
    """Tensors to the host, digests, syncing to disk, and removing the oldest."""
    trainer = trained(preset, digits, device)
    steps = itertools.count(1)
    measurement.time(
        lambda: checkpoints.save(tmp_path, state_of(trainer, next(steps)), trainer.config, keep=2),
        rounds=ROUNDS,
        warmup_rounds=3,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_loading(measurement: Measurement, preset: str, digits: Dataset, device: torch.device, tmp_path: Path) -> None:
    """Checking digests, reading, and copying into networks and optimizers."""
    trainer = trained(preset, digits, device)
    path = checkpoints.save(tmp_path, state_of(trainer, 1), trainer.config, keep=2)
    measurement.time(lambda: trainer.load(checkpoints.load(path)[0]), rounds=ROUNDS, warmup_rounds=3)


def trained(preset: str, digits: Dataset, device: torch.device) -> Trainer:
    """A trainer after one step: before it the optimizers have no state."""
    config = preset_on(preset, device)
    trainer = Trainer(config, digits, start_processes(config))
    trainer.run_step(0)
    return trainer


def state_of(trainer: Trainer, step: int) -> Checkpoint:
    """Checkpoint as a run saves it."""
    facts = {
        "preset": trainer.config.preset,
        "data_digest": trainer.dataset.digest,
        "image_shape": trainer.dataset.image_shape,
        "class_names": trainer.dataset.class_names,
        "world_size": 1,
        "training_seconds": 0.0,
        "loss_scales": trainer.loss_scales(),
        "unlogged": [],
    }
    return Checkpoint(step, trainer.tensors(), facts)
