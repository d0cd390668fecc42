"""Pictures of a page as WebP, at the size that they are shown, within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from gen_dist.errors import CheckpointError

PAGE_BYTES = 6 * 2**20
"""Budget of all pictures of a page. Base64 adds a third."""
SHOWN_PIXELS = 1056
"""Largest width: a picture takes up to 528 pixels of a page, which dense screens show twice as fine."""
LARGEST_SHARE = 400 * 2**10
"""Bytes of one picture on a page with few."""


class _Encoding(NamedTuple):
    """One way to store a picture."""

    scale: float
    quality: int


_ENCODINGS = (_Encoding(1.0, 85), _Encoding(1.0, 65), _Encoding(0.7, 65), _Encoding(0.5, 55), _Encoding(0.35, 45))


def thumbnails(pictures: Sequence[Path], page_pictures: int) -> list[str]:
    """Data URIs of pictures of one kind.

    Args:
        pictures: PNG files of about one size.
        page_pictures: number of all pictures on the page, which share the budget.

    Raises:
        CheckpointError: a picture is damaged.
    """
    images = (_scaled(image, min(1.0, SHOWN_PIXELS / image.width)) for image in map(read_picture, pictures))
    return data_uris(images, page_pictures)


def data_uris(images: Iterable[Image.Image], page_pictures: int) -> list[str]:
    """Data URIs of images of one kind, at most SHOWN_PIXELS wide; see `thumbnails`."""
    share = min(LARGEST_SHARE, PAGE_BYTES // max(page_pictures, 1))
    uris = []
    first = 0
    for image in images:
        data, first = _encoded(image, share, first)
        uris.append(f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}")
    return uris


def read_picture(picture: Path) -> Image.Image:
    """A PNG file as grey levels or RGB.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with Image.open(picture, formats=["PNG"]) as checked:
            checked.verify()  # checksums, which decoding does not compare
        with Image.open(picture, formats=["PNG"]) as opened:
            return opened.convert("L" if opened.mode in ("L", "1") else "RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"picture {picture} is damaged: {reason}; remove it and report again") from None


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    if scale >= 1.0:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)


def _encoded(image: Image.Image, share: int, first: int) -> tuple[bytes, int]:
    """A picture in at most `share` bytes if any encoding has so few, and the place of that encoding.

    Encodings before `first` did not do for a picture of the same kind. Few grey levels need no losses.
    """
    if first == 0:
        exact = _webp(image, lossless=True, quality=20, method=1)
        if len(exact) <= share // 2:
            return exact, 0
    data = b""
    for place in range(first, len(_ENCODINGS)):
        scale, quality = _ENCODINGS[place]
        data = _webp(_scaled(image, scale), quality=quality, method=2)
        if len(data) <= share:
            return data, place
    return data, len(_ENCODINGS) - 1


def _webp(image: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", **options)
    return buffer.getvalue()
