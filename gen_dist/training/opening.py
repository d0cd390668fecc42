"""Opening lines of a run, shown before its first step."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from gen_dist.config import TrainConfig
from gen_dist.data.forms import written
from gen_dist.errors import number_of
from gen_dist.objectives import Objective
from gen_dist.parallel.processes import Processes
from gen_dist.startup import is_launched
from gen_dist.training.trainer import Trainer


def opening_lines(trainer: Trainer, path: Path) -> list[str]:
    """Device and precision, processes, networks, images, epochs, directory, and how to resume."""
    config, dataset, processes = trainer.config, trainer.dataset, trainer.processes
    train_images, test_images = len(dataset.train.images), len(dataset.test.images)
    epochs = config.steps * config.global_batch_size / train_images
    shape = written(dataset.scale.form, dataset.image_shape)
    shape += "" if dataset.scale.is_plain else f", {dataset.scale}"
    facts = {
        "device": f"{_device(processes.device)} in {str(trainer.dtype).removeprefix('torch.')}",
        "processes": _processes(processes),
        "networks": _networks(trainer.objective),
        dataset.scale.form: f"{train_images:,} of {config.data} to train on, {test_images:,} to test on, {shape}",
        "training": f"{number_of(config.steps, 'step')} of {number_of(config.global_batch_size, 'image')}, "
        f"{f'{epochs:,.0f}' if epochs >= 1000 else f'{epochs:.3g}'} epochs",
        **({"start": _start(config)} if config.start_from else {}),
        "directory": f"{path}; the same command, without --fresh, resumes it from its newest checkpoint",
    }
    width = max(map(len, facts))
    return [config.preset, *(f"  {name:{width}}  {value}" for name, value in facts.items())]


def _start(config: TrainConfig) -> str:
    trained = ", to train the decoder alone" if config.from_train == "decoder" else ""
    return f"{config.start_from} (SHA-256 {str(config.start_digest)[:12]}){trained}"


def _processes(processes: Processes) -> str:
    threads, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS", "").strip()
    each = " each" if processes.world_size > 1 else ""
    found = f"{processes.world_size} with {number_of(threads, 'thread')}{each}"
    # Launchers set OMP_NUM_THREADS by themselves.
    ours = os.environ.get("GEN_DIST_THREADS") or is_launched() or processes.device.type != "cpu"
    if not ours and re.fullmatch("[1-9][0-9]{0,3}", asked) and int(asked) != threads:
        found += f"; OMP_NUM_THREADS={asked} is not followed, GEN_DIST_THREADS={asked} would be"
    return found


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _networks(objective: Objective) -> str:
    counts = {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in objective.networks.items()
    }
    trained = {name: count for name, count in counts.items() if count}  # others follow the training
    return ", ".join(f"{name} of {number_of(count, 'parameter')}" for name, count in trained.items())
