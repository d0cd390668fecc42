"""Images per second of `dcgan-64` against the textbook's loop on the same nets.

The two take turns on one machine, a block of steps each, on the same images, held in memory: the loop's are floats
already. It has a process of its own, for our trainer changes settings of its process, and as many threads as ours.
Before anything is timed, both take one step from the same weights, images and latents, and have to find the same
losses.
"""

import functools
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.spread import spread, spread_of_ratios
from bench.measuring.temporary import temporary_directory
from bench.peers.dcgan_loop import PlainLoop
from gen_dist.data import TrainBatches, open_dataset
from gen_dist.kernels import Key, normal
from gen_dist.objectives.adversarial import signed_unit
from gen_dist.parallel.processes import start_processes
from gen_dist.presets import get_preset
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer

PRESET = "dcgan-64"
BAR = 1.4
"""Images per second of ours to those of the loop, at least."""
LOSS_TOLERANCE = 1e-4
"""Relative: what rounding makes of one step's losses is a hundredth of it."""
BATCHES = 16
"""Batches of float images that the loop goes round; ours are gathered anew at every step."""

Array = NDArray[np.float32]


def main(
    data: str = "synthetic",
    data_root: str = "data",
    rounds: int = 20,
    steps: int = 3,
    warmup_steps: int = 3,
    seed: int = 0,
) -> None:
    """Check that both learn the same, measure both, print the figures and, as the last line, all of them in JSON.

    Args:
        data: images to learn, at 64 x 64 pixels and with 3 channels: synthetic, cifar10, or any other source.
        data_root: directory with torchvision's data sets; a missing one is downloaded to there.
        rounds: blocks of steps that are timed, of each.
        steps: steps in a block.
        warmup_steps: steps of each that are not timed.
        seed: key of weights, images and latents.
    """
    with temporary_directory() as directory, new_process() as other:
        trainer, batches = ours(data, data_root, seed, str(directory))
        before = conditions()
        config = trainer.config
        images = [signed_unit(batches.micro_batch(step, 0)[0]).numpy() for step in range(BATCHES)]
        other.submit(start_loop, torch.get_num_threads(), images, seed).result()
        difference = difference_of_losses(trainer, other)
        print(
            f"after one step the losses differ by {difference:.1e} of their value, at most {LOSS_TOLERANCE:g} is fair"
        )
        if not difference <= LOSS_TOLERANCE:
            sys.exit("the two do not learn the same, so their speeds do not compare")
        block_of_ours(trainer, 1, warmup_steps)
        other.submit(block_of_loop, warmup_steps).result()
        seconds: dict[str, list[float]] = {"ours": [], "loop": []}
        for turn in range(rounds):
            order = ("ours", "loop") if turn % 2 else ("loop", "ours")  # neither always follows the other
            for name in order:
                if name == "ours":
                    seconds[name].append(block_of_ours(trainer, 1 + warmup_steps + turn * steps, steps))
                else:
                    seconds[name].append(other.submit(block_of_loop, steps).result())
        trainer.close()
        batches.close()
    rates = {name: [steps * config.global_batch_size / value for value in values] for name, values in seconds.items()}
    figures = summarize(rates)
    print_report(figures, steps)
    facts = {"data": data, "steps_of_a_block": steps, "loss_difference": difference}
    print(json.dumps({"figures": figures, "conditions": before, **facts, "images_per_second": rates}))


