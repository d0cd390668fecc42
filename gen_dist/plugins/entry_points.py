"""Modules that installed packages name as plug-ins, in the entry points of their metadata."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

GROUP = "gen_dist.plugins"
"""Entry points of installed packages; each names a module."""


def entry_points(paths: Sequence[str] | None = None) -> list[str]:
    """Modules that installed packages name in our group. A look for the text first spares parsing hundreds of them."""
    found = []
    for path in sys.path if paths is None else paths:
        with contextlib.suppress(OSError):
            for name in os.listdir(path or "."):
                if name.endswith((".dist-info", ".egg-info")):
                    found += _entries_in(os.path.join(path, name, "entry_points.txt"))
    return found


def _entries_in(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return []
    if f"[{GROUP}]" not in text:
        return []
    import configparser  # most environments have no such file

    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    try:
        parser.read_string(text)
        return [value.partition(":")[0].strip() for value in parser[GROUP].values()]
    except (configparser.Error, KeyError):
        return []
