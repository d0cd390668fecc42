"""Decoding of an image of any format and mode into 8-bit pixels of a fixed shape."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Encoded = Path | bytes | NDArray[np.uint8]
"""An image file, the bytes of one, or pixels uint8 [C, H, W] with C 1 or 3."""

_GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
# Images are reduced in one cheap step to no less than this multiple of the target before the exact resize.
_REDUCING_GAP = 3.0


class UnreadableImage(Exception):
    """An image that cannot be decoded; the text is the reason, without the name."""


@contextlib.contextmanager
def image_warnings_as_intended() -> Iterator[None]:
    """Context manager that makes PIL's decompression bomb warnings errors and silences its other warnings.

    The filters are global to the process, so it encloses the decoding threads and is not used inside them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_image(encoded: Encoded, size: int | None, channels: int | None) -> tuple[NDArray[np.uint8], bool]:
    """Decode an image, turn it upright, lay it on white, and resize and crop it.

    Args:
        encoded: file, bytes or pixels.
        size: side in pixels of the result: the largest centred square, resized. None keeps the image's own size.
        channels: 1 for grayscale, 3 for RGB. None gives RGB.

    Returns:
        Pixels uint8 [C, H, W], and whether the image is stored as grayscale, so that all channels are equal.

    Raises:
        UnreadableImage: missing, truncated, damaged, no image, or more pixels than PIL's limit for safe images.
    """
    try:
        image, gray = _decode_upright(encoded, size)
    # Decoders raise nearly every built-in exception on damaged input: OSError, SyntaxError, struct.error, EOFError...
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        raise UnreadableImage(reason or type(error).__name__) from error
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=_REDUCING_GAP)
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image, np.uint8).reshape(image.height, image.width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), gray


def _decode_upright(encoded: Encoded, size: int | None) -> tuple[Image.Image, bool]:
    """The whole image as mode L or RGB, and whether it was stored as grayscale."""
    if isinstance(encoded, np.ndarray):
        gray = encoded.shape[0] == 1
        return Image.fromarray(encoded[0] if gray else np.ascontiguousarray(encoded.transpose(1, 2, 0))), gray
    with Image.open(encoded if isinstance(encoded, Path) else io.BytesIO(encoded)) as opened:
        gray = opened.mode in _GRAY_MODES
        if size is not None:
            # JPEG only: decode at a half, quarter or eighth of the size where that is enough.
            opened.draft(None, (int(size * _REDUCING_GAP), int(size * _REDUCING_GAP)))
        opened.load()
        return _eight_bit_opaque(ImageOps.exif_transpose(opened), gray), gray


def _eight_bit_opaque(image: Image.Image, gray: bool) -> Image.Image:
    if image.mode == "F":
        return Image.fromarray(_eight_bit_from_float(np.asarray(image)))
    if image.mode.startswith("I"):
        # 32-bit integer images hold 16-bit intensities in practice: PGM and older PNG and TIFF readers give them.
        intensities = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((intensities * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if gray else "RGB")


def _eight_bit_from_float(intensities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Float images are in [0, 1] if no pixel is above 1, else in [0, 255]."""
    if not np.isfinite(intensities).all():
        raise ValueError("float pixels that are not finite")
    scale = 255.0 if intensities.max() <= 1 else 1.0
    pixels: NDArray[np.uint8] = np.clip(np.rint(intensities * scale), 0, 255).astype(np.uint8)
    return pixels
