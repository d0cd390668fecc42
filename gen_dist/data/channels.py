"""Size and channels of images whose values are not 8-bit gray or RGB, as arrays [C, H, W]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gen_dist.data.fitting import Fitting, fitted
from gen_dist.errors import DataError

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL makes gray of RGB


def fitted_values(values: NDArray[Any], fitting: Fitting | None, channels: int | None) -> NDArray[Any]:
    """Image of any dtype that is kept, in the size of a fitting: [C, H, W] of the same dtype.

    Channels are resized one by one. Whole numbers are rounded, and kept within their type.

    Args:
        values: [C, H, W].
        fitting: size of the result; None keeps it.
        channels: 1 makes gray of 3 channels, 3 makes three equal channels of one. None keeps them.

    Raises:
        DataError: it would be padded, and its dtype has no white.
    """
    found = values
    if fitting is not None and values.shape[:0:-1] != fitting[:2]:
        if fitting.fit == "pad" and values.dtype != np.uint8 and _has_bars(values, fitting):
            raise DataError(f"{values.dtype} values have no white to pad with; use --fit crop or stretch")
        found = np.stack([_resized(channel, fitting) for channel in values])
    if channels == 3 and len(found) == 1:
        found = np.repeat(found, 3, axis=0)
    elif channels == 1 and len(found) == 3:
        found = _of_dtype(np.tensordot(_LUMA, found.astype(np.float64), 1)[None], values.dtype)
    return np.ascontiguousarray(found)


def _has_bars(values: NDArray[Any], fitting: Fitting) -> bool:
    height, width = values.shape[1:]
    return bool(width * fitting.height != height * fitting.width)


def _resized(channel: NDArray[Any], fitting: Fitting) -> NDArray[Any]:
    wide = channel if channel.dtype == np.uint8 else channel.astype(np.float32)  # 16 bits fit into its 24
    return _of_dtype(np.asarray(fitted(Image.fromarray(np.ascontiguousarray(wide)), fitting)), channel.dtype)


def _of_dtype(numbers: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        numbers = np.clip(np.rint(numbers), ends.min, ends.max)
    return numbers.astype(dtype)
