"""`shards:PATTERN`: a set of images in many files, which is indexed once and then read by ranges."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.config.addresses import refuse_secrets, shown
from gen_dist.config.labels import scheme_of_json
from gen_dist.data.building import building_prefix, file_slug, only_builder
from gen_dist.data.cache import cache_directory, digest_of_meta
from gen_dist.data.dataset import Dataset, Split
from gen_dist.data.fitting import Fitting
from gen_dist.data.image_names import ImageNames, names_file
from gen_dist.data.naming import printable
from gen_dist.data.on_demand import ImagesOnDemand
from gen_dist.data.packing import cache_errors, images_file, labels_file
from gen_dist.data.shard_order import IMAGES_MIXED, SHARDS_MIXED
from gen_dist.data.shards.block_cache import BlockCache
from gen_dist.data.shards.building import COLUMNS, IndexBuilder, damage_of
from gen_dist.data.shards.fetching import READERS, Facts, Fetcher
from gen_dist.data.shards.image_names import ShardNames
from gen_dist.data.shards.indexing import ShardContents
from gen_dist.data.shards.labels import request_of
from gen_dist.data.shards.packed_parts import PackedParts, keeping_of
from gen_dist.data.shards.places import kind_of, shards_of
from gen_dist.data.shards.reading import Blocks, Shard, ShardImages, is_read_directly
from gen_dist.data.values import scale_of_json
from gen_dist.errors import DataError, number_of
from gen_dist.files import read_regular, reason_of, sync

# Raise it when the content of an index changes.
_FORMAT = 1
# Indexes up to this size are compared with their digests at every opening.
_ALWAYS_VERIFIED_BYTES = 2**28
_GIB = 2**30
_CONTENTS = "shard-contents"
_DEFAULTS = DataConfig()


class ShardSet(NamedTuple):
    """A set of shards."""

    name: str
    slug: str
    places: list[str]
    test_places: list[str]


def open_shards(pattern: str, packing: DataConfig, announce: Callable[[str], None]) -> Dataset:
    """Open a set of shards; index them first unless that was done. One process of a host indexes, others wait.

    Args:
        pattern: path or URL of tar files in the WebDataset layout or of parquet files, with `{000..199}` or `*`.
        packing: size and channels of the images, test split and cache.
        announce: takes lines for the user.

    Raises:
        DataError: the set cannot be used as configured, a shard is missing, damaged or has changed; one line.
    """
    shards, fetcher = shard_set(pattern, packing, announce)
    name, places = shards.name, shards.places
    cache, directory = cache_directory(packing), index_directory(shards, packing)
    reason = "" if (directory / "meta.json").exists() else "missing"
    with contextlib.suppress(_Damaged, FileNotFoundError):
        return _open(directory, name, packing, fetcher, announce)
    with only_builder(cache, shards, announce):
        if (directory / "meta.json").exists():
            try:
                return _open(directory, name, packing, fetcher, announce)
            except (_Damaged, FileNotFoundError) as error:
                reason = str(error)
        if directory.exists():
            announce(f"the index in {directory} is damaged ({reason}); indexing {name} again")
            with cache_errors(cache):
                shutil.rmtree(directory)
        started = time.monotonic()
        _build(shards, packing, directory, fetcher)
        dataset = _open(directory, name, packing, fetcher, announce)
    announce(
        f"indexed {name} in {time.monotonic() - started:.1f} s: {len(dataset.train.labels):,} train and "
        f"{number_of(len(dataset.test.labels), 'test image')} in {number_of(len(places), 'shard')}; "
        f"index in {directory}"
    )
    return dataset


def shard_set(pattern: str, packing: DataConfig, announce: Callable[[str], None]) -> tuple[ShardSet, Fetcher]:
    """Shards that a pattern names, and their reader.

    Raises:
        DataError: there are none, they are of two kinds, or an option is not for shards.
    """
    name = printable(f"shards:{shown(pattern)}")
    _refuse(name, pattern, packing)
    fetcher = Fetcher(name, announce)
    places = shards_of(name, pattern, fetcher.glob)
    tested = packing.test_shards
    test_places = shards_of(f"test_shards {shown(tested)}", tested, fetcher.glob) if tested else []
    if twice := set(places) & set(test_places):
        raise DataError(f"{name}: {printable(shown(min(twice)))} is in the test split too; name it once")
    slug = f"shards-{places[0].rpartition('/')[2].partition('.')[0] or 'set'}"
    return ShardSet(name, slug, places, test_places), fetcher


def index_directory(shards: ShardSet, packing: DataConfig) -> Path:
    """Directory of the index of a set, existing or not."""
    return cache_directory(packing) / f"{file_slug(shards)}-{_key(shards, packing)}"


def reader_of(name: str, fetcher: Fetcher, contents: ShardContents) -> Callable[[str, int, int], bytes]:
    """Function that gives the bytes of a shard from an offset to another, for several threads."""
    from gen_dist.data.shards.parquet_contents import RowGroupReader

    groups, remembered = RowGroupReader(name, fetcher), functools.lru_cache(maxsize=READERS)(contents)

    def read(place: str, first: int, last: int) -> bytes:
        if first == last:  # empty images alone: no row group has their bytes, and no server sends none
            return b""
        if kind_of(name, place) == "tar":
            return fetcher.read(place, first, last)
        return groups.read(place, remembered(place), first, last)

    return read


class _Damaged(Exception):
    """An index that differs from what was written; the text is the difference."""


def _refuse(name: str, pattern: str, packing: DataConfig) -> None:
    refuse_secrets("data", pattern)
    if not pattern:
        raise DataError("shards: needs a pattern, as in shards:data/{000..199}.tar")
    for option in ("pages", "layout", "array_of"):
        if (value := getattr(packing, option)) != getattr(_DEFAULTS, option):
            given = " ".join(value) if isinstance(value, tuple) else value
            raise DataError(f"{name}: --{option.replace('_', '-')} {given} is not for shards; leave it out")


def _key(shards: ShardSet, packing: DataConfig) -> str:
    """Key of everything that determines the index but the content of the shards, which is compared when it is read."""
    options = [packing.image_size, packing.fit, packing.channels, packing.dtype, packing.unreadable_images]
    # Options that are as they always were have no part, so that indexes of before there were others are found.
    later = ("label_columns", "missing_labels", "value_range", "range_per_channel")
    more = [[option, getattr(packing, option)] for option in later]
    more = [one for one in more if one[1] != getattr(_DEFAULTS, one[0])]
    tested = None if shards.test_places else packing.test_fraction
    content = json.dumps([_FORMAT, *shards[2:], options, tested, *more])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _build(shards: ShardSet, packing: DataConfig, directory: Path, fetcher: Fetcher) -> None:
    """Build the index under a temporary name and rename it."""
    cache = directory.parent
    contents = ShardContents(shards.name, cache / _CONTENTS, fetcher, request_of(packing))
    contents.make([*shards.places, *shards.test_places])
    with cache_errors(cache):
        temporary = Path(tempfile.mkdtemp(prefix=building_prefix(shards), dir=cache))
    try:
        parts = PackedParts(shards.name, packing, fetcher, reader_of(shards.name, fetcher, contents))
        builder = IndexBuilder(shards.name, packing, shards.places, shards.test_places, contents, parts)
        with cache_errors(cache):
            meta = builder.build(temporary)
            meta["digest_of_this_file"] = digest_of_meta(meta)
            (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            sync(temporary / "meta.json")
            temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
            os.replace(temporary, directory)
            sync(cache)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _open(
    directory: Path, name: str, packing: DataConfig, fetcher: Fetcher, announce: Callable[[str], None]
) -> Dataset:
    """Map an index.

    Raises:
        _Damaged: it differs from what was written.
        FileNotFoundError: a file of it is missing.
        DataError: it cannot be read just now.
    """
    try:
        meta = json.loads(read_regular(directory / "meta.json"))
        if meta["digest_of_this_file"] != digest_of_meta(meta):
            raise _Damaged("meta.json has another digest")
        if damage := damage_of(directory, meta, _ALWAYS_VERIFIED_BYTES):
            raise _Damaged(damage)
        dataset = _dataset(directory, meta, name, packing, fetcher, announce)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f"cannot read the index in {directory}: {reason_of(error)}; repair that and try again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from None
    for remark in [*meta["remarks"], *_lines_on_budget(meta, dataset, packing)]:
        announce(f"{name}: {remark}")
    return dataset


def _lines_on_budget(meta: dict[str, Any], dataset: Dataset, packing: DataConfig) -> list[str]:
    """A line if the local disk's budget holds less than a window of images of shards that are kept there."""
    kept = [end for place, *_, end in meta["shards"] if not is_read_directly(place)]
    if not kept:
        return []
    images, block = max(1, len(dataset.train.labels)), sum(kept) / meta["blocks"][-1]
    window = sum(kept) / images * min(images, IMAGES_MIXED)
    window += min(len(kept), SHARDS_MIXED) * block  # pieces of shards begin and end within blocks
    needed = min(window, sum(kept)) / _GIB
    if packing.cache_gib >= needed:
        return []
    return [
        f"--cache-gib {packing.cache_gib:g} is less than the {needed:.3g} GiB that {IMAGES_MIXED:,} mixed images take, "
        f"so parts of shards are fetched several times: give it {float(f'{1.1 * needed:.2g}'):g}"
    ]