def new_process() -> ProcessPoolExecutor:
    """A fresh interpreter that runs one call after another."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def ours(data: str, data_root: str, seed: int, cache: str) -> tuple[Trainer, TrainBatches]:
    """The trainer of the preset on the CPU, and the batches of images that it takes."""
    config = replace(get_preset(PRESET), data=data, data_root=data_root, seed=seed, device="cpu", precision="float32")
    config = replace(config, packing=replace(config.packing, channels=3, cache_dir=cache))
    processes = start_processes(config)
    dataset = open_dataset(data, data_root, config.packing)
    batches = TrainBatches(
        dataset.train,
        seed=seed,
        global_batch_size=config.global_batch_size,
        micro_batches=[(0, config.global_batch_size)],
        device=processes.device,
        resident_budget_bytes=0,
    )
    return Trainer(config, dataset, processes), batches


def block_of_ours(trainer: Trainer, first: int, steps: int) -> float:
    """Seconds of some steps, from number `first` on: data, both phases, and the logs kept."""
    start = time.perf_counter()
    logs = [trainer.run_step(step) for step in range(first, first + steps)]
    seconds = time.perf_counter() - start
    assert all(bool(value.isfinite().all()) for log in logs for value in log.values())
    return seconds


@functools.cache
def loop_of_this_process() -> tuple[PlainLoop, list[Tensor]]:
    """The loop, and the list that its images are in."""
    return PlainLoop(), []


def start_loop(threads: int, images: list[Array], seed: int) -> None:
    """Have this process hold a loop and batches of images float32 [B, 3, 64, 64] in -1..1."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    loop_of_this_process()[1].extend(map(torch.from_numpy, images))


def block_of_loop(steps: int) -> float:
    """Seconds of some steps."""
    loop, batches = loop_of_this_process()
    start = time.perf_counter()
    for step in range(steps):
        images = batches[step % len(batches)]
        losses = loop.step(images, torch.randn(len(images), loop.latent_dim))
        assert all(map(np.isfinite, losses.values()))
    return time.perf_counter() - start


def losses_of_loop(generator: list[Array], discriminator: list[Array], latents: Array) -> dict[str, float]:
    """Losses of one step on the first batch, from these weights, with latents [B, D]."""
    loop, batches = loop_of_this_process()
    loop.load(*([torch.from_numpy(value) for value in values] for values in (generator, discriminator)))
    fake = loop.generate(torch.from_numpy(latents))
    # The loop would begin with its discriminator; ours begins with the generator.
    return loop.generator_turn(fake) | loop.discriminator_turn(batches[0], fake)


def difference_of_losses(trainer: Trainer, other: ProcessPoolExecutor) -> float:
    """The largest relative difference between the losses of our first step and the loop's."""
    config = trainer.config
    key, size = torch.tensor([config.seed, 0]), (config.global_batch_size, config.network.latent_dim)
    latents = normal(Key(key, Stream.GENERATOR_LATENTS, 0), *size).numpy()
    networks = trainer.objective.networks
    generator, discriminator = (
        [parameter.detach().numpy().copy() for parameter in networks[name].parameters()]
        for name in ("generator", "discriminator")
    )
    theirs = other.submit(losses_of_loop, generator, discriminator, latents).result()
    logs = trainer.run_step(0)
    losses = [(float(logs[f"{name}/loss"]), theirs[f"{name}_loss"]) for name in networks]
    return max(abs(our - their) / abs(their) for our, their in losses)


def summarize(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """20th, 50th and 80th percentile and number of each figure, and of their ratio by rounds."""
    figures = {name: spread(values) for name, values in rates.items()}
    return {**figures, "ratio": spread_of_ratios(rates["ours"], rates["loop"])}


def print_report(figures: dict[str, Any], steps: int) -> None:
    """Print the figures."""
    print(f"{'images per second':36}{'p20':>9}{'median':>9}{'p80':>9}{'n':>5}   (n: blocks of {steps} steps)")
    labels = {"loop": "the plain loop", "ours": PRESET, "ratio": "ratio, by rounds"}
    for name, label in labels.items():
        figure = figures[name]
        columns = "".join(f"{figure[key]:9.2f}" for key in ("p20", "median", "p80"))
        print(f"{label:36}{columns}{figure['n']:5}")
    print(f"bar: at least {BAR} times the plain loop")


if __name__ == "__main__":
    tyro.cli(main)
