"""Two processes against one, briefly; bench/scaling/ measures it at length.

Blocks of the two joined processes are timed. Before each of them one process trains alone, then both train separately,
so that ratios are of blocks in turns.
"""

import os
from unittest import mock

import numpy as np
import pytest
import torch

from bench.measuring.measured import Measurement
from bench.measuring.spread import spread
from bench.scaling.processes import BLOCK_STEPS, MODES, Mode, by_all, seconds_of_step, two_processes
from gen_dist.config import DataConfig
from gen_dist.data import Dataset

ROWS = {"vae-mnist": (512,), "dcgan-mnist": (64,)}
"""Images of a process in a step, of each preset."""
ROUNDS = 5


@pytest.mark.parametrize("preset", ROWS)
def test_two_processes(
    measurement: Measurement, preset: str, cache: DataConfig, digits: Dataset, device: torch.device
) -> None:
    """A block of steps of one model on two processes of a thread each."""
    if device.type != "cpu":
        pytest.skip("bench/scaling/scaling.py lets processes of CPUs take turns")
    rows = ROWS[preset]
    seconds: dict[Mode, list[float]] = {mode: [] for mode in MODES}
    with mock.patch.dict(os.environ), two_processes() as members:
        options = {"data": "mnist5k", "data_root": "data", "seed": 0, "device": "cpu"}
        by_all(members, "prepare", options, cache.cache_dir, {preset: rows})

        def block(mode: Mode) -> None:
            seconds[mode].append(seconds_of_step(members, len(seconds[mode]), preset, rows[0], mode))

        def others() -> None:
            block("alone")
            block("at once")

        measurement.time(lambda: block("joined"), setup=others, rounds=ROUNDS, images=2 * rows[0] * BLOCK_STEPS)
    alone, at_once, joined = (np.array(seconds[mode]) for mode in MODES)
    measurement.note(
        preset=preset,
        threads=1,
        processes=2,
        steps_of_a_block=BLOCK_STEPS,
        joined_to_alone=spread((2 * alone / joined).tolist()),
        joined_to_at_once=spread((at_once / joined).tolist()),
        peak_memory_bytes=None,  # it is not this process that works
    )
