"""Config of packing and memory of a data source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from gen_dist.config.checked import Checked, at_least
from gen_dist.errors import ConfigError

Fit = Literal["crop", "pad", "stretch", "none"]

_LEAST_SIDE = 4
_WIDTH_BY_HEIGHT = re.compile(r"([0-9]{1,9})(?:[xX]([0-9]{1,9}))?")


@dataclass(frozen=True)
class DataConfig(Checked):
    """Packing and memory of a data source."""

    image_size: Annotated[int | str | None, arg(metavar="{None}|SIDE|WxH")] = None
    """Size in pixels that images are brought to: a side, such as 64, or width x height, such as 480x270. None keeps the
    size that all images share, and is 64 for a `folder:` of images that differ."""
    fit: Fit = "crop"
    """Treatment of images of another size: resize and crop at the centre, pad with white, stretch, or refuse them."""
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
        if isinstance(self.image_size, str):
            found = _WIDTH_BY_HEIGHT.fullmatch(self.image_size)
            if not found:
                raise ConfigError(f"image_size {self.image_size!r} is no side such as 64, or width x height as 480x270")
            width, height = int(found[1]), int(found[2] or found[1])
            # A square has one spelling, so that configs and caches of one size are equal.
            object.__setattr__(self, "image_size", width if width == height else f"{width}x{height}")
        for side in self.size or ():
            at_least("image_size", side, _LEAST_SIDE)
        at_least("synthetic_images", self.synthetic_images, 1)
        at_least("resident_budget_mib", self.resident_budget_mib, 0)
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction {self.test_fraction} is not between 0 and 1")

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of `image_size`."""
        if self.image_size is None:
            return None
        width, _, height = str(self.image_size).partition("x")
        return int(width), int(height or width)
