"""Files of a set of shards, from a pattern."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from glob import escape

from gen_dist.config.addresses import shown
from gen_dist.data.naming import printable
from gen_dist.data.shards.fetching import is_url
from gen_dist.errors import DataError

_MOST_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
_GLOB = re.compile(r"[*?\[]")


def shards_of(name: str, pattern: str, glob: Callable[[str], list[str]]) -> list[str]:
    """Paths or URLs of the shards of a pattern, in its order; those that a `*` stands for in the order of their names.

    Args:
        name: the source in error messages.
        pattern: path or URL with `{000..199}`, `{a,b}`, `*`, `?` or `[0-9]`, or of one shard. Directories at the start
            of a path that are there, as `photos [2020]/`, have the name that is written.
        glob: function that lists the files of a pattern with `*`.

    Raises:
        DataError: there are none, one twice, or files of several kinds.
    """
    found: list[str] = []
    start, rest = ("", pattern) if is_url(pattern) else _split(os.path.expanduser(pattern))
    for one in _expanded(name, rest):
        is_pattern = _GLOB.search(one.partition("?")[0] if one.startswith(("http:", "https:")) else one)
        listed = (
            sorted(glob(os.path.expanduser(escape(start) + one))) if is_pattern else [os.path.expanduser(start + one)]
        )
        if not listed:
            raise DataError(
                f"{name}: no file is named {shown(start + one)}; shards need a pattern as data/{{000..199}}.tar"
            )
        found += [place if is_url(place) else os.path.abspath(place) for place in listed]
        if len(found) > _MOST_SHARDS:
            raise DataError(f"{name}: more than {_MOST_SHARDS:,} shards; put more images into each")
    if len(set(found)) < len(found):
        twice = next(one for place, one in enumerate(found) if one in found[:place])
        raise DataError(f"{name}: its pattern names {shown(twice)} twice")
    kinds = sorted({kind_of(name, one) for one in found})
    if len(kinds) > 1:
        raise DataError(f"{name}: shards are of {' and '.join(kinds)}; name those of one kind")
    return found


def kind_of(name: str, place: str) -> str:
    """Kind of a shard by its name: tar or parquet.

    Raises:
        DataError: it is neither.
    """
    path = place.partition("?")[0] if "://" in place else place
    for kind in ("tar", "parquet"):
        if path.lower().endswith(f".{kind}"):
            return kind
    way_out = "unpack it with gunzip" if path.lower().endswith((".tar.gz", ".tgz")) else "name .tar or .parquet files"
    raise DataError(f"{name}: {printable(shown(place))} is no .tar or .parquet file; {way_out}")


def _split(pattern: str) -> tuple[str, str]:
    """Directories at the start of a pattern that are there under this very name, and the rest of it."""
    end = pattern.rfind("/") + 1
    while end and not os.path.isdir(pattern[:end]):
        end = pattern.rfind("/", 0, end - 1) + 1
    return pattern[:end], pattern[end:]


def _expanded(name: str, pattern: str) -> Iterator[str]:
    """Patterns without braces."""
    found = _BRACES.search(pattern)
    if found is None:
        if lone := re.search(r"[{}]", pattern):
            raise DataError(f"{name}: {lone[0]} has no other brace; write a range as {{000..199}}, or {{a,b}}")
        yield pattern
        return
    numbers = _NUMBERS.fullmatch(found[1])
    if numbers is None:
        if ".." in found[1] or not found[1]:
            raise DataError(f"{name}: {{{found[1]}}} is no range of two whole numbers; write it as {{000..199}}")
        choices = found[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < _MOST_SHARDS:
            raise DataError(
                f"{name}: {{{found[1]}}} counts from {first} to {last}; write the smaller number first, at most "
                f"{_MOST_SHARDS:,} of them"
            )
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    for choice in choices:
        yield from _expanded(name, pattern[: found.start()] + choice + pattern[found.end() :])
