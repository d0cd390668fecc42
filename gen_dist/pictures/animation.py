"""Animations: frames as a WebP file that loops, or as an MP4 file where the package av is installed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen_dist.errors import ConfigError
from gen_dist.files import write_atomically
from gen_dist.pictures.grids import PAPER, Images

_LONGEST_SIDE = 16_383
"""Pixels that WebP has at most."""
_SUFFIXES = (".webp", ".mp4")


def check_animation(path: Path) -> None:
    """Raise ConfigError if a file's name is of no animation, or if its format needs a package that is missing."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ConfigError(f"{path} cannot be written: name a file of {' or '.join(_SUFFIXES)}")
    if suffix == ".mp4":
        _av()


def save_animation(path: Path, frames: Sequence[Images], frames_per_second: float) -> None:
    """Write frames, one after another, endlessly.

    Args:
        path: a .webp or .mp4 file.
        frames: uint8 [H, W, 1 or 3] each, of one shape; at least one.
        frames_per_second: of the animation.

    Raises:
        ConfigError: see `check_animation`; or the frames are too large for the format.
        OSError: the file cannot be written.
    """
    check_animation(path)
    height, width = frames[0].shape[:2]
    if max(height, width) > _LONGEST_SIDE:
        raise ConfigError(
            f"{path} would be {width} x {height} pixels, and has at most {_LONGEST_SIDE}; show fewer images"
        )
    coloured = [np.ascontiguousarray(np.broadcast_to(frame, (height, width, 3))) for frame in frames]
    write = _webp if path.suffix.lower() == ".webp" else _mp4
    write_atomically(path, write(coloured, frames_per_second))


def _webp(frames: Sequence[Images], frames_per_second: float) -> bytes:
    first, *others = map(Image.fromarray, frames)
    buffer = io.BytesIO()
    first.save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=max(1, round(1000 / frames_per_second)),
        loop=0,
        quality=85,
        method=2,
    )
    return buffer.getvalue()


def _mp4(frames: Sequence[Images], frames_per_second: float) -> bytes:
    av = _av()
    height, width = frames[0].shape[:2]
    odd = (0, height % 2), (0, width % 2), (0, 0)  # the codec takes even sides
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frames_per_second).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for frame in frames:
            padded = np.pad(frame, odd, constant_values=PAPER)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ConfigError("MP4 needs the package av; run `pip install av`, or name a .webp file") from None
    return av
