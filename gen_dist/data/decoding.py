"""Decoding of an image of any format and mode into 8-bit pixels of a fixed shape."""

from __future__ import annotations

import contextlib
import io
import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile as OpenedFile

from gen_dist.data.array_bytes import UnreadableImage, array_values, is_array
from gen_dist.data.channels import fitted_values
from gen_dist.data.deep_files import (
    Keeping,
    deep_values,
    dtype_of,
    page_count,
    pages_of,
    raw_mode_of,
)
from gen_dist.data.eight_bits import (
    GRAY_MODES,
    LARGE_PIXELS,
    as_pixels,
    eight_bit_opaque,
    float_scale,
    image_as_pixels,
    large_eight_bit,
)
from gen_dist.data.fitting import REDUCING_GAP, Fitting, fitted
from gen_dist.data.headers import ORIENTATION, TURNED, is_on_its_side, lost_bits
from gen_dist.data.image_files import (
    REDUCED,
    Encoded,
    ImageFile,
    read_image,
    registered_formats,
    turn_to,
    unreadable_image,
)
from gen_dist.data.losses import frame_and_channel_losses, intensity_losses
from gen_dist.errors import DataError

# A progressive JPEG has about ten scans. Each costs a pass over all pixels but only a few bytes.
_MAX_JPEG_SCANS = 200


_LARGE_FILE_BYTES = 2**24


_ONE_LARGE = threading.RLock()


class Decoded(NamedTuple):
    """Pixels of an image."""

    pixels: NDArray[Any]
    """[C, H, W], uint8 unless the image is an array of another dtype."""
    gray: bool
    """True if the image is stored as grayscale, so that all channels are equal."""
    losses: dict[str, str]
    """Parts of the image that the pixels lack: kinds of loss, with the values of this image."""
    size: tuple[int, int]
    """(width, height) of the image as stored, turned upright."""


def decode_image(
    encoded: Encoded,
    fitting: Fitting | None,
    channels: int | None,
    keeping: Keeping = REDUCED,
    out: NDArray[Any] | None = None,
) -> Decoded:
    """Decode an image, turn it upright, lay it on white, and bring it to a size.

    Args:
        encoded: file, bytes or pixels.
        fitting: size of the result. None keeps the image's own.
        channels: 1 for grayscale, 3 for RGB. None gives RGB.
        keeping: parts of a file that are kept.
        out: memory for the pixels, [C, H, W]. 8-bit pixels of its shape and type are written to it, which saves a copy;
            `pixels` then is `out`.

    Raises:
        UnreadableImage: empty, truncated, damaged, no image, or more pixels than PIL's limit for safe images.
        OSError: the file cannot be read, which says nothing about the image.
        MemoryError: there is not enough memory, which says nothing about the image.
        DataError: the file has changed since its directory was listed, or padding has no white for its values, or as
            `read_header`.
    """
    if isinstance(encoded, ImageFile):
        with _ONE_LARGE if encoded.size > _LARGE_FILE_BYTES else contextlib.nullcontext():
            return _decode_content(read_image(encoded), fitting, channels, keeping, out, encoded.page, encoded.path)
    return _decode_content(encoded, fitting, channels, keeping, out)


def _decode_content(
    content: bytes | NDArray[Any],
    fitting: Fitting | None,
    channels: int | None,
    keeping: Keeping,
    out: NDArray[Any] | None,
    page: int = 0,
    name: str = "",
) -> Decoded:
    if not len(content):
        raise UnreadableImage("no bytes")
    try:
        if isinstance(content, np.ndarray):
            return _decoded_array(content, fitting, channels)
        if is_array(content):
            return _decoded_array(array_values(content, keeping.deep), fitting, channels)
        with Image.open(io.BytesIO(content), formats=registered_formats()) as opened:
            turn_to(opened, page, keeping, name)
            with _ONE_LARGE if opened.width * opened.height > LARGE_PIXELS else contextlib.nullcontext():
                return _decode_opened(opened, content, fitting, channels, keeping, out)
    except (MemoryError, DataError, UnreadableImage):
        raise
    # Decoders raise nearly every built-in exception on damaged input: OSError, SyntaxError, struct.error, EOFError...
    except Exception as error:
        raise unreadable_image(error) from error


