"""Config of packing and memory of a data source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gen_dist.config.checked import Checked, at_least
from gen_dist.errors import ConfigError


@dataclass(frozen=True)
class DataConfig(Checked):
    """Packing and memory of a data source."""

    image_size: int | None = None
    """Side in pixels: images are resized by their shorter side, then cropped at the centre. None keeps the source's
    size where all images share one, and is 64 for `folder:`."""
    channels: Literal[1, 3] | None = None
    """1 for grayscale, 3 for RGB. None keeps the source's channels; folders with any coloured image become RGB."""
    test_fraction: float = 0.1
    """Share of the images held out for testing if the source has no test split."""
    unreadable_images: Literal["skip", "error"] = "skip"
    """Treatment of unreadable images: skip them with a warning, or stop with an error."""
    synthetic_images: int = 4096
    """Number of training images that `synthetic` makes."""
    resident_budget_mib: int = 2048
    """Largest data set held in device memory, in MiB; a thread reads larger ones from disk."""
    cache_dir: str | None = None
    """Directory of packed images. None is $GEN_DIST_CACHE, else ~/.cache/gen_dist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            at_least("image_size", self.image_size, 4)
        at_least("synthetic_images", self.synthetic_images, 1)
        at_least("resident_budget_mib", self.resident_budget_mib, 0)
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction {self.test_fraction} is not between 0 and 1")
