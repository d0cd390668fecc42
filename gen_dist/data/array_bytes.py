"""Images as the bytes of `.npy` files, which keep any type and number of channels that no image format has.

Format: numpy.lib.format, version 1.0 and later.
"""

from __future__ import annotations

import math
import re
import sys
import tokenize
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.values import DTYPES

MAGIC = b"\x93NUMPY"
"""First bytes of a `.npy` file."""
_MOST_VALUES = 2**28
_KIND = re.compile(r"'descr': '([^']{1,20})'")
_ONE_TYPE = re.compile(r"[<>=|]?[b-zA-Z?][0-9]{0,4}")
"""Types of numbers and texts. NumPy takes more for a type, and parses it as Python."""
_ORDER = re.compile(r"'fortran_order': (True|False)")
_SHAPE = re.compile(r"'shape': \(([0-9, ]{0,80})\)")
_PLAIN = re.compile(
    rf"\{{'descr': '{_ONE_TYPE.pattern}', 'fortran_order': (True|False), 'shape': \([0-9, ]{{0,80}}\), \}} *\n"
)
MOST_HEADER_BYTES = 2**16 + 12
"""Longest plain header, with what stands before it."""

DAMAGES = (
    *(ValueError, LookupError, TypeError, ArithmeticError, EOFError, RuntimeError, SyntaxError, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Exceptions of `numpy.load` for files that are damaged or hold something else, besides OSError and MemoryError.
Python's tokenizer reads headers that are no literal; RuntimeError stands for a password or a compression that Python
lacks."""


def loaded_array(value: Any, name: str) -> NDArray[Any]:
    """Array that `numpy.load` gave for a name, whose texts are texts.

    Raises:
        ValueError: it is the bytes of another file in an archive, or a text has characters that Unicode lacks, of which
            CPython makes a SystemError.
    """
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name} is not an array")
    found: NDArray[Any] = value
    if found.dtype.kind == "U" and found.size and found.dtype.itemsize:
        characters = (
            np.ascontiguousarray(found).reshape(-1).view(np.dtype(np.uint32).newbyteorder(found.dtype.byteorder))
        )
        if int(characters.max()) > sys.maxunicode:
            raise ValueError(f"a text of {name} has characters that Unicode lacks")
    return found


class UnreadableImage(Exception):
    """An image that cannot be decoded; the text is the reason, without the name."""


def is_array(content: bytes) -> bool:
    """True for the bytes of a `.npy` file."""
    return content[: len(MAGIC)] == MAGIC


def has_plain_header(content: bytes) -> bool:
    """True for the bytes of a `.npy` file of numbers or texts whose header is as NumPy writes it.

    NumPy tells of others that they were written by Python 2, or parses them as Python. The first bytes are enough.
    """
    start, end = _header_span(content)
    return bool(_PLAIN.fullmatch(content[start:end].decode("latin-1")))


def array_header(content: bytes) -> tuple[tuple[int, ...], str]:
    """Shape (C, H, W) and type of the values of an image [H, W] or [C, H, W], without reading them.

    Raises:
        UnreadableImage: it is damaged, or has another shape or type.
    """
    header = _parsed(content)
    return header.shape, header.dtype.newbyteorder("=").name


def array_values(content: bytes, deep: bool) -> NDArray[Any]:
    """Values [C, H, W] of an image.

    Args:
        content: bytes of a `.npy` file.
        deep: False refuses values of more than 8 bits: there is no rule to reduce them by.

    Raises:
        UnreadableImage: as `array_header`; or it is cut off, or has values that are not finite.
    """
    header = _parsed(content)
    native = header.dtype.newbyteorder("=")
    if native != np.uint8 and not deep:
        raise UnreadableImage(f"an array of {native.name}, which --dtype uint8 does not reduce")
    count = int(np.prod(header.shape))
    if len(content) < header.end + count * native.itemsize:
        raise UnreadableImage("an array that is cut off")
    values: NDArray[Any] = np.frombuffer(content, header.dtype, count, header.end)
    values = values.reshape(header.shape[::-1]).T if header.is_fortran else values.reshape(header.shape)
    values = np.array(values, native, order="C")  # a copy: torch warns of arrays that cannot be written to
    if native.kind == "f" and not np.isfinite(values).all():
        raise UnreadableImage("values that are not finite")
    return values


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    end: int
    """Offset of the first value."""


def _header_span(content: bytes) -> tuple[int, int]:
    """Offsets of the header's first byte and of the one behind it."""
    wide = content[len(MAGIC) : len(MAGIC) + 1] != b"\x01"
    start = len(MAGIC) + (6 if wide else 4)
    return start, start + int.from_bytes(content[len(MAGIC) + 2 : start], "little")


def _parsed(content: bytes) -> _Header:
    """Header of a `.npy` file. NumPy's own reader parses Python, which CPython 3.11 cannot do in several threads."""
    start, end = _header_span(content)
    text = content[start:end].decode("latin-1")
    kind, order, sides = (found.search(text) for found in (_KIND, _ORDER, _SHAPE))
    if len(content) < end:
        raise UnreadableImage("an array that is cut off")
    if not (kind and order and sides):
        raise UnreadableImage("an array whose header is damaged")
    try:
        dtype = np.dtype(kind[1] if _ONE_TYPE.fullmatch(kind[1]) else object)
    except (TypeError, ValueError):
        dtype = np.dtype(object)
    if dtype.newbyteorder("=").name not in DTYPES:
        raise UnreadableImage(f"an array of {dtype.name[:40]}, not {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    shape = tuple(int(side) for side in sides[1].replace(",", " ").split())
    if len(shape) not in (2, 3) or not 0 < math.prod(shape) <= _MOST_VALUES:
        raise UnreadableImage(f"an array {list(shape)}, not [H, W] or [C, H, W] of at most {_MOST_VALUES:,} values")
    return _Header((1, *shape) if len(shape) == 2 else shape, dtype, order[1] == "True", end)
