"""A whole run of `vae-mnist`, at the batch and with the optimizer of the others, in a run directory of its own.

All that a run does by default is in it: log lines, tests, sample checks, pictures and checkpoints, at the intervals of
the preset. The turnstile is passed as `Trainer.run_step` returns; nothing else of the run knows of it. Only its start
is another: at torch's initial biases, as the others, and not at the mean image, from where it would be ahead of them.
"""

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from bench.peers import BATCH_SIZE, ENDLESS, LEARNING_RATE
from bench.peers.turnstile import Turnstile
from gen_dist.config import OptimizerConfig, TrainConfig
from gen_dist.objectives.vae import Vae
from gen_dist.presets import get_preset
from gen_dist.training.run import train as train_run
from gen_dist.training.trainer import Trainer


def config_of(
    data_root: Path, directory: Path, seed: int, steps: int = ENDLESS, *, compiled: bool = False
) -> TrainConfig:
    """The config of the run: Adam at torch's defaults and a constant rate."""
    return replace(
        get_preset("vae-mnist"),
        data="mnist",
        data_root=str(data_root),
        steps=steps,
        global_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        optimization=OptimizerConfig(),
        seed=seed,
        device="cpu",
        precision="float32",
        compile=compiled,
        run_dir=str(directory / "run"),
    )


def cycle_steps() -> int:
    """Steps after which a run has done everything once that it does between steps."""
    preset = get_preset("vae-mnist")
    return math.lcm(preset.evaluate_every, preset.sample_every, preset.checkpoint_every)


def train(data_root: Path, directory: Path, seed: int, turnstile: Turnstile, *, compiled: bool = False) -> None:
    """Train until the turnstile ends the process."""
    os.environ["GEN_DIST_CACHE"] = str(directory / "packed")
    step_seconds = 0.0
    run_step = Trainer.run_step

    def through_turnstile(trainer: Trainer, *args: Any, **more: Any) -> dict[str, Tensor]:
        nonlocal step_seconds
        start = time.perf_counter()
        logs = run_step(trainer, *args, **more)
        step_seconds += time.perf_counter() - start
        turnstile.passed(
            logs["loss"], lambda: trainer.evaluate(trainer.dataset.test)["negative_elbo"], step_seconds=step_seconds
        )
        return logs

    with mock.patch.object(Trainer, "run_step", through_turnstile), mock.patch.object(Vae, "start_at", lambda *_: None):
        train_run(config_of(data_root, directory, seed, compiled=compiled))
