"""The data sets of torchvision: local files first, then its download."""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.identity import content_sample, stamp
from gen_dist.data.sources.source import SPLITS, Block, SplitName, register
from gen_dist.errors import DataError
from gen_dist.files import read_regular

_MAX_REASON = 200
_MOST_BYTES = 2**28
_DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class TorchvisionSet:
    """One data set in torchvision's layout below `root`; torchvision is imported only to download or to unpack it."""

    name: str
    root: Path
    files: tuple[str, ...]
    """Required files, relative to the root; with `reads_gzip`, `.gz` versions count."""
    names_of_classes: tuple[str, ...]
    download: Callable[[ModuleType, Path], object]
    """Download with torchvision.datasets into the root."""
    read: Callable[[Path, SplitName], tuple[NDArray[np.uint8], NDArray[np.int64]]]
    """Images uint8 [N, C, H, W] and labels int64 [N] of a split."""
    reads_gzip: bool = False
    has_test_split: bool = True
    default_size: int | None = None

    @property
    def slug(self) -> str:
        """The name."""
        return self.name

    def fingerprint(self) -> object | None:
        """Names, stamps and a part of the raw files, so that a packed cache is found without torchvision."""
        stamps, sizes = [], []
        for name in self.files:
            path = self._present(name)
            if path is None:
                return None
            status = path.stat()
            stamps.append([str(path.relative_to(self.root)), *stamp(status)])
            sizes.append((str(path), status.st_size))
        return [self.name, os.fsencode(self.root.resolve()).hex(), stamps, content_sample(sizes)]

    def remarks(self) -> list[str]:
        """None."""
        return []

    def fetch(self) -> None:
        """Download missing or truncated files with torchvision.

        Raises:
            DataError: torchvision is missing, or the download failed.
        """
        missing = self._first_missing()
        if missing is None:
            return
        way_out = "put the files there, or use --data mnist5k, which needs none"
        try:
            from torchvision import datasets
        except ImportError:
            raise DataError(
                f"{self.name}: {missing} and torchvision, which downloads it, is not installed; {way_out}"
            ) from None
        try:
            self.download(datasets, self.root)
        # urllib's URLError is an OSError; torchvision raises RuntimeError for failed mirrors and wrong checksums.
        except (OSError, RuntimeError, EOFError, zlib.error) as error:
            raise DataError(f"{self.name}: {missing} and the download failed ({_short(error)}); {way_out}") from None

    def class_names(self) -> tuple[str, ...]:
        """Class names as in torchvision."""
        return self.names_of_classes

    def image_count(self) -> int | None:
        """None: arrays are packed too quickly for a bar."""
        return None

    def blocks(self) -> Iterator[Block]:
        """One block a split.

        Raises:
            DataError: raw files are damaged.
        """
        for split in SPLITS:
            images, labels = self.read(self.root, split)
            if len(images) != len(labels):
                raise DataError(
                    f"{self.name}: the {split} split in {self.root} has {len(images)} images but {len(labels)} labels"
                )
            yield Block(split, images, labels, f"{self.name} {split}")

    def _present(self, name: str) -> Path | None:
        path = self.root / name
        if path.is_file():
            return path
        packed = path.with_name(f"{path.name}.gz")
        return packed if self.reads_gzip and packed.is_file() else None

    def _first_missing(self) -> str | None:
        for name in self.files:
            path = self._present(name)
            if path is None:
                return f"{self.root / name} is not there"
            # An interrupted download leaves half a file under the full name; torchvision replaces it.
            if path.suffix == ".gz" and not _is_whole_gzip(path):
                return f"{path} is truncated or damaged"
        return None


def _is_whole_gzip(path: Path) -> bool:
    """False for truncated and damaged files, and for those that grow beyond any size of these sets."""
    try:
        with gzip.open(path) as file:
            return any(not file.read(2**20) for _ in range(_MOST_BYTES >> 20))
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False


def _short(error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}..."


