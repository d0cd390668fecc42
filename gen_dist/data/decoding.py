"""Decoding of an image of any format and mode into 8-bit pixels of a fixed shape."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import threading
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile as OpenedFile

from gen_dist.data.array_bytes import UnreadableImage as UnreadableImage
from gen_dist.data.array_bytes import array_header, array_values, is_array
from gen_dist.data.channels import fitted_values
from gen_dist.data.deep_files import (
    Keeping,
    check_pages,
    deep_values,
    dtype_of,
    page_count,
    pages_of,
    ppm_maximum,
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
from gen_dist.data.losses import frame_and_channel_losses, intensity_losses
from gen_dist.errors import DataError
from gen_dist.files import open_regular, read_regular, retrying

_FORMATS = (
    *("JPEG", "PNG", "WEBP"),  # looked for in this order
    *("AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG2000", "MPO", "PCX", "PPM", "QOI", "TGA", "TIFF"),
)
"""PIL has formats that run other programs on the content: an EPS file, whatever its name, is given to Ghostscript."""
_COLOURS = {"P": "palette", "PA": "palette", "RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB"}
"""Words for modes that are not gray; others have PIL's name, such as CMYK."""
_DEPTHS = {"1": "1-bit", "I": "32-bit", "F": "float"}
_ORIENTATION = 0x0112  # EXIF 2.32, tag Orientation
_ON_THEIR_SIDE = range(5, 9)
_TURNED = range(2, 9)
_MAX_FILE_BYTES = 2**28
# A progressive JPEG has about ten scans. Each costs a pass over all pixels but only a few bytes.
_MAX_JPEG_SCANS = 200
_LARGE_FILE_BYTES = 2**24
_ONE_LARGE = threading.RLock()


class ImageFile(NamedTuple):
    """An image file as it was when its directory was listed."""

    path: str
    size: int
    mtime_ns: int
    page: int = 0
    """Page of the file that is the image, from 0 on."""


_REDUCED = Keeping()

Encoded = ImageFile | bytes | NDArray[Any]
"""An image file, the bytes of one, or values [C, H, W] of a dtype that is kept."""


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


