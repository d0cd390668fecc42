"""Words for the augmentation of training images: flip, shift:PIXELS, crop:SHARE, rotate90."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gen_dist.errors import ConfigError


class ImageChanges(NamedTuple):
    """Random changes of training images, from the words of a config."""

    flip: bool = False
    """Mirror left and right, every second image."""
    shift: int = 0
    """Move by up to so many pixels each way; what is moved in repeats the edge."""
    crop: float = 1.0
    """Least share of both sides of a part that is resized to the whole image; 1 crops nothing."""
    rotate90: bool = False
    """Turn by 0, 90, 180 or 270 degrees."""


def image_changes(words: Sequence[str]) -> ImageChanges:
    """Read the words of a config.

    Raises:
        ConfigError: a word is unknown, named twice, or has no number or one out of range.
    """
    found: dict[str, bool | int | float] = {}
    for word in words:
        name, colon, number = word.partition(":")
        if name in found:
            raise ConfigError(f"augment has {name} twice; name it once")
        if name in ("flip", "rotate90") and not colon:
            found[name] = True
        elif name == "shift" and number.isdecimal() and 0 < int(number) < 10_000:
            found[name] = int(number)
        elif name == "crop" and (share := _share(number)) is not None:
            found[name] = share
        else:
            raise ConfigError(
                f"augment {word!r} is none of flip, rotate90, shift:PIXELS as shift:2, or crop:SHARE as crop:0.8, a "
                "least share of the sides between 0.1 and 1"
            )
    return ImageChanges(**found)  # type: ignore[arg-type]


def _share(number: str) -> float | None:
    try:
        share = float(number)
    except ValueError:
        return None
    return share if 0.1 <= share < 1.0 else None