def _mnist_like(
    name: str, directory: str, class_names: tuple[str, ...], download: Callable[[ModuleType, Path], object], root: Path
) -> TorchvisionSet:
    raw = f"{directory}/raw"

    def read(root: Path, split: SplitName) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        prefix = root / raw / ("train" if split == "train" else "t10k")
        images = _read_idx(prefix.with_name(f"{prefix.name}-images-idx3-ubyte"), dimensions=3)
        labels = _read_idx(prefix.with_name(f"{prefix.name}-labels-idx1-ubyte"), dimensions=1)
        return images[:, None], labels.astype(np.int64)

    files = tuple(
        f"{raw}/{part}-{content}"
        for part in ("train", "t10k")
        for content in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    return TorchvisionSet(name, root, files, class_names, download, read, reads_gzip=True)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a file of the MNIST database's format; `path` or `path` + .gz.

    A big-endian header (two zero bytes, the type 8 for uint8, the number of dimensions, each dimension as uint32), then
    the data.
    """
    if not path.is_file():
        path = path.with_name(f"{path.name}.gz")
    way_out = "delete it, and it is downloaded anew"
    try:
        content = read_regular(path, _MOST_BYTES)
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(_MOST_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged ({_short(error)}); {way_out}") from None
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < 4 + 4 * dimensions:
        raise DataError(f"{path} is not an idx file of {dimensions}-dimensional bytes; {way_out}")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    start = 4 + 4 * dimensions
    wanted = start + math.prod(shape)
    if len(content) != wanted:
        raise DataError(f"{path} has {len(content)} bytes, but its header {list(shape)} means {wanted}; {way_out}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _mnist(root: Path) -> TorchvisionSet:
    return _mnist_like("mnist", "MNIST", _DIGITS, lambda sets, path: sets.MNIST(path, download=True), root)


def _fashion_mnist(root: Path) -> TorchvisionSet:
    names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    return _mnist_like(
        "fashion_mnist", "FashionMNIST", names, lambda sets, path: sets.FashionMNIST(path, download=True), root
    )


def _kmnist(root: Path) -> TorchvisionSet:
    names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    return _mnist_like("kmnist", "KMNIST", names, lambda sets, path: sets.KMNIST(path, download=True), root)


def _cifar10(root: Path) -> TorchvisionSet:
    directory = "cifar-10-batches-py"
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def read(root: Path, split: SplitName) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        # torchvision compares MD5 sums before it unpickles these files.
        images = _with_torchvision("cifar10", root / directory, lambda sets: sets.CIFAR10(root, train=split == "train"))
        return np.ascontiguousarray(images.data.transpose(0, 3, 1, 2)), np.array(images.targets, np.int64)

    return TorchvisionSet(
        name="cifar10",
        root=root,
        files=tuple(
            f"{directory}/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
        ),
        names_of_classes=names,
        download=lambda sets, path: sets.CIFAR10(path, download=True),
        read=read,
    )


def _svhn(root: Path) -> TorchvisionSet:
    def read(root: Path, split: SplitName) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images = _with_torchvision("svhn", root / f"{split}_32x32.mat", lambda sets: sets.SVHN(root, split=split))
        return np.ascontiguousarray(images.data), images.labels.astype(np.int64)

    return TorchvisionSet(
        name="svhn",
        root=root,
        files=tuple(f"{split}_32x32.mat" for split in SPLITS),
        names_of_classes=_DIGITS,
        download=lambda sets, path: [sets.SVHN(path, split=split, download=True) for split in SPLITS],
        read=read,
    )


def _with_torchvision(name: str, path: Path, load: Callable[[ModuleType], Any]) -> Any:
    try:
        from torchvision import datasets

        return load(datasets)
    except ImportError as error:
        raise DataError(f"{name} needs {error.name} to unpack {path}; pip install {error.name}") from None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:  # of the file system, not of the content
            raise
        raise _damaged(name, path, error) from None
    except Exception as error:
        raise _damaged(name, path, error) from None


def _damaged(name: str, path: Path, error: Exception) -> DataError:
    # torchvision's message about a wrong checksum is advice to programmers.
    reason = "a checksum differs" if isinstance(error, RuntimeError) else _short(error)
    return DataError(
        f"{name}: {path} is damaged ({reason}); delete it, and it is downloaded anew, or use --data mnist5k"
    )


def _register(name: str, open_set: Callable[[Path], TorchvisionSet]) -> None:
    register(name, lambda request: open_set(request.root))


_register("mnist", _mnist)
_register("fashion_mnist", _fashion_mnist)
_register("kmnist", _kmnist)
_register("cifar10", _cifar10)
_register("svhn", _svhn)