@contextlib.contextmanager
def image_warnings_as_intended() -> Iterator[None]:
    """Context manager that makes PIL's decompression bomb warnings errors and silences its other warnings.

    The filters are global to the process, so it encloses the decoding threads and is not used inside them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_header(encoded: Encoded, keeping: Keeping = _REDUCED) -> Header:
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
        _refuse_size(encoded)
        with retrying(lambda: open_regular(encoded.path)) as file:
            return _header_of(file, keeping, encoded.page, encoded.path)
    if not encoded:
        raise UnreadableImage("no bytes")
    if is_array(encoded):
        return _header_of_array(*array_header(encoded))
    return _header_of(io.BytesIO(encoded), keeping)


def _header_of_array(shape: tuple[int, ...], dtype: str) -> Header:
    channels, height, width = shape
    colours = {1: "gray", 3: "RGB"}.get(channels, f"of {channels} channels")
    return Header(f"{dtype} array {colours}", width, height, channels == 1, "", False, {}, channels, dtype)


def count_pages(file: ImageFile) -> int:
    """Pages or frames of an image file.

    Raises:
        UnreadableImage, OSError: as for `read_header`.
    """
    _refuse_size(file)
    try:
        with (
            retrying(lambda: open_regular(file.path)) as content,
            Image.open(content, formats=_registered_formats()) as opened,
        ):
            return page_count(opened)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        raise _unreadable(error) from error
    except Exception as error:
        raise _unreadable(error) from error


def encoded_bytes(encoded: Encoded) -> bytes:
    """Bytes of an encoded image, or of an image file; see `read_image`."""
    if isinstance(encoded, ImageFile):
        return read_image(encoded)
    assert isinstance(encoded, bytes)
    return encoded


def read_image(file: ImageFile) -> bytes:
    """Bytes of an image file.

    Raises:
        UnreadableImage: empty, or too large for an image.
        OSError: it cannot be read, which says nothing about the image.
        DataError: it has changed since its directory was listed.
    """
    _refuse_size(file)
    try:
        content = read_regular(file.path, _MAX_FILE_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise _too_large() from None
        raise
    if len(content) != file.size:
        raise DataError(f"{file.path} changed while it was read: {len(content):,} bytes after {file.size:,}; try again")
    return content


def decode_image(
    encoded: Encoded, fitting: Fitting | None, channels: int | None, keeping: Keeping = _REDUCED
) -> Decoded:
    """Decode an image, turn it upright, lay it on white, and bring it to a size.

    Args:
        encoded: file, bytes or pixels.
        fitting: size of the result. None keeps the image's own.
        channels: 1 for grayscale, 3 for RGB. None gives RGB.
        keeping: parts of a file that are kept.

    Raises:
        UnreadableImage: empty, truncated, damaged, no image, or more pixels than PIL's limit for safe images.
        OSError: the file cannot be read, which says nothing about the image.
        MemoryError: there is not enough memory, which says nothing about the image.
        DataError: the file has changed since its directory was listed, or padding has no white for its values, or as
            `read_header`.
    """
    if isinstance(encoded, ImageFile):
        with _ONE_LARGE if encoded.size > _LARGE_FILE_BYTES else contextlib.nullcontext():
            return _decode_content(read_image(encoded), fitting, channels, keeping, encoded.page, encoded.path)
    return _decode_content(encoded, fitting, channels, keeping)


def _decode_content(
    content: bytes | NDArray[Any],
    fitting: Fitting | None,
    channels: int | None,
    keeping: Keeping,
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
        with Image.open(io.BytesIO(content), formats=_registered_formats()) as opened:
            _turn_to(opened, page, keeping, name)
            with _ONE_LARGE if opened.width * opened.height > LARGE_PIXELS else contextlib.nullcontext():
                return _decode_opened(opened, content, fitting, channels, keeping)
    except (MemoryError, DataError, UnreadableImage):
        raise
    # Decoders raise nearly every built-in exception on damaged input: OSError, SyntaxError, struct.error, EOFError...
    except Exception as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UnreadableImage:
    """The error of an image, with the reason that PIL gave."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image of a format that is read"
    return UnreadableImage(reason or type(error).__name__)


def _refuse_size(file: ImageFile) -> None:
    if not file.size:
        raise UnreadableImage("an empty file")  # not read, as those of /proc say 0 bytes and may wait for events
    if file.size > _MAX_FILE_BYTES:
        raise _too_large()


def _too_large() -> UnreadableImage:
    return UnreadableImage(f"more than {_MAX_FILE_BYTES:,} bytes")


def _header_of(file: BinaryIO, keeping: Keeping, page: int = 0, name: str = "") -> Header:
    try:
        with Image.open(file, formats=_registered_formats()) as opened:
            _turn_to(opened, page, keeping, name)
            return _described(opened, keeping)
    except (MemoryError, DataError):
        raise
    except Exception as error:
        # PIL's own OSErrors have no number. A damaged header may send it to a place before the start of the file.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise _unreadable(error) from error


def _described(opened: Image.Image, keeping: Keeping) -> Header:
    raw_mode, mode = raw_mode_of(opened), opened.mode
    dtype = dtype_of(opened) if keeping.deep else "uint8"
    deep = (mode[0] in "IF" or "16" in raw_mode or ppm_maximum(opened) > 255) and dtype == "uint8"
    gray, transparent = mode in GRAY_MODES, opened.has_transparency_data
    # The method of PNG files would decode the pixels, to look for EXIF behind them.
    exif = Image.Image.getexif(opened) if opened.format == "PNG" else opened.getexif()
    orientation = exif.get(_ORIENTATION, 1)
    width, height = opened.size[::-1] if orientation in _ON_THEIR_SIDE else opened.size
    is_16_bit = "16" in raw_mode or mode.startswith("I;16") or bool(_lost_bits(opened))
    words = [opened.format or "", "16-bit" if is_16_bit else _DEPTHS.get(mode, "")]
    words += [_COLOURS.get(mode, "gray" if gray else mode)]
    words += ["with transparency"] if transparent else []
    converted = "become 8-bit" if deep else "are laid on white" if transparent else ""
    if not converted and mode not in ("L", "RGB") and dtype == "uint8":
        converted = "become 8-bit gray" if gray else "become RGB"
    losses = frame_and_channel_losses(opened, raw_mode) if keeping.pages in (None, "first") else {}
    losses |= _lost_bits(opened)
    kind, turned = " ".join(filter(None, words)), orientation in _TURNED
    channels = 1 if gray else 3
    if keeping.pages == "channels" and (pages := page_count(opened)) > 1:
        kind, channels, gray = f"{kind} of {pages} pages", pages, False
    return Header(kind, width, height, gray, converted, turned, losses, channels, dtype)


