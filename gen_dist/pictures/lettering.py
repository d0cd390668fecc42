"""Class names in pictures: in letters that a font of this machine has, and no longer than there is room for."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gen_dist.startup import quick_import

MOST_COLUMNS = 24
"""Width of a name in columns of narrow letters. Longer names are cut, with an ellipsis."""
NO_FONT = "no font here has the letters of the class names: classes are numbered"
NO_FONT_FOR_SOME = "no font here has the letters of some class names: those classes are numbered"


class Font(NamedTuple):
    """A font of this machine."""

    family: str
    file: str


class Lettering(NamedTuple):
    """Names as they can be drawn."""

    names: list[str]
    font: Font | None
    """Font that they need beside the usual one; None if they need none."""
    note: str
    """Words for the picture's title if the names are not the classes' own; else empty."""

    def inches(self, size: float) -> float:
        """Width of the widest name at a size in points."""
        from matplotlib.ft2font import FT2Font

        font = FT2Font(self.font.file if self.font else usual_font())
        font.set_size(size, 72)
        widths = [0.0]
        for name in self.names:
            font.set_text(name)
            widths.append(font.get_width_height()[0] / 64 / 72)
        return max(widths)


def lettering_of(class_names: Sequence[str], font: str | None = None) -> Lettering:
    """Names of classes as a picture can show them.

    Args:
        class_names: names of any length, in any script.
        font: file of the font that the picture is drawn in. None is matplotlib's usual one.
    """
    names = [_shortened("".join(letter if letter.isprintable() else "?" for letter in name)) for name in class_names]
    if len(set(names)) < len(names):  # cut to the same beginning
        names = [_shortened(f"{place}: {name}") for place, name in enumerate(names)]
    if "".join(names).isascii():
        return Lettering(names, None, "")
    letters = _letters_of(font or usual_font())
    missing = frozenset("".join(names)) - letters
    if not missing:
        return Lettering(names, None, "")
    if other := _font_with(missing):
        return Lettering(names, other, "")
    drawn = [name if letters.issuperset(name) else f"class {place}" for place, name in enumerate(names)]
    return Lettering(drawn, None, NO_FONT_FOR_SOME if set(drawn) & set(names) else NO_FONT)


def columns_of(text: str) -> int:
    """Width of a text in columns of narrow letters; a letter of East Asian scripts takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _shortened(name: str) -> str:
    if columns_of(name) <= MOST_COLUMNS:
        return name
    kept = ""
    for letter in name:
        if columns_of(kept + letter) >= MOST_COLUMNS:
            break
        kept += letter
    return f"{kept.rstrip()}…"


def usual_font() -> str:
    """File of the font that matplotlib brings along and draws in."""
    with quick_import():
        import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _letters_of(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(file).get_charmap()))


@functools.cache
def _font_with(letters: frozenset[str]) -> Font | None:
    """First font of this machine with all these letters; None if it has none."""
    from matplotlib.font_manager import fontManager

    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.style != "normal", entry.weight != 400)):
        if any(word in entry.name for word in ("Emoji", "Last Resort", "LastResort")):  # cannot be drawn as outlines
            continue
        try:
            if letters <= _letters_of(entry.fname):
                return Font(entry.name, entry.fname)
        except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
            continue
    return None
