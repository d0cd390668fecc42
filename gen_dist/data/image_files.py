"""Image files: what may be opened as one, how it is read, and the errors of those that cannot be."""

from __future__ import annotations

import contextlib
import errno
import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.deep_files import (
    Keeping,
    check_pages,
    dtype_of,
    page_count,
)
from gen_dist.errors import DataError
from gen_dist.files import read_regular

_FORMATS = (
    *("JPEG", "PNG", "WEBP"),  # looked for in this order
    *("AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG2000", "MPO", "PCX", "PPM", "QOI", "TGA", "TIFF"),
)
"""PIL has formats that run other programs on the content: an EPS file, whatever its name, is given to Ghostscript."""


_MAX_FILE_BYTES = 2**28


class ImageFile(NamedTuple):
    """An image file as it was when its directory was listed."""

    path: str
    size: int
    mtime_ns: int
    page: int = 0
    """Page of the file that is the image, from 0 on."""


REDUCED = Keeping()
"""Eight bits of the first page."""


Encoded = ImageFile | bytes | NDArray[Any]
"""An image file, the bytes of one, or values [C, H, W] of a dtype that is kept."""


@contextlib.contextmanager
def image_warnings_as_intended() -> Iterator[None]:
    """Context manager that makes PIL's decompression bomb warnings errors and silences its other warnings.

    The filters are global to the process, so it encloses the decoding threads and is not used inside them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


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
    refuse_size(file)
    try:
        content = read_regular(file.path, _MAX_FILE_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise _too_large() from None
        raise
    if len(content) != file.size:
        raise DataError(f"{file.path} changed while it was read: {len(content):,} bytes after {file.size:,}; try again")
    return content


def refuse_size(file: ImageFile) -> None:
    """Raise UnreadableImage for a file that is empty, or too large for an image."""
    if not file.size:
        raise UnreadableImage("an empty file")  # not read, as those of /proc say 0 bytes and may wait for events
    if file.size > _MAX_FILE_BYTES:
        raise _too_large()


def _too_large() -> UnreadableImage:
    return UnreadableImage(f"more than {_MAX_FILE_BYTES:,} bytes")


def unreadable_image(error: Exception) -> UnreadableImage:
    """The error of an image, with the reason that PIL gave."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image of a format that is read"
    return UnreadableImage(reason or type(error).__name__)


def turn_to(opened: Image.Image, page: int, keeping: Keeping, name: str) -> None:
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
def registered_formats() -> list[str]:
    """Formats that are read, in the order in which PIL tries them."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # some builds of PIL lack AVIF
