"""Time to a test negative ELBO on full MNIST, ours against the textbook's.

The two take turns on one machine: a run of `vae-mnist` before, in the middle of and after each run of the recipe. Ours
are runs as a user makes them, each in a new process with a new run directory and nothing packed yet. The recipe has a
process of its own, for our runs change settings of theirs. Imports, and the recipe's opening of the data, count for
neither.
"""

import functools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.temporary import temporary_directory
from bench.peers.recipe import Epoch, Recipe

EPOCHS_OF_A_TURN = 5
TURNS = 2
BAR = "test negative ELBO <= 105.6 nats in <= 5 epochs, training <= 1/10 of the recipe's 10 epochs"


@dataclass(frozen=True)
class Ours:
    """One run of `vae-mnist`."""

    seed: int
    training_seconds: float
    """As in the run's summary.json: without evaluations, pictures and checkpoints."""
    whole_seconds: float
    """Wall time of the call: with packing the images and all that a run writes."""
    test_negative_elbo: float
    """Nats per test image: real-valued pixels, one latent sample."""
    epochs: float
    threads: int


def main(data_root: Path, repeats: int = 3, steps: int | None = None, seed: int = 0) -> None:
    """Measure both, print the figures and, as the last line, all of them in JSON.

    Args:
        data_root: directory with torchvision's MNIST; a missing one is downloaded to there.
        repeats: runs of the recipe's 10 epochs; each has three runs of ours around it.
        steps: optimizer steps of our runs. None is what the preset says.
        seed: the first seed; runs of one kind have consecutive ones.
    """
    before = conditions()
    ours: list[Ours] = []
    recipes: list[list[Epoch]] = []
    for repeat in range(repeats):
        with new_process() as recipe:
            opened = recipe.submit(recipe_epochs, data_root, seed + repeat, 0)
            recipes.append(opened.result())
            ours.append(run_of_ours(data_root, steps, seed + len(ours)))
            for _ in range(TURNS):
                recipes[-1] += recipe.submit(recipe_epochs, data_root, seed + repeat, EPOCHS_OF_A_TURN).result()
                ours.append(run_of_ours(data_root, steps, seed + len(ours)))
    figures = summarize(ours, recipes)
    print_report(figures, ours)
    runs = {
        "vae_mnist_runs": [asdict(run) for run in ours],
        "recipe_runs": [[epoch._asdict() for epoch in epochs] for epochs in recipes],
    }
    print(json.dumps({"figures": figures, "conditions": before, **runs}))


def new_process() -> ProcessPoolExecutor:
    """A fresh interpreter that runs one call after another."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@functools.cache
def recipe_of_this_process(data_root: Path, seed: int) -> Recipe:
    """The recipe that goes on from call to call."""
    return Recipe(data_root, seed)


def recipe_epochs(data_root: Path, seed: int, count: int) -> list[Epoch]:
    """The next epochs of the recipe in this process."""
    recipe = recipe_of_this_process(data_root, seed)
    return [recipe.epoch() for _ in range(count)]


def run_of_ours(data_root: Path, steps: int | None, seed: int) -> Ours:
    """A whole run of `vae-mnist` in a new process."""
    with new_process() as process:
        return process.submit(train_ours, data_root, steps, seed).result()


def train_ours(data_root: Path, steps: int | None, seed: int) -> Ours:
    """Train `vae-mnist` in this process, in directories that are removed afterwards."""
    from bench.measuring.finished import train_to_the_end
    from gen_dist.presets import get_preset

    with temporary_directory() as directory:
        os.environ["GEN_DIST_CACHE"] = f"{directory}/packed"
        config = get_preset("vae-mnist")
        config = replace(config, data="mnist", data_root=str(data_root), seed=seed, steps=steps or config.steps)
        config = replace(config, device="cpu", run_dir=f"{directory}/run")
        start = time.perf_counter()
        outcome = train_to_the_end(config)
        whole_seconds = time.perf_counter() - start
        summary = json.loads((outcome.run_path / "summary.json").read_text())
        threads = json.loads((outcome.run_path / "environment.json").read_text())["torch_threads"]
    elbo = summary["final"]["test/negative_elbo"]
    return Ours(seed, summary["training_seconds"], whole_seconds, elbo, summary["epochs"], threads)


def summarize(ours: list[Ours], recipes: list[list[Epoch]]) -> dict[str, Any]:
    """Median, extremes and number of each figure, and the ratios of medians."""
    measured = {
        "recipe_seconds": [sum(epoch.seconds for epoch in epochs) for epochs in recipes],
        "recipe_epoch_seconds": [epoch.seconds for epochs in recipes for epoch in epochs],
        "recipe_test_negative_elbo": [epochs[-1].test_negative_elbo for epochs in recipes],
        "training_seconds": [run.training_seconds for run in ours],
        "whole_seconds": [run.whole_seconds for run in ours],
        "test_negative_elbo": [run.test_negative_elbo for run in ours],
        "epochs": [run.epochs for run in ours],
    }
    figures: dict[str, Any] = {
        name: {"median": float(np.median(values)), "least": min(values), "most": max(values), "n": len(values)}
        for name, values in measured.items()
    }
    for name in ("training_seconds", "whole_seconds"):
        figures[f"recipe_to_{name}"] = figures["recipe_seconds"]["median"] / figures[name]["median"]
    return figures


def print_report(figures: dict[str, Any], ours: list[Ours]) -> None:
    """Print the figures."""
    print(f"{'vae-mnist':28}{'seed':>6}{'training s':>12}{'whole s':>10}{'epochs':>8}{'test negative ELBO':>20}")
    for run in ours:
        print(
            f"{'':28}{run.seed:6}{run.training_seconds:12.2f}{run.whole_seconds:10.2f}{run.epochs:8.2f}"
            f"{run.test_negative_elbo:20.2f}"
        )
    print(f"{'':28}{'median':>9}{'least':>9}{'most':>9}{'n':>4}")
    for name, figure in figures.items():
        label = name.replace("_", " ")
        if isinstance(figure, dict):
            spread = "".join(f"{figure[key]:9.2f}" for key in ("median", "least", "most"))
            print(f"{label:28}{spread}{figure['n']:4}")
        else:
            print(f"{label:28}{figure:9.2f}   (ratio of medians)")
    print(f"bar: {BAR}")


if __name__ == "__main__":
    tyro.cli(main)
