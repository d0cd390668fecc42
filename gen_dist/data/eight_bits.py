"""Reduction of opened images of any mode to 8-bit pixels on white."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from gen_dist.data.fitting import PAPER

GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
"""PIL's modes of grayscale images."""
LARGE_PIXELS = 2**24
"""Larger images are read and decoded one at a time: memory is bounded with any number of threads."""


def image_as_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels [C, H, W] of an opened image of any mode, upright and on white; C is 1 for grayscale, else 3.

    Raises:
        ValueError: its pixels are not finite.
    """
    gray = image.mode in GRAY_MODES
    return as_pixels(eight_bit_opaque(ImageOps.exif_transpose(image), gray, float_scale(image)), 1 if gray else 3)


def as_pixels(image: Image.Image, channels: int | None, out: NDArray[Any] | None = None) -> NDArray[np.uint8]:
    """Pixels [C, H, W] of an image of mode L or RGB.

    Args:
        image: the image.
        channels: 1 for grayscale, 3 for RGB. None gives RGB.
        out: memory that the pixels are written to, and returned in, if it is uint8 of their shape.
    """
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which copies in any case
    if out is None:
        return _planes(image)
    words = _memory_of(image) if out.shape == (len(mode), image.height, image.width) and out.dtype == np.uint8 else None
    if words is None:
        return _planes(image)
    # NumPy takes a byte out of each word without the GIL, so that other threads go on; PIL's packers hold it.
    for place, plane in enumerate(out):
        np.copyto(plane, words >> (8 * place) if place else words, casting="unsafe")
    return out


def _planes(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels [C, H, W] by PIL's own packers."""
    if image.mode == "L":
        return np.asarray(image, np.uint8)[None]
    pixels = np.empty((3, image.height, image.width), np.uint8)
    for plane, band in zip(pixels, image.mode, strict=True):
        # PIL gives single bands as fast as pixels; to take pixels apart afterwards costs twice that.
        plane.reshape(-1)[:] = np.frombuffer(image.tobytes("raw", band), np.uint8)
    return pixels


def _memory_of(image: Image.Image) -> NDArray[Any] | None:
    """Pixels where PIL has them: uint8 [H, W] of mode L, little-endian words [H, W] of mode RGB with red lowest.

    None if this version of PIL does not show them, or if the image is in several pieces (PIL has pieces of 16 MB).
    """
    if not hasattr(image, "__arrow_c_array__"):
        return None
    import pyarrow  # takes a fifth of a second

    image.load()
    try:
        found: Any = pyarrow.array(image)
    except ValueError:
        return None
    values = found if image.mode == "L" else found.values
    return np.frombuffer(values.buffers()[1], np.uint8 if image.mode == "L" else "<u4").reshape(
        image.height, image.width
    )


def large_eight_bit(opened: Image.Image, gray: bool) -> Image.Image:
    """As for small images, but not turned upright. Made in strips: whole intermediate images would take more memory."""
    stays_gray = opened.mode[0] in "IF" or (gray and not opened.has_transparency_data)
    image = Image.new("L" if stays_gray else "RGB", opened.size)
    scale = float_scale(opened)
    rows = max(1, LARGE_PIXELS // 16 // opened.width)
    for top in range(0, opened.height, rows):
        strip = opened.crop((0, top, opened.width, min(top + rows, opened.height)))
        image.paste(eight_bit_opaque(strip, gray, scale), (0, top))
    image.info["exif"] = opened.getexif().tobytes()
    return image


def eight_bit_opaque(image: Image.Image, gray: bool, float_scale: float) -> Image.Image:
    """Image of mode L or RGB from one of any mode; see `float_scale`."""
    if image.mode == "F":
        return Image.fromarray(_eight_bit_from_float(np.asarray(image), float_scale))
    if image.mode.startswith("I"):
        # 32-bit integer images hold 16-bit intensities in practice: PGM and older PNG and TIFF readers give them.
        intensities = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((intensities * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, PAPER)
        image = Image.alpha_composite(white, image).convert("RGB")
    mode = "L" if gray else "RGB"
    return image if image.mode == mode else image.convert(mode)  # which copies in any case


def float_scale(image: Image.Image) -> float:
    """Float images are in [0, 1] if no pixel is above 1, else in [0, 255]."""
    if image.mode != "F":
        return 1.0
    highest = np.array(image.getextrema(), np.float32)[1]
    return 255.0 if highest <= 1 else 1.0


def _eight_bit_from_float(intensities: NDArray[np.float32], scale: float) -> NDArray[np.uint8]:
    if not np.isfinite(intensities).all():
        raise ValueError("float pixels that are not finite")
    pixels: NDArray[np.uint8] = np.clip(np.rint(intensities * scale), 0, 255).astype(np.uint8)
    return pixels