def _lost_bits(opened: Image.Image) -> dict[str, str]:
    """Loss of a PPM file with colours of 16 bits, before it is loaded: PIL reads their upper 8."""
    return {"ppm": f"0..{ppm_maximum(opened)}"} if opened.mode == "RGB" and ppm_maximum(opened) > 255 else {}


def _is_on_its_side(opened: Image.Image) -> bool:
    return opened.getexif().get(_ORIENTATION, 1) in _ON_THEIR_SIDE


def _decoded_array(values: NDArray[Any], fitting: Fitting | None, channels: int | None) -> Decoded:
    gray = values.shape[0] == 1
    if values.dtype != np.uint8 or values.shape[0] not in (1, 3):
        return Decoded(fitted_values(values, fitting, channels), gray, {}, values.shape[:0:-1])
    image = Image.fromarray(values[0] if gray else np.ascontiguousarray(values.transpose(1, 2, 0)))
    return Decoded(as_pixels(fitted(image, fitting), channels), gray, {}, image.size)


def _turn_to(opened: Image.Image, page: int, keeping: Keeping, name: str) -> None:
    """Turn to a page of a file.

    Raises:
        DataError: what its pages are is not said, and they have more than 8 bits.
        Exception: its pages are wanted and damaged.
    """
    if keeping.deep and keeping.pages is None and dtype_of(opened) != "uint8" and (count := page_count(opened)) > 1:
        raise DataError(
            f"{name or 'an image'} has {count} pages of {dtype_of(opened)}: say --pages images if each is an image, "
            "--pages channels if each is a channel of one, or --pages first"
        )
    if page:
        opened.seek(page)
    elif keeping.pages in ("images", "channels"):
        check_pages(opened)


@functools.cache
def _registered_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # some builds of PIL lack AVIF


def _decode_opened(
    opened: OpenedFile, content: bytes, fitting: Fitting | None, channels: int | None, keeping: Keeping
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
    lost_bits = _lost_bits(opened)
    stored = opened.size
    if fitting is not None and opened.format in ("JPEG", "MPO"):
        # Decode at a half, quarter or eighth of the size where that is enough, as the image lies in the file.
        width, height = (int(side * REDUCING_GAP) for side in fitting[:2])
        opened.draft(None, (height, width) if _is_on_its_side(opened) else (width, height))
    opened.load()
    size = stored[::-1] if _is_on_its_side(opened) else stored
    large = opened.width * opened.height > LARGE_PIXELS
    if large:
        image = large_eight_bit(opened, gray)
    else:
        lies = opened.getexif().get(_ORIENTATION, 1) in _TURNED  # images that stand upright would be copied
        upright = ImageOps.exif_transpose(opened) if lies else opened
        image = eight_bit_opaque(upright, gray, float_scale(opened))
    losses = intensity_losses(opened, image, raw_mode) | frame_and_channel_losses(opened, raw_mode)
    losses |= lost_bits | ({"depth": dtype} if dtype != "uint8" else {})
    if keeping.pages == "images":
        losses.pop("frames", None)
    if large:
        opened.close()  # frees its pixels before those of the turned image are allocated
        ImageOps.exif_transpose(image, in_place=True)
    return Decoded(as_pixels(fitted(image, fitting), channels), gray, losses, size)


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
