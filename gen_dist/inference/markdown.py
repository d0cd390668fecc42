"""Foreign text in Markdown: class names, paths and commands say what they are, and nothing else."""

from __future__ import annotations

import re

from gen_dist.data.naming import printable

# Underscores within a word, as in fid_10k, mean nothing.
_MARKS = re.compile(r"[\\`*\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# GitHub makes links of these without any marks.
_LINKS = re.compile(r"(?<=[A-Za-z]):(?=//)|(?<=www)\.|@", re.IGNORECASE)


def text(foreign: object) -> str:
    """Text within a line of Markdown that shows `foreign` literally."""
    escaped = "".join(_ENTITIES.get(one, one) for one in printable(str(foreign)))
    escaped = _MARKS.sub(lambda mark: f"\\{mark[0]}", escaped)
    return _LINKS.sub(lambda mark: f"&#{ord(mark[0])};", escaped)


def code(foreign: object) -> str:
    """A span of code that shows `foreign` literally."""
    shown = printable(str(foreign))
    return f"<code>{text(shown)}</code>" if re.search("[`<>&]", shown) or not shown.strip() else f"`{shown}`"
