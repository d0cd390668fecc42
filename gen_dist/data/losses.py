"""Losses of an image that does not fit into 8-bit pixels of one frame, measured while decoding and told to the user."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gen_dist.data.tally import Tally, shown_names
from gen_dist.errors import agreeing, number_of

KINDS = {
    "depth": "have more than 8 bits and are reduced to 8, by --dtype uint8 or because images are of several types",
    "ppm": "are 16-bit colour PPM, of which the upper 8 bits are read; convert them to PNG or TIFF",
    "frames": "have several pages or frames and only the first is used; save each as a file if they are wanted, "
    "or use --pages",
    "channels": "have channels beyond colour and transparency, which are dropped",
    "levels": "lose most of their grey levels; stretch intensities to the whole range before, 0..65535 for integers "
    "or 0..1 for floats",
    "range": "have intensities beyond the range, which are cut off; scale them before, to 0..65535 for integers or "
    "0..1 for floats",
}
"""Kinds of loss, each with the end of a sentence about several images that have it."""
INTENSITY_KINDS = frozenset({"levels", "range"})
"""Kinds that pixels show; the others stand in the header of a file."""
# Eight-bit images with fewer levels than this show steps; 12 bits in a 16-bit file become 16 levels.
_FEW_LEVELS = 65
_LEVELS_MERGED = 4
_LOOKED_AT = 2**16
_MAX_PIXELS = 2**22
_ROUNDING = 0.5


def lines_on_losses(losses: Tally) -> list[str]:
    """A line for each kind of loss that images have."""
    return [
        f"{number_of(count, 'image')} {agreeing(count, KINDS[kind])}: {shown_names(count, names)} ({detail})"
        for kind, count, detail, names in losses.kinds()
    ]


def frame_and_channel_losses(opened: Image.Image, raw_mode: str) -> dict[str, str]:
    """Losses by the structure of a file. `raw_mode` is PIL's name of the stored channels."""
    losses = {}
    if opened.format == "TIFF" and "X" in raw_mode:
        losses["channels"] = raw_mode
    # A second picture in a JPEG is a preview or a map of brightness that cameras add.
    if opened.format != "MPO" and _has_frames(opened):
        losses["frames"] = "several"
    return losses


def intensity_losses(before: Image.Image, after: Image.Image, raw_mode: str) -> dict[str, str]:
    """Losses of intensities between an image as stored and its 8-bit form."""
    if before.mode[0] not in "IF":
        # PIL keeps the upper 8 of 16 bits of a coloured image: with 14 used bits, at most the value 63.
        if "16" not in raw_mode:
            return {}
        darkest, brightest = _range(np.array(after.getextrema()))
        dark = darkest < brightest < _FEW_LEVELS
        return {"levels": f"16 bits a channel become {darkest:g}..{brightest:g} of 0..255"} if dark else {}
    stored, kept = (np.asarray(_part(image)) for image in (before, after))
    low, high = _range(stored)
    losses = {}
    unit = before.mode == "F" and high <= 1
    limit, rounding = (65535, 0.0) if before.mode != "F" else (1.0, _ROUNDING / 255) if unit else (255, _ROUNDING)
    if low < -rounding or high > limit + rounding:
        losses["range"] = f"{low:g}..{high:g} beyond 0..{limit:g}"
    stride = max(1, int((stored.size / _LOOKED_AT) ** 0.5))
    levels, kept_levels = (np.unique(pixels[::stride, ::stride]).size for pixels in (stored, kept))
    if kept_levels <= _FEW_LEVELS and levels >= _LEVELS_MERGED * kept_levels:
        darkest, brightest = _range(kept)
        losses["levels"] = f"{low:g}..{high:g} become {darkest:g}..{brightest:g} of 0..255"
    return losses


def _part(image: Image.Image) -> Image.Image:
    """The whole of most images, and the middle of very large ones."""
    rows = _MAX_PIXELS // image.width
    if rows >= image.height:
        return image
    top = (image.height - rows) // 2
    return image.crop((0, top, image.width, top + max(rows, 1)))


def _range(pixels: NDArray[Any]) -> tuple[float, float]:
    return float(pixels.min()), float(pixels.max())


def _has_frames(opened: Image.Image) -> bool:
    """Asked after decoding. Formats may seek to the second frame, and fail there."""
    try:
        return bool(getattr(opened, "is_animated", False))
    except Exception:
        return False
