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
    shape = len(mode), image.height, image.width
    fits = out is not None and out.shape == shape and out.dtype == np.uint8 and out.flags.c_contiguous
    pixels = out if out is not None and fits else np.empty(shape, np.uint8)
    for plane, band in zip(pixels, mode, strict=True):
        # PIL gives single bands as fast as pixels; to take pixels apart afterwards costs twice that. NumPy would let go
        # of the GIL for each of these short copies, and threads that decode wait for one another then.
        memoryview(plane.reshape(-1))[:] = image.tobytes("raw", band)
    return pixels


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
