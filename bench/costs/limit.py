"""Arithmetic of a step alone, its share of the step's time, and where the rest goes.

One step of a preset is recorded: every matrix product and convolution in it, forward and backward, with the tensors it
took. Computed alone, one after another on the same memory and each in the fastest known way, these are the limit:
without other arithmetic no loop on these networks is faster. Limit and whole steps take turns; ratios are of blocks
that follow each other. Gradients that the step does not compute, such as those of the images, are not in the limit.
"""

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.costs.products import Product, plain_layers, record
from bench.costs.step_profile import BLOCK_STEPS, LARGEST_SHOWN, WARMUP_STEPS, kinds_of_steps, print_kinds, step_by_kind
from bench.measuring.conditions import conditions
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.spread import spread
from bench.measuring.temporary import temporary_directory
from gen_dist.cli import call_parsed, run_command
from gen_dist.config import TrainConfig
from gen_dist.data import open_dataset
from gen_dist.errors import ConfigError
from gen_dist.parallel.processes import start_processes
from gen_dist.presets import get_preset
from gen_dist.training.trainer import Trainer

BLOCK_SECONDS = 0.15
"""Least time of a block, which is a multiple of sixteen steps."""
TRIALS = 25
"""Timings of each way to compute a product, before the fastest is chosen."""


class Limit:
    """Products of a round of steps, each as often as it occurs."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[Product]]], images: int, device: torch.device) -> None:
        """Take products of single steps, each with the number of such steps in a round, and the images of a step."""
        self.groups = groups
        self.images = images
        self._device = device
        self.round_steps = sum(count for count, _ in groups)
        self._choose()
        self._round = [
            product.ways[product.chosen] for count, products in groups for _ in range(count) for product in products
        ]

    @property
    def flops(self) -> float:
        """Floating-point operations of the mean step."""
        return sum(count * product.flops for count, products in self.groups for product in products) / self.round_steps

    def seconds(self, steps: int) -> float:
        """Wall time of so many steps, a multiple of `round_steps`."""
        assert steps % self.round_steps == 0
        _wait(self._device)
        start = time.perf_counter()
        for _ in range(steps // self.round_steps):
            for way in self._round:
                way()
        _wait(self._device)
        return time.perf_counter() - start

    def times(self) -> list[tuple[Product, float, float]]:
        """Each product with its count in the mean step and its seconds (20th percentile)."""
        pairs = [(count, product) for count, products in self.groups for product in products]
        times = self._quiet_seconds([product.chosen for _, product in pairs])
        return [
            (product, count / self.round_steps, seconds) for (count, product), seconds in zip(pairs, times, strict=True)
        ]

    def _choose(self) -> None:
        # In the order of the step, so that earlier products empty the caches as they do there.
        products = [product for _, group in self.groups for product in group]
        found: list[dict[str, float]] = [{} for _ in products]
        for index in range(max(len(product.ways) for product in products)):
            names = [list(product.ways)[index % len(product.ways)] for product in products]
            for measured, name, seconds in zip(found, names, self._quiet_seconds(names), strict=True):
                measured[name] = min(seconds, measured.get(name, math.inf))
        for product, measured in zip(products, found, strict=True):
            product.chosen = min(measured, key=measured.__getitem__)

    def _quiet_seconds(self, names: Sequence[str]) -> list[float]:
        """Seconds of each product by its named way: the 20th percentile, free of other programs' noise."""
        products = [product for _, group in self.groups for product in group]
        ways = [product.ways[name] for product, name in zip(products, names, strict=True)]
        for each in ways:
            each()
        times = np.zeros((TRIALS, len(ways)))
        for trial in times:
            for index, each in enumerate(ways):
                _wait(self._device)
                start = time.perf_counter()
                each()
                _wait(self._device)
                trial[index] = time.perf_counter() - start
        low: list[float] = np.percentile(times, 20, axis=0).tolist()
        return low


