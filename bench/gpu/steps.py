"""Steps on a GPU as CUDA graphs, kernel by kernel, in float32 and compiled: `python bench/gpu/steps.py --help`.

The ways of a preset take turns, a block of steps each, on images held on the device. A GPU is waited for at the end of
a block alone. Compiling and the first steps do not count.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.measured import preset_on
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.spread import spread
from gen_dist.cli import run_command
from gen_dist.config import DataConfig, TrainConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.errors import ConfigError
from gen_dist.parallel.processes import start_processes
from gen_dist.presets import presets as all_presets
from gen_dist.training.trainer import Trainer

Way = Literal["bf16", "kernel by kernel", "float32", "compiled"]
WAYS: dict[Way, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "kernel by kernel": {"precision": "bf16", "cuda_graphs": False},
    "float32": {"precision": "float32"},
    "compiled": {"precision": "bf16", "compile": True},
}
"""Changes of a preset's config. The first is the default on a GPU, with which the others are compared."""
WARM_UP_STEPS = 40
"""Enough for each kind of step to be recorded, of GANs whose generator has its turn at every fifth."""
STEPS_AT_ONCE = 24
"""Steps between two readings of the clock."""


def main(
    presets: tuple[str, ...] = ("vae-mnist", "dcgan-mnist", "dcgan-64", "sngan-cifar10", "r3gan-cifar10"),
    ways: tuple[Way, ...] = tuple(WAYS),
    rounds: int = 5,
    seconds: float = 0.25,
    device: Literal["cuda", "cpu"] = "cuda",
    out: Path | None = None,
) -> None:
    """Print a row a preset, and as the last line all figures in JSON.

    Args:
        presets: presets to train; those of colour images train on coloured shapes.
        ways: changes of the config. The others are compared with the first.
        rounds: blocks of each way.
        seconds: least length of a block.
        device: cuda, or cpu for a trial without graphs.
        out: file for the JSON as well.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; run this on a machine with one")
    if unknown := sorted(set(presets) - set(all_presets())):
        raise ConfigError(f"presets {', '.join(unknown)} are none of {', '.join(all_presets())}")
    if not presets or not ways or rounds < 1 or not seconds >= 0:
        raise ConfigError("presets, ways and rounds are at least one, and seconds is not negative")
    check_out(out)
    before = conditions()
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    figures = []
    print(f"| preset | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for preset in presets:
        measured = measure(preset_on(preset, torch.device(device)), ways, rounds, seconds)
        figures.append(measured)
        print(row(measured), flush=True)
    all_of_it = {"steps": figures, "conditions": before | {"device": gpu, "cuda": torch.version.cuda}}
    print()
    print_and_write(json.dumps(all_of_it), out)


@dataclass
class _Contestant:
    trainer: Trainer
    steps: "itertools.count[int]"
    first_steps_seconds: float
    milliseconds: list[float]


def measure(config: TrainConfig, ways: tuple[Way, ...], rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds per step of each way, and the ratios of the others to the first."""
    dataset, config = images_for(config)
    contestants = {way: contestant(replace(config, **WAYS[way]), dataset) for way in ways}
    for _ in range(rounds):
        for each in contestants.values():
            each.milliseconds.append(block(each, seconds))
    first = contestants[ways[0]].milliseconds
    for each in contestants.values():
        each.trainer.close()
    return {
        "preset": config.preset,
        "global_batch_size": config.global_batch_size,
        "ms": {way: spread(each.milliseconds) for way, each in contestants.items()},
        "ratio": {
            way: spread([own / of for own, of in zip(each.milliseconds, first, strict=True)])
            for way, each in contestants.items()
        },
        "first_steps_seconds": {way: each.first_steps_seconds for way, each in contestants.items()},
    }


def images_for(config: TrainConfig) -> tuple[Dataset, TrainConfig]:
    """The embedded digits, or in place of images that would have to be downloaded as many channels and pixels."""
    packing: DataConfig = config.packing
    if config.data != "mnist5k":
        side = packing.image_size or 32
        packing = replace(packing, channels=3, image_size=side, synthetic_images=2048)
        config = replace(config, data="synthetic", packing=packing)
    return open_dataset(config.data, config.data_root, packing, lambda _line: None), config


def contestant(config: TrainConfig, dataset: Dataset) -> _Contestant:
    """A trainer that has taken its first steps."""
    start = time.perf_counter()
    config = replace(config, steps=10**6)  # past its last step the learning rate would be negative
    trainer = Trainer(config, dataset, start_processes(config))
    steps = itertools.count()
    for step in itertools.islice(steps, WARM_UP_STEPS):
        trainer.run_step(step)
    wait(trainer)
    return _Contestant(trainer, steps, time.perf_counter() - start, [])


def block(each: _Contestant, seconds: float) -> float:
    """Milliseconds a step of a block."""
    logs = []
    start, done = time.perf_counter(), 0
    while not done or time.perf_counter() - start < seconds:
        logs += [each.trainer.run_step(step) for step in itertools.islice(each.steps, STEPS_AT_ONCE)]
        done += STEPS_AT_ONCE
        wait(each.trainer)
    return (time.perf_counter() - start) / done * 1e3


def wait(trainer: Trainer) -> None:
    """Wait for the GPU's remaining work."""
    if trainer.processes.device.type == "cuda":
        torch.cuda.synchronize()


def row(measured: dict[str, Any]) -> str:
    """In Markdown: images per second, milliseconds a step, and how many times as long it takes as the first way's."""
    cells = []
    for way, times in measured["ms"].items():
        rate, ratio = measured["global_batch_size"] / times["median"] * 1e3, measured["ratio"][way]["median"]
        cells.append(f"{rate:,.0f} images/s, {times['median']:.3f} ms ({ratio:.2f})")
    return f"| `{measured['preset']}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
