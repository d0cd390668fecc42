"""Cost of `--shards` in the time of a step: `python bench/costs/shards_cost.py --help`; torchrun starts several of it.

Trainers with and without shards take turns, block by block, in the same processes, one thread each. A shard computes a
part of the batch by itself, with gradients of its own, so its operations are smaller and there are more of them.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # threads are counted when torch is imported
    os.environ.update(OMP_NUM_THREADS="1", GEN_DIST_THREADS="1")

import torch
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.costs.limit import config_of
from bench.costs.step_profile import kinds_of_steps
from bench.measuring.conditions import conditions
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.spread import spread, spread_of_ratios
from bench.measuring.temporary import temporary_directory
from gen_dist.cli import run_command
from gen_dist.config import TrainConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.parallel.collectives import in_main, sum_over_processes
from gen_dist.parallel.processes import Processes, end_process, start_processes
from gen_dist.training.trainer import Trainer

PRESETS = ("vae-mnist", "iwae-mnist", "dcgan-mnist", "sngan-cifar10", "r3gan-mnist", "kl-mnist", "vq-mnist")
BLOCK_SECONDS = 0.3
"""Least time of a block, which has every kind of step."""


@dataclass
class Turns:
    """A trainer, the number of its next step, and the seconds of a step in each of its blocks."""

    trainer: Trainer
    next_step: int
    steps: int
    seconds: list[float]
    clock: Callable[[], float] = time.perf_counter

    def take(self, *, counts: bool = True) -> float:
        """Train for a block, which all processes begin together. The slowest one's time counts, if it counts."""
        sum_over_processes(torch.zeros(1))
        start = self.clock()
        for step in range(self.next_step, self.next_step + self.steps):
            self.trainer.run_step(step)
        sum_over_processes(torch.zeros(1))
        self.next_step += self.steps
        seconds = (self.clock() - start) / self.steps
        if counts:
            self.seconds.append(seconds)
        return seconds


def main(
    presets: tyro.conf.Positional[tuple[str, ...]] = PRESETS,
    shards: tuple[int, ...] = (2, 8),
    rounds: int = 10,
    data: str | None = None,
    data_root: str = "data",
    batch_size: int | None = None,
    processor_time: bool = False,
    out: Path | None = None,
) -> None:
    """Measure presets one after another; print a row for each and, as the last line, all figures in JSON.

    Args:
        presets: names of presets.
        shards: numbers of shards, each beside training without.
        rounds: blocks of each trainer.
        data: source of images. None takes the preset's, and synthetic ones in place of a download.
        data_root: directory with torchvision's data sets.
        batch_size: images of a process in a step. None takes the preset's batch.
        processor_time: compare the process's processor time, which other programs hardly change. For one process:
            those that wait for others count some of that time.
        out: file for the JSON as well.
    """
    check_out(out)
    clock = time.process_time if processor_time else time.perf_counter
    before, reports = conditions() | {"clock": "processor" if processor_time else "wall"}, {}
    for preset in presets:
        config = replace(config_of(preset, data, data_root, batch_size, 0), device="cpu", steps=10**6)
        processes = start_processes(config)
        config = replace(config, global_batch_size=processes.world_size * config.global_batch_size)
        with temporary_directory() as cache:
            path = in_main(lambda cache=cache: str(cache), processes)  # type: ignore[misc]
            dataset = open_dataset(config.data, data_root, replace(config.packing, cache_dir=path), lambda _line: None)
            reports[preset] = found = measure(config, dataset, processes, shards, rounds, clock)
        if processes.is_main:
            print(row_of(preset, found), flush=True)
    results = {"presets": reports, "conditions": before | {"processes": processes.world_size, "threads": 1}}
    if processes.is_main:
        print_and_write(json.dumps(results), out)
    if processes.world_size > 1:
        end_process(0)


def measure(
    config: TrainConfig,
    dataset: Dataset,
    processes: Processes,
    shards: Sequence[int],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Seconds of a step without shards, and the ratios to it with each number of them, round by round."""
    turns = {number: turns_of(config, number, dataset, processes, clock) for number in (None, *shards)}
    for turn in range(rounds):
        order = list(turns.values())
        for one in order[turn % len(order) :] + order[: turn % len(order)]:  # none always follows the same other one
            one.take()
    plain = turns.pop(None)
    for one in (plain, *turns.values()):
        one.trainer.close()
    return {
        "images_of_a_process": config.global_batch_size // processes.world_size,
        "step_seconds": spread(plain.seconds),
        "ratios": {number: spread_of_ratios(one.seconds, plain.seconds) for number, one in turns.items()},
    }


def turns_of(
    config: TrainConfig, shards: int | None, dataset: Dataset, processes: Processes, clock: Callable[[], float]
) -> Turns:
    """Make a trainer, warm it up, and choose its block. It begins where all phases and penalties take part."""
    # Shards refuse the statistics of a shard alone.
    trainer = Trainer(replace(config, shards=shards, sync_batch_norm=shards is not None), dataset, processes)
    phases = trainer.objective.phases().values()
    every = sum(count for _, count in kinds_of_steps(trainer))
    first = max(start for phase in phases for start in (phase.first_step, phase.first_penalized_step))
    turns = Turns(trainer, math.ceil(first / every) * every, every, [], clock)
    turns.take(counts=False)
    seconds = torch.tensor([turns.take(counts=False)])
    mean = float(sum_over_processes(seconds)) / processes.world_size  # the same number of steps in all processes
    turns.steps = every * max(1, math.ceil(BLOCK_SECONDS / (every * mean)))
    turns.take(counts=False)
    return turns


def row_of(preset: str, found: Mapping[str, Any]) -> str:
    """A row of a table: preset, images, milliseconds of a step without shards, and ratios with them."""
    step = found["step_seconds"]
    cells = [f"`{preset}`", str(found["images_of_a_process"]), f"{1e3 * step['median']:.1f}"]
    for figure in found["ratios"].values():
        cells.append(f"{figure['median']:.2f} ({figure['p20']:.2f} to {figure['p80']:.2f})")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