def _decoded_array(values: NDArray[Any], fitting: Fitting | None, channels: int | None) -> Decoded:
    gray = values.shape[0] == 1
    if values.dtype != np.uint8 or values.shape[0] not in (1, 3):
        return Decoded(fitted_values(values, fitting, channels), gray, {}, values.shape[:0:-1])
    image = Image.fromarray(values[0] if gray else np.ascontiguousarray(values.transpose(1, 2, 0)))
    return Decoded(as_pixels(fitted(image, fitting), channels), gray, {}, image.size)


def _decode_opened(
    opened: OpenedFile,
    content: bytes,
    fitting: Fitting | None,
    channels: int | None,
    keeping: Keeping,
    out: NDArray[Any] | None,
) -> Decoded:
    if keeping.pages == "channels" and page_count(opened) > 1:
        return _pages_as_channels(opened, content, fitting, keeping)
    dtype = dtype_of(opened)
    if keeping.deep and dtype != "uint8":
        values = deep_values(opened, content)
        losses = frame_and_channel_losses(opened, raw_mode_of(opened)) if keeping.pages != "images" else {}
        return Decoded(fitted_values(values, fitting, channels or 3), len(values) == 1, losses, values.shape[:0:-1])
    if opened.format in ("JPEG", "MPO"):
        _refuse_scans(opened, content)
    gray = opened.mode in GRAY_MODES
    raw_mode = raw_mode_of(opened)
    lost = lost_bits(opened)
    stored = opened.size
    if fitting is not None and opened.format in ("JPEG", "MPO"):
        # Decode at a half, quarter or eighth of the size where that is enough, as the image lies in the file.
        width, height = (int(side * REDUCING_GAP) for side in fitting[:2])
        opened.draft(None, (height, width) if is_on_its_side(opened) else (width, height))
    opened.load()
    size = stored[::-1] if is_on_its_side(opened) else stored
    large = opened.width * opened.height > LARGE_PIXELS
    if large:
        image = large_eight_bit(opened, gray)
    else:
        lies = opened.getexif().get(ORIENTATION, 1) in TURNED  # images that stand upright would be copied
        upright = ImageOps.exif_transpose(opened) if lies else opened
        image = eight_bit_opaque(upright, gray, float_scale(opened))
    losses = intensity_losses(opened, image, raw_mode) | frame_and_channel_losses(opened, raw_mode)
    losses |= lost | ({"depth": dtype} if dtype != "uint8" else {})
    if keeping.pages == "images":
        losses.pop("frames", None)
    if large:
        opened.close()  # frees its pixels before those of the turned image are allocated
        ImageOps.exif_transpose(image, in_place=True)
    return Decoded(as_pixels(fitted(image, fitting), channels, out), gray, losses, size)


def _refuse_scans(opened: Any, content: bytes) -> None:
    """Raise ValueError for a JPEG, just opened, of very many scans.

    A first scan with all components is the only one unless the file is progressive (ITU-T T.81, B.2.3): its header ends
    where PIL has read to, and no search is needed.
    """
    end, components = opened.fp.tell(), opened.layers
    header = content[end - 8 - 2 * components : end]
    if header[:2] == b"\xff\xda" and header[4:5] == bytes([components]) and not opened.info.get("progressive"):
        return
    if content.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise ValueError(f"a JPEG of more than {_MAX_JPEG_SCANS} scans")


def _pages_as_channels(opened: OpenedFile, content: bytes, fitting: Fitting | None, keeping: Keeping) -> Decoded:
    """One image whose channels are the pages of a file.

    Raises:
        ValueError: pages differ in size or type, or have colours.
    """
    found: list[NDArray[Any]] = []
    losses: dict[str, str] = {}
    for page in pages_of(opened):
        dtype, raw_mode = dtype_of(page), raw_mode_of(page)
        if keeping.deep and dtype != "uint8":
            found.append(deep_values(page, content))
            continue
        found.append(image_as_pixels(page))
        losses |= intensity_losses(page, Image.fromarray(found[-1][0]), raw_mode)
        losses |= {"depth": dtype} if dtype != "uint8" else {}
    if len({(values.shape, values.dtype) for values in found}) > 1 or len(found[0]) != 1:
        kinds = ", ".join(sorted({f"{values.dtype} {list(values.shape)}" for values in found}))
        raise ValueError(f"pages that are no channels of one image: {kinds}")
    values = np.concatenate(found)
    return Decoded(fitted_values(values, fitting, None), False, losses, values.shape[:0:-1])
