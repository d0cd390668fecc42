"""Description of an image by the header of its file, without decoding it."""

from __future__ import annotations

import errno
import io
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from gen_dist.data.array_bytes import UnreadableImage, array_header, is_array
from gen_dist.data.deep_files import (
    Keeping,
    dtype_of,
    page_count,
    ppm_maximum,
    raw_mode_of,
)
from gen_dist.data.eight_bits import (
    GRAY_MODES,
)
from gen_dist.data.image_files import (
    REDUCED,
    Encoded,
    ImageFile,
    refuse_size,
    registered_formats,
    turn_to,
    unreadable_image,
)
from gen_dist.data.losses import frame_and_channel_losses
from gen_dist.errors import DataError
from gen_dist.files import open_regular, retrying

_COLOURS = {"P": "palette", "PA": "palette", "RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB"}
"""Words for modes that are not gray; others have PIL's name, such as CMYK."""


_DEPTHS = {"1": "1-bit", "I": "32-bit", "F": "float"}


ORIENTATION = 0x0112  # EXIF 2.32, tag Orientation


_ON_THEIR_SIDE = range(5, 9)


TURNED = range(2, 9)


class Header(NamedTuple):
    """An image as its file describes it, before it is decoded."""

    kind: str
    """Format and stored mode in words: `JPEG RGB`, `PNG 16-bit gray`, `uint8 array gray`."""
    width: int
    """In pixels, of the image turned upright."""
    height: int
    gray: bool
    """As in `Decoded`."""
    converted: str
    """Conversion of a mode that is neither 8-bit gray nor RGB, as the end of a sentence; empty for those."""
    turned: bool
    """True if the file says that the image lies on its side or is mirrored."""
    losses: dict[str, str]
    """Parts of the image that will be lost by its structure: see `gen_dist.data.losses`."""
    channels: int = 3
    """Channels of the decoded image, before grayscale images among coloured ones get three."""
    dtype: str = "uint8"
    """Type of the decoded values."""


def read_header(encoded: Encoded, keeping: Keeping = REDUCED) -> Header:
    """Describe an image without decoding it. Only the first bytes of a file are read.

    Args:
        encoded: file, bytes or pixels.
        keeping: parts of it that decoding will keep.

    Raises:
        UnreadableImage: empty, no image, or more pixels than PIL's limit for safe images. Damage behind the header is
            not found.
        OSError: the file cannot be read, which says nothing about the image.
        DataError: it has several pages of more than 8 bits, and `keeping` does not say what they are.
    """
    if isinstance(encoded, np.ndarray):
        return _header_of_array(encoded.shape, str(encoded.dtype))
    if isinstance(encoded, ImageFile):
        refuse_size(encoded)
        with retrying(lambda: open_regular(encoded.path)) as file:
            return _header_of(file, keeping, encoded.page, encoded.path)
    if not encoded:
        raise UnreadableImage("no bytes")
    if is_array(encoded):
        return _header_of_array(*array_header(encoded))
    return _header_of(io.BytesIO(encoded), keeping)


def count_pages(file: ImageFile) -> int:
    """Pages or frames of an image file.

    Raises:
        UnreadableImage, OSError: as for `read_header`.
    """
    refuse_size(file)
    try:
        with (
            retrying(lambda: open_regular(file.path)) as content,
            Image.open(content, formats=registered_formats()) as opened,
        ):
            return page_count(opened)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        raise unreadable_image(error) from error
    except Exception as error:
        raise unreadable_image(error) from error


def _header_of_array(shape: tuple[int, ...], dtype: str) -> Header:
    channels, height, width = shape
    colours = {1: "gray", 3: "RGB"}.get(channels, f"of {channels} channels")
    return Header(f"{dtype} array {colours}", width, height, channels == 1, "", False, {}, channels, dtype)


def _header_of(file: BinaryIO, keeping: Keeping, page: int = 0, name: str = "") -> Header:
    try:
        with Image.open(file, formats=registered_formats()) as opened:
            turn_to(opened, page, keeping, name)
            return _described(opened, keeping)
    except (MemoryError, DataError):
        raise
    except Exception as error:
        # PIL's own OSErrors have no number. A damaged header may send it to a place before the start of the file.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise unreadable_image(error) from error


def _described(opened: Image.Image, keeping: Keeping) -> Header:
    raw_mode, mode = raw_mode_of(opened), opened.mode
    dtype = dtype_of(opened) if keeping.deep else "uint8"
    deep = (mode[0] in "IF" or "16" in raw_mode or ppm_maximum(opened) > 255) and dtype == "uint8"
    gray, transparent = mode in GRAY_MODES, opened.has_transparency_data
    # The method of PNG files would decode the pixels, to look for EXIF behind them.
    exif = Image.Image.getexif(opened) if opened.format == "PNG" else opened.getexif()
    orientation = exif.get(ORIENTATION, 1)
    width, height = opened.size[::-1] if orientation in _ON_THEIR_SIDE else opened.size
    is_16_bit = "16" in raw_mode or mode.startswith("I;16") or bool(lost_bits(opened))
    words = [opened.format or "", "16-bit" if is_16_bit else _DEPTHS.get(mode, "")]
    words += [_COLOURS.get(mode, "gray" if gray else mode)]
    words += ["with transparency"] if transparent else []
    converted = "become 8-bit" if deep else "are laid on white" if transparent else ""
    if not converted and mode not in ("L", "RGB") and dtype == "uint8":
        converted = "become 8-bit gray" if gray else "become RGB"
    losses = frame_and_channel_losses(opened, raw_mode) if keeping.pages in (None, "first") else {}
    losses |= lost_bits(opened)
    kind, turned = " ".join(filter(None, words)), orientation in TURNED
    channels = 1 if gray else 3
    if keeping.pages == "channels" and (pages := page_count(opened)) > 1:
        kind, channels, gray = f"{kind} of {pages} pages", pages, False
    return Header(kind, width, height, gray, converted, turned, losses, channels, dtype)


def lost_bits(opened: Image.Image) -> dict[str, str]:
    """Loss of a PPM file with colours of 16 bits, before it is loaded: PIL reads their upper 8."""
    return {"ppm": f"0..{ppm_maximum(opened)}"} if opened.mode == "RGB" and ppm_maximum(opened) > 255 else {}


def is_on_its_side(opened: Image.Image) -> bool:
    """True if the file says that width and height change places when it is turned upright."""
    return opened.getexif().get(ORIENTATION, 1) in _ON_THEIR_SIDE
