"""Image files of more than 8 bits a channel with all their bits, and the pages of files that have several.

PIL reduces coloured images of 16 bits to their upper 8. They are decoded twice here: its unpackers of the two byte
orders give the upper bytes and the lower ones.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile as OpenedFile

from gen_dist.config.data import Pages

_DEEP_COLOURS = ("RGB;16", "RGBA;16")
_INT16 = ("I;16S", "I;16BS", "I;16NS")
_UINT16 = ("I;16", "I;16B", "I;16L", "I;16N")
_WHITE = 65_535
_NATIVE = {"I;16BS": "I;16NS", "F;32BF": "F;32NF"}
"""libtiff gives numbers in the machine's order. PIL 13.0 swaps the bytes of these again, as if they were the file's."""
_OTHER_ORDER = {"L": "B", "B": "L"}


class Keeping(NamedTuple):
    """Parts of a file that are kept."""

    deep: bool = False
    """True for the bits of images that have more than 8; else they are reduced to 8."""
    pages: Pages | None = None
    """Use of the pages and frames of one file. None takes the first alone, and refuses several of more than 8 bits."""


def dtype_of(opened: Image.Image) -> str:
    """Type of the values of an image file that keeps its bits: uint8, uint16, int16 or float32.

    Other files of more than 8 bits, such as 16-bit gray with transparency, are uint8: they are reduced.
    """
    raw = raw_mode_of(opened)
    if opened.mode == "F":
        return "float32"
    if opened.mode == "I" and (raw in _INT16 or raw in _UINT16 or opened.format == "PPM"):
        return "int16" if raw in _INT16 else "uint16"
    if opened.mode.startswith("I;16"):
        return "uint16"
    deep = opened.format in ("PNG", "TIFF") and raw[:-1] in _DEEP_COLOURS and raw.split(";")[0] == opened.mode
    return "uint16" if deep and not (opened.mode == "RGB" and opened.has_transparency_data) else "uint8"


def raw_mode_of(opened: Image.Image) -> str:
    """PIL's name of the stored channels and their order."""
    tiles: Any = getattr(opened, "tile", None)
    if not tiles:
        return ""
    args = tiles[0].args
    return str(args[0] if isinstance(args, tuple) else args)


def ppm_maximum(opened: Image.Image) -> int:
    """Greatest value that a PPM or PGM file says it has, if that is not the greatest of its mode; else 0."""
    tiles: Any = getattr(opened, "tile", None)
    if opened.format != "PPM" or not tiles or not isinstance(tiles[0].args, tuple) or len(tiles[0].args) != 2:
        return 0
    return int(tiles[0].args[1])


def deep_values(opened: OpenedFile, content: bytes) -> NDArray[Any]:
    """Values [C, H, W] of the page of an opened file, upright, with C 1 or 3, of the dtype of `dtype_of`.

    Transparent images are laid on white.

    Args:
        opened: the file, not loaded yet.
        content: its bytes.

    Raises:
        ValueError: floating-point values are not finite.
    """
    dtype = dtype_of(opened)
    if opened.mode in ("RGB", "RGBA"):
        return _coloured(opened, content)
    if opened.tile and opened.tile[0].codec_name == "libtiff" and (native := _NATIVE.get(raw_mode_of(opened))):
        _unpack_as(opened, native)
    maximum = ppm_maximum(opened)
    values = np.asarray(ImageOps.exif_transpose(opened)).astype(dtype)[None]
    if 0 < maximum < _WHITE:  # PIL has scaled them to 0..65535; rounding brings back each of the fewer levels
        values = np.rint(values * (maximum / _WHITE)).astype(dtype)
    if dtype == "float32" and not np.isfinite(values).all():
        raise ValueError("float pixels that are not finite")
    return values


def page_count(opened: Image.Image) -> int:
    """Number of pages or frames. Asked of damaged files too: formats may seek, and fail there."""
    try:
        return int(getattr(opened, "n_frames", 1))
    except Exception:
        return 1


def check_pages(opened: Image.Image) -> None:
    """Raise some error if the pages of a file cannot be counted: those behind the damage would be missed in silence."""
    getattr(opened, "n_frames", 1)


def pages_of(opened: OpenedFile) -> Iterator[OpenedFile]:
    """The opened file at each of its pages in turn."""
    for page in range(page_count(opened)):
        opened.seek(page)
        yield opened


def common_dtype(dtypes: Iterable[str]) -> str | None:
    """Type that all images have, if it has more than 8 bits. The first 8-bit image settles that there is none."""
    found = None
    for dtype in dtypes:
        if dtype == "uint8" or found not in (None, dtype):
            return None
        found = dtype
    return found


def _coloured(opened: OpenedFile, content: bytes) -> NDArray[Any]:
    raw, page = raw_mode_of(opened), opened.tell()
    order = raw[-1] if raw[-1] in _OTHER_ORDER else {"little": "L", "big": "B"}[sys.byteorder]
    upper, lower = (
        _unpacked(content, opened.format, page, raw[:-1] + letter) for letter in (order, _OTHER_ORDER[order])
    )
    values = upper << 8 | lower
    if opened.mode == "RGBA":
        opacity = values[3].astype(np.float64) / _WHITE
        values = np.rint(values[:3] * opacity + _WHITE * (1 - opacity)).astype(np.uint16)
    return values


def _unpacked(content: bytes, form: str | None, page: int, raw: str) -> NDArray[np.uint16]:
    """Bytes of an image that one unpacker of PIL takes: [C, H, W]."""
    with Image.open(io.BytesIO(content), formats=[form] if form else None) as opened:
        opened.seek(page)
        _unpack_as(opened, raw)
        return np.asarray(ImageOps.exif_transpose(opened)).astype(np.uint16).transpose(2, 0, 1)


def _unpack_as(opened: OpenedFile, raw: str) -> None:
    """Make an opened file unpack its pixels by another of PIL's unpackers."""
    tiles: Any = opened.tile
    opened.tile = [tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in tiles]
