"""Whole training steps of every family of presets, with the time of their phases.

Data, noise, forward, backward, optimizer and moving average, on the embedded digits, eager or compiled (`--compiled`),
in each precision that the device has arithmetic for.
"""

import itertools
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.costs.limit import fraction_of_limit
from bench.measuring.measured import Measurement, milliseconds, preset_on
from gen_dist.config import DataConfig, Precision, TrainConfig, VaeConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.parallel.processes import start_processes
from gen_dist.training.trainer import Trainer

# Normals are drawn for sixteen steps at once: a round is as many, or a multiple, so that its time is fair.
STEPS_OF_A_ROUND = 16
WATCHED_ROUNDS = 1


@dataclass(frozen=True)
class Family:
    """A preset that represents its family."""

    preset: str
    rounds: int = 9
    changes: dict[str, Any] = field(default_factory=dict)
    """Changes of the preset's config."""
    changes_on_cpu: dict[str, Any] = field(default_factory=dict)
    """Further changes on a CPU, for networks that were made for GPUs."""
    steps: int = STEPS_OF_A_ROUND
    """Steps of a round, at least."""
    limit_rounds: int = 3
    """Turns that steps and their limit take, eager. 0 where sixteen steps and whole turns of all phases make a block
    too long: `bench/costs/limit.py PRESET` takes its time."""


FAMILIES = {
    "autoencoder": Family("ae-mnist"),
    "vae": Family("vae-mnist"),
    "vae-conv": Family("vae-conv-mnist", rounds=5),
    "vae-2d": Family("vae-2d-mnist"),
    "iwae-k5": Family(
        "iwae-mnist",
        rounds=5,
        changes={"objective": VaeConfig(dynamic_binarization=True, gradient="path", importance_samples=5)},
    ),
    "gan": Family("gan-mnist"),
    "cgan": Family("cgan-mnist", rounds=5),
    "dcgan": Family("dcgan-mnist", rounds=5),
    "wgan-gp": Family("wgan-gp-mnist", rounds=3, limit_rounds=0),
    "sngan": Family("sngan-cifar10", rounds=3, changes_on_cpu={"global_batch_size": 4}, steps=1, limit_rounds=0),
    "r3gan": Family("r3gan-mnist", rounds=5),
    "vae-gan": Family("vae-gan-mnist", rounds=3),
}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_step(
    measurement: Measurement,
    family: str,
    mode: str,
    precision: Precision,
    digits: Dataset,
    cache: DataConfig,
    device: torch.device,
) -> None:
    """One step after another; then some with a stopwatch between their parts, and some in turns with their limit."""
    if (reason := why_without(precision, device)) is not None:
        pytest.skip(reason)
    config = config_of(FAMILIES[family], device, compiled=mode == "compiled", precision=precision)
    trainer = Trainer(config, digits_or_colours(config, digits, cache), start_processes(config))
    steps = itertools.count()
    logs: list[dict[str, torch.Tensor]] = []
    iterations = steps_of_a_round(config, FAMILIES[family].steps)
    measurement.time(
        lambda: logs.append(trainer.run_step(next(steps))),
        rounds=FAMILIES[family].rounds,
        iterations=iterations,
        images=config.global_batch_size,
    )
    rows = trainer.average_logs(logs)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    measurement.note(preset=config.preset, precision=precision, global_batch_size=config.global_batch_size)
    if measurement.timed:
        measurement.note(parts_ms=times_of_parts(trainer, steps, WATCHED_ROUNDS * iterations))
        if mode == "eager" and FAMILIES[family].limit_rounds:
            figures = fraction_of_limit(trainer, rounds=FAMILIES[family].limit_rounds).figures()
            measurement.note(fraction_of_limit=figures["fraction"]["median"], limit=figures)
    trainer.close()


def config_of(family: Family, device: torch.device, *, compiled: bool, precision: Precision) -> TrainConfig:
    """The preset with an endless schedule: past its last step the learning rate would be negative."""
    config = replace(preset_on(family.preset, device), steps=10**6, compile=compiled, precision=precision)
    return replace(config, **family.changes, **(family.changes_on_cpu if device.type == "cpu" else {}))


def digits_or_colours(config: TrainConfig, digits: Dataset, cache: DataConfig) -> Dataset:
    """The embedded digits, or shapes in colour for a preset that learns such: a step takes as long with these."""
    if config.data == "mnist5k":
        return digits
    colours = replace(cache, channels=3, image_size=config.packing.image_size or 32, synthetic_images=512)
    return open_dataset("synthetic", "data", colours, lambda _line: None)


def steps_of_a_round(config: TrainConfig, least: int) -> int:
    """Whole turns of phases and penalties that are not due at each step."""
    objective = config.objective
    turn = math.lcm(getattr(objective, "generator_every", 1), getattr(objective, "penalty_every", 1))
    return turn * math.ceil(least / turn)


def why_without(precision: Precision, device: torch.device) -> str | None:
    """Reason why a precision is not timed on a device, or None if it is."""
    if device.type == "cuda":
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "this GPU has no bf16 arithmetic"
        return None
    if precision == "fp16":
        return "fp16 is for GPUs"
    if precision == "bf16" and not cpu_has_bf16():
        return "this processor has no bf16 arithmetic (avx512_bf16, amx_bf16), so that torch emulates it, slowly"
    return None


def cpu_has_bf16() -> bool:
    """True if the processor reports instructions for bf16."""
    told = Path("/proc/cpuinfo")
    flags = told.read_text().split() if told.exists() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def times_of_parts(trainer: Trainer, steps: "itertools.count[int]", count: int) -> dict[str, dict[str, float]]:
    """Percentiles of each part's time in the steps that have it, and their number. Waits for a GPU."""
    seconds: dict[str, list[float]] = {}
    last = 0.0

    def lap(part: str) -> None:
        nonlocal last
        if trainer.processes.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds.setdefault(part, []).append(now - last)
        last = now

    for _ in range(count):
        last = time.perf_counter()
        trainer.run_step(next(steps), lap)
    return {part: milliseconds(times) | {"steps": len(times)} for part, times in seconds.items()}
