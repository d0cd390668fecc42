"""Options of the command that packs a source into shards. This file does not import Ray, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from gen_dist.config import DataConfig
from gen_dist.config.addresses import refuse_secrets
from gen_dist.config.checked import Checked, at_least
from gen_dist.config.data import Fit, Pages
from gen_dist.errors import ConfigError

ImageFormat = Literal["png", "webp", "jpeg"]


@dataclass(frozen=True)
class ShardOptions(Checked):
    """Options of what shards are made of, and how. They and the source alone determine every byte."""

    image_size: Annotated[int | str | None, arg(metavar="{None}|SIDE|WxH")] = None
    """Size in pixels that images are brought to, as for training. None keeps the size of each."""
    fit: Fit = "crop"
    """Treatment of images of another size: resize and crop at the centre, pad with white, or stretch."""
    channels: Literal[1, 3] | None = None
    """1 for grayscale, 3 for RGB. None keeps those of each image."""
    dtype: Literal["source", "uint8"] = "source"
    """Type of the values: `uint8` reduces images of more than 8 bits, which are written as arrays otherwise."""
    least_side: int = 1
    """Leave out images with a side of fewer pixels than this, before they are resized."""
    unreadable_images: Literal["skip", "error"] = "skip"
    """Treatment of unreadable images: leave them out, and tell their number and some names, or stop with an error."""
    image_format: ImageFormat = "png"
    """Format of 8-bit images in shards: png loses nothing, webp and jpeg are smaller."""
    quality: int = 90
    """Quality of webp and jpeg, 1 to 100; webp loses nothing at 100."""
    container: Literal["tar", "parquet"] = "tar"
    """Kind of the shards: tar files in the WebDataset layout, or parquet files in that of Hugging Face."""
    images_per_shard: int | None = None
    """Images of the source that go into a shard; None is 4096. Shards of a `shards:` source become one each."""
    pages: Pages | None = None
    """Pages of a file, as for training."""
    label_columns: tuple[str, ...] = ()
    """Labels of a `parquet:` or `shards:` source, as for training."""
    missing_labels: Literal["refuse", "unknown"] = "refuse"
    """Treatment of images without a label: refuse them, or write them without one."""
    test_shards: str | None = None
    """Shards of the test split of a `shards:` source, as a pattern."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("least_side", self.least_side, 1)
        if self.images_per_shard is not None:
            at_least("images_per_shard", self.images_per_shard, 1)
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality {self.quality} is not between 1 and 100")
        self.packing()  # refuses bad sizes

    def packing(self) -> DataConfig:
        """The same options of a source that is packed for training."""
        return DataConfig(
            image_size=self.image_size,
            fit=self.fit,
            channels=self.channels,
            dtype=self.dtype,
            pages=self.pages,
            label_columns=self.label_columns,
            missing_labels=self.missing_labels,
            test_shards=self.test_shards,
            unreadable_images=self.unreadable_images,
        )


@dataclass(frozen=True)
class PackOptions(ShardOptions):
    """Options of the command."""

    source: Positional[str] = ""
    """Images: folder:PATH, parquet:PATH or shards:PATTERN, which all hosts can read."""
    out: str = ""
    """Directory of the shards: a path that all hosts share, or a URL of any file system that fsspec knows."""
    workers: int = 2
    """CPUs of a cluster that this command starts; on a running one, all that are free work."""
    address: str | None = None
    """HOST:PORT of the head of a running cluster. None starts a cluster on this host, for this command alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("workers", self.workers, 1)
        if not self.source or not self.out:
            raise ConfigError("name a source and a place: folder:PATH --out DIRECTORY")
        refuse_secrets("source", self.source)
        refuse_secrets("out", self.out)
        if self.out.startswith(("http://", "https://")):
            raise ConfigError(
                f"out {self.out}: web servers are read-only; use a path, or a URL such as s3://bucket/set"
            )