def _dataset(
    directory: Path,
    meta: dict[str, Any],
    name: str,
    packing: DataConfig,
    fetcher: Fetcher,
    announce: Callable[[str], None],
) -> Dataset:
    def mapped(file: str) -> NDArray[Any]:
        # Copy-on-write: torch.from_numpy warns about arrays that cannot be written.
        found: NDArray[Any] = np.load(directory / file, mmap_mode="c", allow_pickle=False)
        return found

    columns = {column: mapped(f"{column}.npy") for column in (*COLUMNS, "block_crcs")}
    shards = [Shard(place, Facts(size, tag), sha256, end) for place, size, tag, sha256, end in meta["shards"]]
    cache = BlockCache(cache_directory(packing) / "shard-blocks", int(packing.cache_gib * _GIB), announce)
    first_rows, first_blocks = (np.array(meta[key], np.int64) for key in ("first_rows", "blocks"))

    def fetch_block(shard: Shard, block: int, start: int, stop: int) -> bytes:
        if kind_of(name, shard.place) == "tar":
            return fetcher.read(shard.place, start, stop)
        from gen_dist.data.shards.parquet_contents import row_group

        return row_group(name, shard.place, shard.facts, fetcher, block)

    blocks = Blocks(shards, columns["block_starts"], columns["block_crcs"], first_blocks, fetcher, cache, fetch_block)
    encoded = ShardImages(
        blocks,
        columns["offsets"],
        columns["sizes"],
        first_rows,
        skips=packing.unreadable_images == "skip",
        announce=announce,
    )
    fitting = None if meta["fitting"] is None else Fitting(*meta["fitting"])
    scale = scale_of_json(meta.get("values"))
    images: Any = ImagesOnDemand(
        encoded,
        fitting,
        meta["image_shape"],
        scale.dtype,
        keeping_of(scale.dtype),
        reduces_colour=packing.channels == 1,
    )
    packed = {
        split: (mapped(images_file(split)), mapped(labels_file(split)))  # type: ignore[arg-type]
        for split in ("sample", "test")
    }
    known = ShardContents(name, cache_directory(packing) / _CONTENTS, fetcher, request_of(packing))
    names = ShardNames(encoded, functools.lru_cache(maxsize=1)(known))
    some = Split(f"sample of {name}", *packed["sample"], scale=scale)
    counts = np.diff(first_rows)
    train = Split(f"train split of {name}", images, columns["labels"], names, scale, counts, some)
    of_test = ImageNames(mapped(names_file("test"))) if names_file("test") in meta["files"] else None
    test = Split(f"test split of {name}", *packed["test"], of_test, scale)
    scheme = scheme_of_json(meta["labels"], ()) if "labels" in meta else None
    return Dataset(train, test, tuple(meta["class_names"]), meta["digest"], scheme)
