"""Config of packing and memory of a data source."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from gen_dist.config.addresses import refuse_secrets
from gen_dist.config.checked import Checked, at_least
from gen_dist.errors import ConfigError

Fit = Literal["crop", "pad", "stretch", "none"]
Layout = Literal["NHWC", "NCHW"]
"""Order of the axes of an array of images; of signals [N, L, C] or [N, C, L]."""
Form = Literal["images", "signals", "vectors"]
"""Form of the rows of a data set: images [C, H, W], signals [C, L] or vectors [D]."""
FORMS: tuple[Form, ...] = get_args(Form)

Pages = Literal["first", "images", "channels"]

_LEAST_SIDE = 4
_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_VALUE_RANGE = re.compile(rf"dtype|data|percentile:(?P<percentile>{_NUMBER})|(?P<low>{_NUMBER}):(?P<high>{_NUMBER})")
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
    dtype: Literal["source", "uint8"] = "source"
    """Type of the values: that of the source, such as uint16, where all images have one; or `uint8`, to which files of
    more than 8 bits are reduced."""
    pages: Pages | None = None
    """Pages of a file: the `first` alone, each an image (`images`, of a folder), or each a channel (`channels`). None
    is the first of 8-bit files, and refuses files of several pages with more bits."""
    value_range: Annotated[str | None, arg(metavar="{None}|data|dtype|percentile:P|LOW:HIGH")] = None
    """Values that become the model's darkest and brightest: the least and greatest of the `data`, those of the `dtype`
    (0:1 for floats), percentiles P and 100 - P, or two numbers. Values beyond are cut off. None is 0:255 for uint8,
    else `data`."""
    range_per_channel: bool = False
    """Measure `value_range` for each channel, not over all."""
    layout: Layout | None = None
    """Order of the axes in `array:FILE`. None is for arrays of one possible order: one axis of 1 or 3 channels."""
    array_of: Form | None = None
    """Form of the rows in `array:FILE` or an array from Python: images, `signals` [N, C, L] or [N, L] (of one channel),
    or `vectors` [N, D]. None takes [N, D] for vectors, and others for images."""
    label_columns: tuple[str, ...] = ()
    """Columns of a `parquet:` source with the labels: integers or texts are classes, several columns attributes, and
    floating point numbers. None named takes `label`, `labels` or `fine_label`."""
    missing_labels: Literal["refuse", "unknown"] = "refuse"
    """Treatment of images without a label: refuse them, or learn what stands for `unknown` ones."""
    test_fraction: float = 0.1
    """Share of the images held out for testing if the source has no test split."""
    packed_as: Literal["raw", "encoded"] = "raw"
    """Form of packed images: values that training gathers as they are, or the bytes of their files, about a tenth as
    many, which threads decode ahead of training."""
    decoded_on: Literal["cpu", "cuda"] = "cpu"
    """Device that decodes encoded images for training. `cuda` takes JPEG files of one size, by torchvision's decoder,
    whose values differ from the CPU's."""
    test_shards: str | None = None
    """Shards of the test split, for `shards:PATTERN`, as a pattern. None holds out `test_fraction`, at most 10,000."""
    cache_gib: float = 16.0
    """Local disk for parts of remote shards, in GiB; the oldest parts go first."""
    unreadable_images: Literal["skip", "error"] = "skip"
    """Treatment of unreadable images: skip them with a warning, or stop with an error. In shards, the next image takes
    the place of a skipped one."""
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
        self._refuse_bad_range()
        if self.pages == "channels" and self.channels is not None:
            raise ConfigError(f"channels {self.channels} with pages channels: a page is a channel; leave out channels")
        if self.packed_as == "encoded" and self.pages == "images":
            raise ConfigError(
                "packed_as encoded with pages images: a file would be packed once a page; use packed_as raw"
            )
        at_least("synthetic_images", self.synthetic_images, 1)
        at_least("resident_budget_mib", self.resident_budget_mib, 0)
        if not 0 < self.cache_gib < math.inf:
            raise ConfigError(f"cache_gib {self.cache_gib} is not a positive number")
        if self.test_shards is not None:
            refuse_secrets("test_shards", self.test_shards)
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction {self.test_fraction} is not between 0 and 1")

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of `image_size`."""
        if self.image_size is None:
            return None
        width, _, height = str(self.image_size).partition("x")
        return int(width), int(height or width)

    def _refuse_bad_range(self) -> None:
        text = self.value_range
        if text is None:
            return
        found = _VALUE_RANGE.fullmatch(text)
        if not found:
            raise ConfigError(f"value_range {text!r} is none of data, dtype, percentile:1 or LOW:HIGH as 150:2599")
        if found["percentile"] and not 0 < float(found["percentile"]) < 50:
            raise ConfigError(f"value_range {text}: the percentile is not between 0 and 50")
        if found["low"] and not -math.inf < float(found["low"]) < float(found["high"]) < math.inf:
            raise ConfigError(f"value_range {text}: the first number is not below the second")
        if found["low"] and self.range_per_channel:
            raise ConfigError(f"value_range {text} is one for all channels; leave out range_per_channel")

    @property
    def percentile(self) -> float | None:
        """P of a `value_range` by percentiles."""
        text = self.value_range or ""
        return float(text.removeprefix("percentile:")) if text.startswith("percentile:") else None

    @property
    def given_range(self) -> tuple[float, float] | None:
        """Numbers of a `value_range` of two."""
        low, colon, high = (self.value_range or "").partition(":")
        return (float(low), float(high)) if colon and low != "percentile" else None
