"""Share of the training step that keyed randomness costs: `python bench/costs/noise_cost.py --help`.

Calls that draw are timed whole inside `Trainer.run_step`, where matrix products have emptied the caches. Any trainer
must draw noise: in every other turn torch's generator draws instead, which separates the cost of the keys from that of
randomness.
"""

import contextlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from gen_dist.data import open_dataset
from gen_dist.kernels import Key
from gen_dist.parallel.processes import start_processes
from gen_dist.presets import get_preset
from gen_dist.training.trainer import Trainer

PRESETS = ("vae-mnist", "iwae-mnist")

# Noise is drawn for step 0, then for sixteen steps at once: warm-up and blocks end where such rounds end.
WARMUP_STEPS = 33
BLOCK_STEPS = 80


class HiddenState:
    """Substitutes that draw from torch's generator, by the keyed function that each replaces."""

    def __init__(self) -> None:
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def order(
        self, count: int, seed: int, step: int, global_batch_size: int, first_row: int, rows: int
    ) -> NDArray[np.int64]:
        """The next images of a permutation that is drawn anew each epoch; the last, incomplete batch is dropped."""
        epoch, batch = divmod(step, count // global_batch_size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, torch.randperm(count).numpy()
        start = batch * global_batch_size + first_row
        return self._permutation[start : start + rows]

    def normal(self, key: Key, rows: int, width: int) -> Tensor:
        """Standard normals float32 [rows, width]."""
        return torch.randn(rows, width)

    def binarize(self, images: Tensor, key: Key) -> Tensor:
        """Bernoulli draws of the intensities of uint8 images, as float32."""
        return torch.bernoulli(images.float().div_(255.0))


_HIDDEN = HiddenState()
DRAWS: dict[str, tuple[str, Callable[..., Any]]] = {
    "data order": ("gen_dist.data.batches.image_indices", _HIDDEN.order),
    "noise": ("gen_dist.kernels.latent.normal", _HIDDEN.normal),
    "binarization": ("gen_dist.objectives.vae.binarize", _HIDDEN.binarize),
}
"""Functions that draw, under the names by which the step calls them, and their substitutes without keys."""


def main(blocks: int = 10, data: str = "mnist5k", data_root: str = "data", seed: int = 0) -> None:
    """Time the draws of `vae-mnist` and `iwae-mnist` within their steps, presets and kinds of randomness in turn.

    Args:
        blocks: number of turns of 80 steps that each preset takes with each kind of randomness.
        data: source of images.
        data_root: directory with the torchvision data sets.
        seed: key of the randomness.
    """
    before = conditions()
    trainers = {}
    for name in PRESETS:
        steps = WARMUP_STEPS + blocks * BLOCK_STEPS
        config = replace(get_preset(name), data=data, data_root=data_root, seed=seed, steps=steps, device="cpu")
        processes = start_processes(config)
        trainers[name] = Trainer(config, open_dataset(data, data_root, config.packing), processes)
        timed_steps(trainers[name], range(WARMUP_STEPS), keyed=True)
    keyed: dict[str, list[NDArray[np.float64]]] = {name: [] for name in PRESETS}
    hidden: dict[str, list[NDArray[np.float64]]] = {name: [] for name in PRESETS}
    for block in range(blocks):
        first = WARMUP_STEPS + block * BLOCK_STEPS
        for name, trainer in trainers.items():
            steps_of_block = range(first, first + BLOCK_STEPS)
            keyed[name].append(timed_steps(trainer, steps_of_block, keyed=True))
            hidden[name].append(timed_steps(trainer, steps_of_block, keyed=False))

    print(f"{blocks * BLOCK_STEPS} steps of each preset with each kind, in turns of {BLOCK_STEPS}; us per step")
    print(f"{'':28}{'mean':>9}{'p20':>9}{'median':>9}{'p80':>9}   share of the step (within a turn, p20 to p80)")
    for name in PRESETS:
        print_table(f"{name}, keyed", np.stack(keyed[name]))
        print_table(f"{name}, hidden state", np.stack(hidden[name]))
    print(json.dumps(conditions() | {"load_average": before["load_average"]}))


def timed_steps(trainer: Trainer, steps: range, *, keyed: bool) -> NDArray[np.float64]:
    """Train some steps: seconds of each whole step and of each kind of draw within it, [steps, 1 + DRAWS]."""
    times = np.zeros((len(steps), 1 + len(DRAWS)))
    drawn = dict.fromkeys(DRAWS, 0.0)
    with timing_draws(drawn, keyed):
        for row, step in zip(times, steps, strict=True):
            start = time.perf_counter()
            trainer.run_step(step)
            row[0] = time.perf_counter() - start
            row[1:] = list(drawn.values())
            drawn.update(dict.fromkeys(DRAWS, 0.0))
    return times


@contextlib.contextmanager
def timing_draws(seconds: dict[str, float], keyed: bool) -> Iterator[None]:
    """Context that adds the time of every draw to `seconds`, by kind. Draws without keys use torch's generator."""

    def timed(kind: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = draw(*args, **kwargs)
            seconds[kind] += time.perf_counter() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        for kind, (place, hidden) in DRAWS.items():
            stack.enter_context(mock.patch(place, timed(kind, pkgutil.resolve_name(place) if keyed else hidden)))
        yield


def print_table(name: str, times: NDArray[np.float64]) -> None:
    """Rows of one preset from times [turns, steps, 1 + DRAWS] in seconds.

    A share is the mean of the draws over all steps, since some are made for many steps at once, of the mean step in the
    median turn: a machine that stalls in some turns would make the draws look cheap.
    """
    columns = {name: times[:, :, 0]}
    columns |= {f"  {kind}": times[:, :, 1 + index] for index, kind in enumerate(DRAWS)}
    columns["  all randomness"] = times[:, :, 1:].sum(axis=2)
    step_seconds = np.median(times[:, :, 0].mean(axis=1))
    for label, seconds in columns.items():
        if not seconds.any():
            continue
        low, median, high = np.percentile(seconds, (20, 50, 80)) * 1e6
        spread = np.percentile(seconds.sum(axis=1) / times[:, :, 0].sum(axis=1), (20, 80))
        share = f"   {seconds.mean() / step_seconds:6.2%}  ({spread[0]:.2%} to {spread[1]:.2%})"
        print(
            f"{label:28}{seconds.mean() * 1e6:9.1f}{low:9.1f}{median:9.1f}{high:9.1f}{'' if label == name else share}"
        )


if __name__ == "__main__":
    tyro.cli(main)
