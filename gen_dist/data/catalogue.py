"""From the name of a source to its data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gen_dist.config import DataConfig
from gen_dist.data.cache import Dataset, expand_home, open_packed
from gen_dist.data.packing import Source
from gen_dist.data.sources.embedded import Mnist5k, Synthetic
from gen_dist.data.sources.folder import Folder
from gen_dist.data.sources.parquet import Parquet
from gen_dist.data.sources.torchvision_sets import TORCHVISION_SETS
from gen_dist.errors import DataError

_PATH_SOURCES: dict[str, Callable[[Path], Source]] = {"folder": Folder, "parquet": Parquet}
_SYNTHETIC_SIZE = 28


def open_dataset(
    source: str, root: str | Path, packing: DataConfig, announce: Callable[[str], None] = print
) -> Dataset:
    """Open the images of a source; pack them first where that has not been done yet.

    Args:
        source: mnist5k, synthetic, folder:PATH, parquet:PATH, or one of torchvision's: mnist, fashion_mnist, kmnist,
            cifar10, svhn.
        root: directory with torchvision's data sets; downloads go there.
        packing: how the images are packed, and where the cache is.
        announce: gets one line for what takes long or leaves images out.

    Raises:
        DataError: the source is unknown, missing, damaged or cannot be packed as configured; one line.
    """
    return open_packed(_find_source(source, expand_home(root), packing), packing, announce)


def _find_source(source: str, root: Path, packing: DataConfig) -> Source:
    if source == "mnist5k":
        return Mnist5k()
    if source == "synthetic":
        return Synthetic(packing.synthetic_images, packing.image_size or _SYNTHETIC_SIZE, packing.channels or 1)
    if source in TORCHVISION_SETS:
        return TORCHVISION_SETS[source](root)
    kind, _, path = source.partition(":")
    if kind in _PATH_SOURCES:
        if not path:
            raise DataError(f"{kind}: needs a path, as in {kind}:/path/to/images")
        return _PATH_SOURCES[kind](expand_home(path))
    names = ", ".join(["mnist5k", *TORCHVISION_SETS, *(f"{name}:PATH" for name in _PATH_SOURCES), "synthetic"])
    raise DataError(f"unknown data source {source!r}; use one of {names}")