@dataclass(frozen=True)
class Fraction:
    """Whole steps against their limit: images per second of each block, in turns."""

    step_images_per_second: list[float]
    limit_images_per_second: list[float]

    def figures(self) -> dict[str, dict[str, float]]:
        """20th, 50th and 80th percentile and number: of both, and of the step's share of the limit, round by round."""
        pairs = zip(self.step_images_per_second, self.limit_images_per_second, strict=True)
        return {
            "step": spread(self.step_images_per_second),
            "limit": spread(self.limit_images_per_second),
            "fraction": spread([step / limit for step, limit in pairs]),
        }


def main(
    presets: tyro.conf.Positional[tuple[str, ...]] = ("vae-mnist",),
    data: str | None = None,
    data_root: str = "data",
    batch_size: int | None = None,
    rounds: int = 20,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Measure presets one after another, print the figures and, as the last line, all of them in JSON.

    Args:
        presets: names of presets.
        data: source of images. None takes the preset's, and synthetic ones in place of a download.
        data_root: directory with torchvision's data sets.
        batch_size: images of a step. None takes the preset's.
        rounds: blocks of the limit and of whole steps, in turns.
        seed: key of weights, images and noise.
        out: file for the JSON as well.
    """
    if rounds < 1:
        raise ConfigError(f"rounds {rounds} is less than 1")
    if not presets:
        raise ConfigError("name at least one preset, such as vae-mnist")
    check_out(out)
    configs = [config_of(preset, data, data_root, batch_size, seed) for preset in presets]
    before = conditions()
    reports = {}
    for config in configs:
        with trainer_of(config) as trainer:
            limit = limit_of(trainer)
            fraction = fraction_of_limit(trainer, limit, rounds=rounds, show_progress=True)
            figures = fraction.figures()
            print_fraction(config, limit, figures)
            print_products(limit)
            where = None
            if trainer.processes.device.type == "cpu":
                where = step_by_kind(trainer)
                print_kinds(where, config.global_batch_size / figures["step"]["median"], limit_ms(limit, figures))
        reports[config.preset] = {
            "figures": figures,
            "gflop_of_a_step": limit.flops / 1e9,
            "batch_size": config.global_batch_size,
            "images_per_second": asdict(fraction),
            "where": where,
        }
    text = json.dumps({"presets": reports, "conditions": conditions() | {"load_average": before["load_average"]}})
    print_and_write(text, out)


def config_of(preset: str, data: str | None, data_root: str, batch_size: int | None, seed: int) -> TrainConfig:
    """A preset as it is measured: without compiling, and without a download."""
    config = replace(get_preset(preset), data_root=data_root, seed=seed, compile=False)
    if data is None and config.data != "mnist5k":
        colour = replace(config.packing, channels=3, image_size=config.packing.image_size or 32)
        config = replace(config, data="synthetic", packing=colour)
    elif data is not None:
        config = replace(config, data=data)
    return config if batch_size is None else replace(config, global_batch_size=batch_size)


@contextlib.contextmanager
def trainer_of(config: TrainConfig) -> Iterator[Trainer]:
    """The trainer of a config; its data are packed into a directory that is removed afterwards."""
    with temporary_directory() as cache:
        processes = start_processes(config)
        packing = replace(config.packing, cache_dir=config.packing.cache_dir or str(cache))
        dataset = open_dataset(config.data, config.data_root, packing, lambda _line: None)
        trainer = Trainer(config, dataset, processes)
        try:
            yield trainer
        finally:
            trainer.close()


def limit_of(trainer: Trainer) -> Limit:
    """The limit of a trainer's steps; a few of them are made for it.

    Raises:
        ConfigError: its phases are compiled, and their operations cannot be seen.
    """
    if trainer.config.compile:
        raise ConfigError(
            "a compiled step does not show its products; take the limit of the same one without --compile"
        )
    with plain_layers():
        groups = [(count, record(functools.partial(trainer.run_step, step))) for step, count in kinds_of_steps(trainer)]
    return Limit(groups, trainer.config.global_batch_size, trainer.processes.device)


def fraction_of_limit(
    trainer: Trainer, limit: Limit | None = None, *, rounds: int = 10, show_progress: bool = False
) -> Fraction:
    """Whole steps of a trainer and its limit in turns, a block of each a round. The trainer goes on from step 0."""
    limit = limit or limit_of(trainer)
    device, batch = trainer.processes.device, trainer.config.global_batch_size
    done = 0

    def steps_seconds(count: int) -> float:
        nonlocal done
        _wait(device)
        start = time.perf_counter()
        for step in range(done, done + count):
            trainer.run_step(step)
        _wait(device)
        done += count
        return time.perf_counter() - start

    steps_seconds(WARMUP_STEPS)
    limit.seconds(limit.round_steps)
    smallest = math.lcm(BLOCK_STEPS, limit.round_steps)
    block = smallest * max(1, math.ceil(BLOCK_SECONDS / steps_seconds(smallest)))
    step_rates, limit_rates = [], []
    for turn in tqdm(range(rounds), desc=trainer.config.preset, disable=not show_progress, leave=False):
        for part in ("step", "limit") if turn % 2 else ("limit", "step"):  # neither always follows the other
            if part == "step":
                step_rates.append(block * batch / steps_seconds(block))
            else:
                limit_rates.append(block * batch / limit.seconds(block))
    return Fraction(step_rates, limit_rates)


def limit_ms(limit: Limit, figures: Mapping[str, Mapping[str, float]]) -> float:
    """Milliseconds of the limit of a step, in the median."""
    return 1000 * limit.images / figures["limit"]["median"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_fraction(config: TrainConfig, limit: Limit, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Print step and limit."""
    size = config.global_batch_size
    print(f"\n{config.preset}, {size} images a step, {limit.flops / 1e9:.3f} GFLOP in its products")
    print(f"{'':28}{'p20':>10}{'median':>10}{'p80':>10}{'n':>5}{'ms a step':>12}{'GFLOP/s':>10}")
    for name in ("step", "limit"):
        figure = figures[name]
        values = "".join(f"{figure[key]:10,.0f}" for key in ("p20", "median", "p80"))
        seconds = size / figure["median"]
        print(
            f"{name + ', images/s':28}{values}{figure['n']:5}{1000 * seconds:12.3f}{limit.flops / seconds / 1e9:10.1f}"
        )
    share = figures["fraction"]
    values = "".join(f"{share[key]:10.3f}" for key in ("p20", "median", "p80"))
    print(f"{'fraction of the limit':28}{values}{share['n']:5}")


def print_products(limit: Limit) -> None:
    """Print the products of the limit, the longest first, equal ones together."""
    together: dict[tuple[str, str], tuple[float, float, int]] = {}
    for product, count, seconds in limit.times():
        key = product.name, product.chosen
        before = together.get(key, (0.0, 0.0, 0))
        together[key] = before[0] + count, before[1] + count * seconds, product.flops
    print(f"\n{'the limit is made of':60}{'a step':>8}{'ms':>9}{'GFLOP/s':>10}  by")
    ordered = sorted(together.items(), key=lambda item: -item[1][1])
    for (name, way), (count, seconds, flops) in ordered[:LARGEST_SHOWN]:
        print(f"{name:60}{count:8.3g}{1000 * seconds:9.3f}{count * flops / seconds / 1e9:10.1f}  {way}")
    if len(ordered) > LARGEST_SHOWN:
        rest = sum(seconds for _, (_, seconds, _) in ordered[LARGEST_SHOWN:])
        print(f"{f'{len(ordered) - LARGEST_SHOWN} more':68}{1000 * rest:9.3f}")


if __name__ == "__main__":
    run_command(lambda: call_parsed(main, sys.argv[1:], "bench/costs/limit.py"))
