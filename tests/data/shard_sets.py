"""Sets of shards for tests: their batches, and what is in them."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gen_dist.data import Split, TrainBatches
from tests.support.shards import encoded

SHARDS = 3

IMAGES = 20


def batches(split: Split, rows: tuple[tuple[int, int], ...] = ((0, 12),)) -> TrainBatches:
    return TrainBatches(
        split,
        seed=5,
        global_batch_size=12,
        micro_batches=rows,
        device=torch.device("cpu"),
        resident_budget_bytes=2**30,
    )


def some_batches(split: Split, first: int = 0, last: int = 9) -> NDArray[np.uint8]:
    """Images and labels of some steps, [steps, rows, pixels and label]."""
    with contextlib.closing(batches(split)) as gathered:
        found = [gathered.micro_batch(step, 0) for step in range(first, last)]
    return np.stack([torch.cat([images.flatten(1), labels[:, None].byte()], 1).numpy() for images, labels in found])


def truth(number: int, classes: int = 3) -> tuple[bytes, int]:
    return np.asarray(Image.open(io.BytesIO(encoded(number)))).tobytes(), number % classes


def with_status(error: OSError, status: int) -> OSError:
    """An error as Hugging Face's package raises it."""
    setattr(error, "response", SimpleNamespace(status_code=status))  # noqa: B010  OSError has no such attribute
    return error
