"""Images as the bytes of `.npy` files, which keep any type and number of channels that no image format has.

Format: numpy.lib.format, version 1.0 and later.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.values import DTYPES

_MAGIC = b"\x93NUMPY"
_MOST_VALUES = 2**28


class UnreadableImage(Exception):
    """An image that cannot be decoded; the text is the reason, without the name."""


def is_array(content: bytes) -> bool:
    """True for the bytes of a `.npy` file."""
    return content[: len(_MAGIC)] == _MAGIC


def array_header(content: bytes) -> tuple[tuple[int, ...], str]:
    """Shape (C, H, W) and type of the values of an image [H, W] or [C, H, W], without reading them.

    Raises:
        UnreadableImage: it is damaged, or has another shape or type.
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise UnreadableImage(" ".join(str(error).split())[:100]) from None
    if str(dtype.newbyteorder("=")) not in DTYPES:
        raise UnreadableImage(f"an array of {str(dtype)[:40]}, not {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if len(shape) not in (2, 3) or not 0 < np.prod(shape, dtype=object) <= _MOST_VALUES:
        raise UnreadableImage(f"an array {list(shape)}, not [H, W] or [C, H, W] of at most {_MOST_VALUES:,} values")
    return (1, *shape) if len(shape) == 2 else shape, str(dtype.newbyteorder("="))


def array_values(content: bytes, deep: bool) -> NDArray[Any]:
    """Values [C, H, W] of an image.

    Args:
        content: bytes of a `.npy` file.
        deep: False refuses values of more than 8 bits: there is no rule to reduce them by.

    Raises:
        UnreadableImage: as `array_header`; or it is cut off, or has values that are not finite.
    """
    shape, dtype = array_header(content)
    if dtype != "uint8" and not deep:
        raise UnreadableImage(f"an array of {dtype}, which --dtype uint8 does not reduce")
    try:
        values: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False).reshape(shape).astype(dtype, copy=False)
    except (ValueError, EOFError) as error:
        raise UnreadableImage(" ".join(str(error).split())[:100]) from None
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UnreadableImage("values that are not finite")
    return values
