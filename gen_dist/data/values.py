"""Values of images as their source has them, and their map to the intensities that a model sees.

A model sees intensities in 0..1. The least of a range of values becomes 0 and the greatest 1, in one range for all
channels or one for each. 8-bit images keep the range 0..255 and are handed on as they are; all other values become
float32 numbers in 0..255, so that objectives read both alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.config.data import FORMS, Form

DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
"""Types of values that are kept, by NumPy's names."""
_WHITE = 255.0


@dataclass(frozen=True)
class ValueScale:
    """Range of the values of a data set, which the model sees as 0..1."""

    dtype: str = "uint8"
    """Type of the values; see `DTYPES`."""
    low: tuple[float, ...] = (0.0,)
    """Value that becomes 0, for all channels or for each."""
    high: tuple[float, ...] = (_WHITE,)
    """Value that becomes 1. It differs from `low`."""
    shown: tuple[float, float] = (0.0, 1.0)
    """Intensities that pictures show as black and white."""
    form: Form = "images"
    """Kind of rows; see `gen_dist.data.forms`."""

    @property
    def is_plain(self) -> bool:
        """True for 8-bit images in their own range: models take them as they are."""
        return self.dtype == "uint8" and self.low == (0.0,) and self.high == (_WHITE,) and self.form == "images"

    @property
    def is_whole(self) -> bool:
        """True if the values are whole numbers."""
        return np.dtype(self.dtype).kind in "iu"

    @property
    def step(self) -> float:
        """Distance of neighbouring values in intensities, the smallest of all channels. 0 for floating point."""
        spans = (high - low for low, high in zip(self.low, self.high, strict=True))
        return 1.0 / max(spans) if self.is_whole else 0.0

    def steps(self) -> Tensor:
        """Distance of neighbouring whole numbers in intensities, float32 [1 or C, 1, 1]."""
        return torch.tensor([1.0 / (high - low) for low, high in zip(self.low, self.high, strict=True)])[:, None, None]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the values in torch."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def for_model(self, values: Tensor) -> Tensor:
        """Images as objectives take them: 8-bit ones unchanged, others float32 in 0..255.

        Args:
            values: [B, C, H, W] of the scale's dtype, on any device.
        """
        if self.is_plain:
            return values
        low, high = (_of_channels(ends, values.device) for ends in (self.low, self.high))
        # In float64, for values with a large offset: a float32 difference has the rounding of both numbers.
        # In place, since that is twice the memory of the result.
        return values.double().sub_(low).mul_(_WHITE / (high - low)).clamp_(0.0, _WHITE).float()

    def values(self, intensities: Tensor) -> Tensor:
        """Values [B, C, H, W] of the scale's dtype from intensities in 0..1; whole numbers are rounded to the nearest.

        The inverse of `for_model` divided by 255, within half a step for whole numbers inside the range.
        """
        if self.is_plain:
            return intensities.mul(_WHITE).round().to(torch.uint8)
        low, high = (_of_channels(ends, intensities.device) for ends in (self.low, self.high))
        found = low + intensities.double() * (high - low)
        if self.is_whole:
            ends = torch.iinfo(self.torch_dtype)
            found = found.round().clamp(ends.min, ends.max)
        return found.to(self.torch_dtype)

    def rounded(self, intensities: Tensor) -> Tensor:
        """Images as `for_model` gives those of `values(intensities)`: intensities that the values can express."""
        return self.for_model(self.values(intensities))

    def eight_bit(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Values [N, C, H, W] as pictures show them: uint8 [N, 1 or 3, H, W].

        The range `shown` is stretched to black and white. Channels that are neither one nor three stand side by side.
        """
        if self.is_plain:
            shown: NDArray[np.uint8] = values
        else:
            intensities = self.for_model(torch.from_numpy(np.ascontiguousarray(values))).numpy() / _WHITE
            dark, bright = self.shown
            shown = np.rint(((intensities - dark) / (bright - dark)).clip(0.0, 1.0) * _WHITE).astype(np.uint8)
        count, channels, height, width = shown.shape
        if channels in (1, 3):
            return shown
        return np.ascontiguousarray(shown.transpose(0, 2, 1, 3)).reshape(count, 1, height, channels * width)

    @property
    def shown_values(self) -> tuple[str, str] | None:
        """Values of black and white in pictures, as text. None for 8-bit images, which need no scale."""
        if self.is_plain:
            return None
        if len(self.low) > 1:
            low, high = (f"{share:.0%} of each channel's range" for share in self.shown)
            return low, high
        span = self.high[0] - self.low[0]
        low, high = (format_number(self.low[0] + share * span) for share in self.shown)
        return low, high

    def as_json(self) -> dict[str, Any]:
        """The scale as JSON values. Images name no form, as in files of versions without others."""
        found = {"dtype": self.dtype, "low": list(self.low), "high": list(self.high), "shown": list(self.shown)}
        return found if self.form == "images" else {**found, "form": self.form}

    def __str__(self) -> str:
        ranges = [f"{format_number(low)}..{format_number(high)}" for low, high in zip(self.low, self.high, strict=True)]
        if len(ranges) > 4:  # lines and cards name it
            ranges = [*ranges[:2], "...", ranges[-1]]
        return f"{self.dtype} {', '.join(ranges)}"


PLAIN = ValueScale()
"""8-bit images in their own range."""


def scale_of_json(found: Mapping[str, Any] | None) -> ValueScale:
    """Scale that `as_json` wrote; the plain one for None, as in files of versions without others.

    Raises:
        ValueError: it is not one.
    """
    if found is None:
        return PLAIN
    try:
        dtype, form = found["dtype"], found.get("form", "images")
        low, high, shown = (tuple(map(float, found[name])) for name in ("low", "high", "shown"))
        whole = dtype in DTYPES and form in FORMS and len(low) == len(high) > 0
        whole = whole and len(shown) == 2 and -math.inf < shown[0] < shown[1] < math.inf
        if whole and all(a < b and math.isfinite(b - a) for a, b in zip(low, high, strict=True)):
            return ValueScale(dtype, low, high, (shown[0], shown[1]), form)
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no range of values: {type(error).__name__} {error}") from None
    raise ValueError(f"no range of values: {str(dict(found))[:100]}")


@functools.lru_cache(maxsize=64)
def _of_channels(ends: tuple[float, ...], device: torch.device) -> Tensor:
    """Ends of ranges as float64 [1 or C, 1, 1]. Kept, so that a step copies nothing to the device."""
    return torch.tensor(ends, dtype=torch.float64, device=device)[:, None, None]


def format_number(value: float) -> str:
    """A value in few letters."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.5g}"
