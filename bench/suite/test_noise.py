"""Keyed draws of one step beside whole steps: `python -m pytest bench/suite/test_noise.py`.

Each draw is timed right after a whole step, when its data have left the caches as in training. It costs several times
as much as in a tight loop. bench/costs/noise_cost.py compares it with torch's generator within the step.
"""

import itertools
from collections.abc import Callable

import pytest
import torch

from bench.measuring.measured import Measurement, preset_on
from gen_dist.data import Dataset
from gen_dist.kernels import Key, binarize, normal
from gen_dist.parallel.processes import start_processes
from gen_dist.randomness import Stream
from gen_dist.training.trainer import Trainer

DRAWS = 200
WARMUP_STEPS = 16
PRESET = "vae-mnist"
ROWS, LATENT_DIM = 192, 20  # of the preset

AfterSteps = Callable[..., None]


@pytest.fixture
def after_steps(measurement: Measurement, digits: Dataset, device: torch.device) -> AfterSteps:
    """Times `part(rng)`, each time after a whole step; rng int64 [2] is (seed, step)."""
    config = preset_on(PRESET, device)
    trainer = Trainer(config, digits, start_processes(config))
    steps = itertools.count()

    def setup() -> tuple[tuple[torch.Tensor], dict[str, object]]:
        step = next(steps)
        trainer.run_step(step)
        return (torch.tensor([1, step], device=device),), {}

    def timed(part: Callable[[torch.Tensor], object], of: str) -> None:
        measurement.time(part, setup=setup, rounds=DRAWS, warmup_rounds=WARMUP_STEPS, images=ROWS, of=of)

    return timed


def test_drawing_normals(after_steps: AfterSteps) -> None:
    """Noise of one step. The rate is at the mean: one draw in sixteen makes those of sixteen steps."""
    after_steps(lambda rng: normal(Key(rng, Stream.PRIOR, 0), ROWS, LATENT_DIM), "mean")


def test_binarizing(after_steps: AfterSteps, digits: Dataset, device: torch.device) -> None:
    """A bit for each pixel of one batch."""
    images = torch.from_numpy(digits.train.images[:ROWS].copy()).to(device)
    after_steps(lambda rng: binarize(images, Key(rng, Stream.BINARIZATION, 0)), "median")
