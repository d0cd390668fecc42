"""Time of the whole training step for every preset of digits, and of its parts, on the embedded ones and the CPU.

The parts are timed right after a whole step each: what they need has then left the caches, as it has in training, and
they cost several times what a tight loop would show.
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conditions import conditions
from gen_dist import checkpoint as checkpoints
from gen_dist import parallel
from gen_dist.checkpoint import Checkpoint
from gen_dist.config import DataConfig
from gen_dist.data import Dataset, TrainBatches, open_dataset
from gen_dist.presets import PRESETS, get_preset
from gen_dist.randomness import Stream
from gen_dist.trainer import Trainer
from kernels import binarize, normal

# Normals are drawn for sixteen steps at once: a round of a whole step's benchmark is as many, so its median is fair.
STEPS_OF_A_ROUND = 16
TIMED_ROUNDS = 13
WARMUP_STEPS = 20
TIMED_DRAWS = 400
TIMED_CHECKPOINTS = 20
ROWS, PIXELS, LATENT_DIM = 192, (1, 28, 28), 20  # of `vae-mnist`


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The embedded digits, packed once for all benchmarks."""
    packing = DataConfig(cache_dir=str(tmp_path_factory.mktemp("packed")))
    return open_dataset("mnist5k", "data", packing, lambda _line: None)


@pytest.mark.parametrize("preset", [name for name, config in PRESETS.items() if config.data == "mnist5k"])
def test_whole_step(preset: str, digits: Dataset, benchmark: BenchmarkFixture) -> None:
    """Data, noise, forward, backward, optimizer and moving average of one preset."""
    trainer = _trainer(preset, digits)
    steps = itertools.count()
    logs: list[dict[str, torch.Tensor]] = []
    benchmark.pedantic(
        lambda: logs.append(trainer.run_step(next(steps))),
        rounds=TIMED_ROUNDS,
        iterations=STEPS_OF_A_ROUND,
        warmup_rounds=3,
    )
    benchmark.extra_info.update(conditions())
    _note_rate(benchmark, trainer.config.global_batch_size, "median")
    rows = trainer.average_logs(logs)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def test_gathering_a_batch(digits: Dataset, benchmark: BenchmarkFixture) -> None:
    """The keyed order, and images and labels gathered from memory."""
    batches = TrainBatches(
        digits.train,
        seed=1,
        global_batch_size=ROWS,
        micro_batches=[(0, ROWS)],
        device=torch.device("cpu"),
        resident_budget_bytes=2**31,
    )
    _after_steps(benchmark, digits, lambda rng: batches.micro_batch(int(rng[1]), 0))


def test_drawing_normals(digits: Dataset, benchmark: BenchmarkFixture) -> None:
    """Noise of one step: 192 x 20 standard normals. Look at the mean: one draw in sixteen makes those of 16 steps."""
    _after_steps(benchmark, digits, lambda rng: normal(rng, Stream.PRIOR, 0, ROWS, LATENT_DIM))


def test_binarizing(digits: Dataset, benchmark: BenchmarkFixture) -> None:
    """One batch of 192 digits."""
    images = torch.from_numpy(digits.train.images[:ROWS].copy())
    assert images.shape == (ROWS, *PIXELS)
    _after_steps(benchmark, digits, lambda rng: binarize(images, rng, Stream.BINARIZATION, 0))


def test_saving_a_checkpoint(digits: Dataset, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Tensors, digests, syncing to disk, and removing the oldest."""
    trainer = _trainer("vae-mnist", digits)
    trainer.run_step(0)  # before it the optimizer has no state
    steps = itertools.count()
    benchmark.pedantic(
        lambda: checkpoints.save(tmp_path, _checkpoint(trainer, next(steps)), trainer.config, keep=2),
        rounds=TIMED_CHECKPOINTS,
        warmup_rounds=3,
    )
    benchmark.extra_info.update(conditions())


def test_loading_a_checkpoint(digits: Dataset, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Checking digests, reading, and copying into networks and optimizer."""
    trainer = _trainer("vae-mnist", digits)
    trainer.run_step(0)
    path = checkpoints.save(tmp_path, _checkpoint(trainer, 1), trainer.config, keep=2)
    benchmark.pedantic(lambda: trainer.load(checkpoints.load(path)[0]), rounds=TIMED_CHECKPOINTS, warmup_rounds=3)
    benchmark.extra_info.update(conditions())


def _trainer(preset: str, dataset: Dataset) -> Trainer:
    config = replace(get_preset(preset), device="cpu")
    return Trainer(config, dataset, parallel.start_processes(config))


def _checkpoint(trainer: Trainer, step: int) -> Checkpoint:
    facts = {"data_digest": trainer.dataset.digest, "loss_scales": trainer.loss_scales()}
    return Checkpoint(step, trainer.tensors(), facts)


def _after_steps(benchmark: BenchmarkFixture, dataset: Dataset, part: Any) -> None:
    """Time `part(rng)`, each time after a whole step of `vae-mnist`; rng int64 [2] is (seed, step)."""
    trainer = _trainer("vae-mnist", dataset)
    steps = itertools.count()

    def setup() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        step = next(steps)
        trainer.run_step(step)
        return (torch.tensor([1, step]),), {}

    benchmark.pedantic(part, setup=setup, rounds=TIMED_DRAWS, warmup_rounds=WARMUP_STEPS)
    benchmark.extra_info.update(conditions())
    _note_rate(benchmark, ROWS, "mean")


def _note_rate(benchmark: BenchmarkFixture, images: int, of: str) -> None:
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["images_per_second"] = round(images / getattr(benchmark.stats.stats, of))
