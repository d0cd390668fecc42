"""Data sets by the name of their source."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gen_dist.config import DataConfig
from gen_dist.config.addresses import shown
from gen_dist.config.data import Layout
from gen_dist.data import sources
from gen_dist.data.cache import cache_directory, expand_home, open_packed, packed_directory
from gen_dist.data.dataset import Dataset, Split
from gen_dist.data.given import images_given
from gen_dist.data.naming import printable
from gen_dist.data.shards.opening import open_shards
from gen_dist.data.sources.source import ATTRIBUTES, Request, Source, SourceKind, SplitName, registered
from gen_dist.data.survey import Survey
from gen_dist.data.surveying import survey
from gen_dist.errors import DataError
from gen_dist.files import reason_of
from gen_dist.plugins.loading import find_parts

_SHARDS = "shards:"
"""Start of the name of a set that is not packed whole."""
_BY_ENDING = {".npy": "array:", ".npz": "array:", ".parquet": "parquet:", ".tar": _SHARDS}
"""Sources of files, by the ends of their names."""


def open_dataset(
    source: str, root: str | Path, packing: DataConfig, announce: Callable[[str], None] = print
) -> Dataset:
    """Open the images of a source, packing them first unless a packed cache exists.

    Args:
        source: name of a source, such as mnist5k, `NAME:PATH`, such as folder:holiday/, or `shards:PATTERN`; see
            `source_kinds`.
        root: directory with torchvision's data sets; downloads go there.
        packing: how the images are packed, and where the cache is.
        announce: takes a line before work that takes long, and about images that are left out.

    Raises:
        DataError: the source is unknown, missing, damaged, cannot be read just now or cannot be packed as configured;
            one line.
    """
    with _one_line_errors(source):
        if packing.decoded_on == "cpu":
            return _opened(source, root, packing, announce)
        from gen_dist.data.gpu_jpeg import check_decoder, decoded_on, own_gpu

        gpu = own_gpu()
        check_decoder(gpu)  # packing may take long
        return decoded_on(_opened(source, root, packing, announce), gpu)


def _opened(source: str, root: str | Path, packing: DataConfig, announce: Callable[[str], None]) -> Dataset:
    if source.startswith(_SHARDS):
        return open_shards(source.removeprefix(_SHARDS), packing, announce)
    return open_packed(_find_source(source, expand_home(root), packing), packing, announce)


def source_named(source: str, packing: DataConfig) -> Source:
    """A source that is packed, by its name.

    Raises:
        DataError: it is unknown, missing, damaged or cannot be read just now; one line.
    """
    with _one_line_errors(source):
        return _find_source(source, Path(), packing)


def survey_source(
    source: str, root: str | Path, packing: DataConfig, announce: Callable[[str], None] = print
) -> Survey:
    """Find out what packing would make of the images of a source. Nothing is written.

    Args:
        source: as for `open_dataset`.
        root: directory with torchvision's data sets. Missing ones are not downloaded.
        packing: how the images would be packed.
        announce: takes lines about servers of shards that fail.

    Raises:
        DataError: the source is unknown, missing, damaged or cannot be read just now; one line. Reasons to refuse its
            images are in the survey.
    """
    from gen_dist.data.sources.in_memory import ArraySource, packed_source

    with _one_line_errors(source):
        if source.startswith(_SHARDS):
            from gen_dist.data.shards.surveying import survey_shards

            return survey_shards(source.removeprefix(_SHARDS), packing, announce)
        found = _find_source(source, expand_home(root), packing)
        packed_in = packed_directory(found, packing)
        if packed_in and isinstance(found, ArraySource):  # the cache alone still has the images
            packed = open_packed(found, packing, lambda _line: None)
            splits: dict[SplitName, Split] = {"train": packed.train, "test": packed.test}
            arrays = {name: (split.images, split.labels) for name, split in splits.items()}
            found = packed_source(found, arrays, packed.labels, packed.scale.form)
        return survey(found, packing, cache_directory(packing), packed_in)


def pack_given(
    data: Any,
    test_data: Any = None,
    *,
    layout: Layout | None = None,
    packing: DataConfig,
    announce: Callable[[str], None] = print,
) -> str:
    """Pack images given from Python, unless a packed cache of them exists. They are held in memory meanwhile.

    Args:
        data: images to train on; see `gen_dist.data.given.images_given`.
        test_data: images to test on. None holds some out of `data`.
        layout: order of the axes of [N, a, b, c] if both are possible.
        packing: how the images are packed, and where the cache is.
        announce: takes lines as that of `open_dataset`.

    Returns:
        Name under which `open_dataset` finds them by their content, `array:DIGEST`.

    Raises:
        DataError: there are no images, or they cannot be packed as configured; one line.
    """
    from gen_dist.data.sources.in_memory import given_source  # late: sources register in the order of their files

    with _one_line_errors("data"):
        test = None if test_data is None else images_given(test_data, layout, packing.array_of)
        source = given_source(images_given(data, layout, packing.array_of), test)
        open_packed(source, packing, announce)
        return f"array:{source.key}"


@contextlib.contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path = printable(str(error.filename)) if error.filename is not None else "a file"
        raise DataError(
            f"{printable(source)}: cannot read {path}: {reason_of(error)}; repair that and try again"
        ) from None
    except MemoryError:
        raise DataError(f"{printable(source)}: out of memory while it was packed; free some and try again") from None


def source_kinds() -> Mapping[str, SourceKind]:
    """All sources by name: those that the modules of `gen_dist.data.sources` and plug-ins register."""
    find_parts(sources.__name__)
    return registered()


def _find_source(source: str, root: Path, packing: DataConfig) -> Source:
    if packing.test_shards is not None:
        raise DataError(f"{printable(source)}: --test-shards {shown(packing.test_shards)} is for shards; leave it out")
    if packing.decoded_on != "cpu" and packing.packed_as != "encoded":
        raise DataError(
            f"{printable(source)}: --decoded-on {packing.decoded_on} is for encoded images; leave it out, or add "
            "--packed-as encoded"
        )
    name, colon, path = source.partition(":")
    kind = source_kinds().get(name)
    if kind is None or (colon and not kind.takes_path):
        raise DataError(f"unknown data source {source!r}; {_meant(source)}")
    if packing.label_columns and name != "parquet" and kind.open.__module__.startswith(sources.__name__):
        columns = " ".join(map(printable, packing.label_columns))
        raise DataError(f"{printable(source)}: --label-columns {columns} is for parquet:PATH; leave it out")
    if packing.array_of and name != "array":
        raise DataError(f"{printable(source)}: --array-of {packing.array_of} is for array:FILE; leave it out")
    if kind.takes_path and not path:
        raise DataError(f"{name}: needs a path, as in {name}:/path/to/images")
    found = kind.open(Request(expand_home(path) if path else Path(), root, packing))
    # The type is asked first: a property may read all files.
    if missing := [name for name in ATTRIBUTES if not (hasattr(type(found), name) or hasattr(found, name))]:
        raise DataError(
            f"{printable(source)}: {type(found).__name__}, which its source opens, has no {', '.join(missing)}; see "
            "gen_dist.data.sources.source.Source"
        )
    return found


def _meant(source: str) -> str:
    """Advice for an unknown source: the source that reads what lies at that path, or the list of all sources."""
    kind = next((kind for ending, kind in _BY_ENDING.items() if source.endswith(ending)), "folder:")
    path = os.path.expanduser(source)
    if kind == "folder:" and os.path.isdir(path):
        return f"if it holds images, write folder:{printable(source)}"
    if (kind != "folder:" and os.path.isfile(path)) or (kind == "parquet:" and os.path.isdir(path)):
        return f"for what lies at that path, write {kind}{printable(source)}"
    if kind == _SHARDS and "*" in source:
        return f"for shards of these names, write {kind}{printable(source)}"
    return f"use one of {', '.join(_written(source_kinds()))}"


def _written(kinds: Mapping[str, SourceKind]) -> list[str]:
    """Sources as `--data` takes them: by name, and the shards' patterns at the end."""
    return [
        *(f"{name}:PATH" if kind.takes_path else name for name, kind in sorted(kinds.items())),
        f"{_SHARDS}PATTERN",
    ]
