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
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.records.environment import threads_that_reached
from gen_dist.records.run_paths import RunPaths
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


def resuming_line(trainer: Trainer, path: Path, checkpoint: Checkpoint, *, supervised: bool) -> str:
    """Line about a run that goes on: where, and with which other processes or threads than before.

    Args:
        trainer: the trainer that goes on.
        path: directory of the run.
        checkpoint: the state that it goes on from.
        supervised: True if a supervisor, such as Ray, gives the processes their threads.
    """
    world_size = trainer.processes.world_size
    by = "" if world_size == checkpoint.facts["world_size"] else f", now with {number_of(world_size, 'process')}"
    if not by or trainer.config.shards:  # else the bits are others anyway
        by += _other_threads(trainer.processes, checkpoint.step, path, supervised)
    return f"resuming {path} at step {checkpoint.step} of {trainer.config.steps}{by}"


def _other_threads(processes: Processes, step: int, path: Path, supervised: bool) -> str:
    """Words about another number of CPU threads than at a step, which changes the last bits; empty if equal."""
    threads = torch.get_num_threads()
    before = threads_that_reached(step, RunPaths(path).environment)
    if processes.device.type != "cpu" or before in (None, threads):
        return ""
    way = f"--cpus-per-worker {before}" if supervised else f"GEN_DIST_THREADS={before}"
    return f", with {number_of(threads, 'thread')} in place of {before}: its last bits change; {way} keeps them"


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
