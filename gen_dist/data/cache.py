"""The packed cache: keyed by everything that determines its content, verified, built once, memory-mapped."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gen_dist.config import DataConfig
from gen_dist.config.labels import LabelScheme, scheme_of_json
from gen_dist.data.building import building_prefix, file_slug, only_builder
from gen_dist.data.dataset import Dataset, Split
from gen_dist.data.encoded_reading import encoded_images
from gen_dist.data.image_names import ImageNames, names_file
from gen_dist.data.packing import cache_errors, images_file, labels_file, offsets_file, pack, source_keeping
from gen_dist.data.ranges import Measured, measured_scale
from gen_dist.data.sources.source import SPLITS, KeepsDepth, Source, SplitName, form_of_source
from gen_dist.data.tally import unreadable_images
from gen_dist.data.values import ValueScale, scale_of_json
from gen_dist.errors import DataError
from gen_dist.files import open_regular, read_regular, reason_of, retrying, sync, write_atomically

# Part of the key: raise it when packing changes, to invalidate existing caches.
_FORMAT = 2
_FILES = tuple(name(split) for split in SPLITS for name in (images_file, labels_file))
"""Files that every cache has, and that its digest is of."""
_MORE_FILES = tuple(name(split) for name in (names_file, offsets_file) for split in SPLITS)
"""Files of sources that name their images, and of encoded ones. Caches of older versions lack the names."""
# Files up to this size are hashed at every opening, larger ones only if their stamps have changed.
_ALWAYS_VERIFIED_BYTES = 2**30


class _DamagedCache(Exception):
    """A packed cache that differs from what was written; the text is the difference."""


def open_packed(source: Source, packing: DataConfig, announce: Callable[[str], None]) -> Dataset:
    """Open the packed cache of a source; build it if it is missing or damaged. One process builds, others wait.

    Raises:
        DataError: the source cannot be packed, or the cache directory cannot be written.
        OSError: files of the source cannot be read.
    """
    cache = cache_directory(packing)
    directory = _find(source, packing, cache)
    if directory is not None and _is_directory(directory):
        # Without the lock, so that a finished cache can be shared read-only. Damage is checked again
        # under the lock, because another process may be replacing the cache.
        with contextlib.suppress(_DamagedCache, FileNotFoundError):
            return _open(directory, source, packing, announce)
    with only_builder(cache, source, announce):
        directory = _find(source, packing, cache)
        if directory is None or not _is_directory(directory):
            source.fetch()
            directory = _find(source, packing, cache)
            if directory is None:
                raise DataError(f"{source.name}: its files are still missing after the download")
        if _is_directory(directory):
            try:
                return _open(directory, source, packing, announce)
            except (_DamagedCache, FileNotFoundError) as error:
                reason = error if isinstance(error, _DamagedCache) else f"{Path(error.filename).name} is missing"
                announce(f"packed images in {directory} are damaged ({reason}); packing {source.name} again")
                with cache_errors(cache):
                    shutil.rmtree(directory)
        started = time.monotonic()
        _build(source, packing, directory)
        dataset = _open(directory, source, packing, announce)
    announce(
        f"packed {source.name} in {time.monotonic() - started:.1f} s: {len(dataset.train.labels)} train and "
        f"{len(dataset.test.labels)} test images in {directory}"
    )
    return dataset


def packed_directory(source: Source, packing: DataConfig) -> Path | None:
    """Directory of the packed images of a source, if they are there. They may be damaged.

    Raises:
        DataError: files of the source are missing, or the cache directory cannot be read.
    """
    directory = _find(source, packing, cache_directory(packing))
    if directory is None:
        raise DataError(f"{source.name}: its files are missing; training downloads them, this command does not")
    return directory if _is_directory(directory) else None


def cache_directory(packing: DataConfig) -> Path:
    """Directory of packed data and of results computed from them once.

    Raises:
        DataError: it is in a home directory that does not exist.
    """
    chosen = packing.cache_dir or os.environ.get("GEN_DIST_CACHE") or "~/.cache/gen_dist"
    return expand_home(chosen)


def expand_home(path: str | Path) -> Path:
    """Expand `~` and `~user` at the start of a path.

    Raises:
        DataError: there is no such home directory, e.g. for users defined only in a container.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path}: there is no such home directory; write the path in full") from None


def _find(source: Source, packing: DataConfig, cache: Path) -> Path | None:
    """Cache directory for a source's current content, existing or not. None while its files are missing."""
    fingerprint = source.fingerprint()
    if fingerprint is None:
        return None

    def directory(deep: bool) -> Path:
        try:
            decisive = json.dumps([_FORMAT, _options(source, packing, deep), fingerprint], sort_keys=True)
        except TypeError as error:
            raise DataError(f"{source.name}: {type(source).__name__}.fingerprint() gives no JSON: {error}") from None
        return cache / f"{file_slug(source)}-{hashlib.sha256(decisive.encode()).hexdigest()[:16]}"

    # A cache with all bits tells without a look at all headers that this content has more than 8.
    if (
        packing.dtype == "source"
        and isinstance(source, KeepsDepth)
        and (_is_directory(directory(deep=True)) or source.deep_dtype())
    ):
        return directory(deep=True)
    return directory(deep=False)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _unreadable(path, error) from None


def _options(source: Source, packing: DataConfig, deep: bool) -> dict[str, Any]:
    """Options of the config that determine the content."""
    options: dict[str, Any] = {"image_size": packing.image_size, "channels": packing.channels}
    if packing.fit != "crop":  # named only then, so that caches of cropped images keep their key
        options["fit"] = packing.fit
    if deep:
        options["dtype"] = packing.dtype
    if packing.packed_as != "raw":
        options["packed_as"] = packing.packed_as
    for name in ("value_range", "range_per_channel", "pages", "label_columns"):  # as above, for older caches
        if value := getattr(packing, name):
            options[name] = value
    if packing.missing_labels != "refuse":
        options["missing_labels"] = packing.missing_labels
    if not source.has_test_split:
        options["test_fraction"] = packing.test_fraction
    return options


def _build(source: Source, packing: DataConfig, directory: Path) -> None:
    """Build the cache under a temporary name, sync it to the disk and rename it."""
    cache = directory.parent
    with cache_errors(cache):
        temporary = Path(tempfile.mkdtemp(prefix=building_prefix(source), dir=cache))
    try:
        packed = pack(source, packing, temporary, shown_directory=cache)
        measured = _measured(temporary, source, packing, packed.decoding)
        if _find(source, packing, cache) != directory:
            raise DataError(f"{source.name}: its files changed while they were packed; try again")
        with cache_errors(cache):
            files = [*_FILES, *(name for name in _MORE_FILES if (temporary / name).exists())]
            meta: dict[str, Any] = {
                "format": _FORMAT,
                "source": source.name,
                "options": _options(source, packing, source_keeping(source, packing).deep),
                "class_names": packed.labels.class_names,
                "left_out": packed.left_out,
                "left_out_text": packed.left_out_text,
                "remarks": [*packed.remarks, *measured.remarks],
                "files": {name: _describe(temporary / name) for name in files},
            }
            if not measured.scale.is_plain:
                meta["values"] = measured.scale.as_json()
            if not packed.labels.is_plain:
                meta["labels"] = packed.labels.as_json()
            if packed.decoding:
                meta["decoding"] = packed.decoding
            meta["digest"] = _digest(meta)
            meta["digest_of_this_file"] = digest_of_meta(meta)
            _write_synced(temporary / "meta.json", meta)
            _write_synced(temporary / "seen.json", {name: _stamp(temporary / name) for name in files})
            sync(temporary)
            temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
            try:
                temporary.rename(directory)
            except OSError as error:
                # Another process was as quick, on a file system without locks.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                shutil.rmtree(temporary)
            sync(cache)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _measured(directory: Path, source: Source, packing: DataConfig, decoding: dict[str, Any] | None) -> Measured:
    """Range of the values of both splits."""
    train, test = (_images(directory, split, "r", decoding) for split in SPLITS)
    return measured_scale(source.name, train, test, packing, form_of_source(source))


def _open(directory: Path, source: Source, packing: DataConfig, announce: Callable[[str], None]) -> Dataset:
    """Verify and map a cache, and announce what it lacks of its source.

    Raises:
        DataError: images were left out, and the config treats this as an error; or the cache cannot be read just now.
        _DamagedCache: it differs from what was written.
        FileNotFoundError: the cache or one of its files is missing.
    """
    try:
        meta, labels, train, test = retrying(lambda: _read(directory, source.name))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(directory, error) from None
    if meta["left_out"]:
        if packing.unreadable_images == "error":
            raise DataError(
                f"{source.name}: it has {unreadable_images(meta['left_out'])}: {meta['left_out_text']}; repair or "
                "remove what is unreadable, or use --unreadable-images skip"
            )
        announce(f"{source.name}: left out {unreadable_images(meta['left_out'])}: {meta['left_out_text']}")
    for remark in [*source.remarks(), *meta["remarks"]]:
        announce(f"{source.name}: {remark}")
    return Dataset(train, test, tuple(meta["class_names"]), meta["digest"], labels)


def _read(directory: Path, source_name: str) -> tuple[dict[str, Any], LabelScheme | None, Split, Split]:
    try:
        with open_regular(directory / "meta.json") as file:
            meta = json.loads(file.read())
        if meta["digest"] != _digest(meta) or meta["digest_of_this_file"] != digest_of_meta(meta):
            raise _DamagedCache("meta.json has another digest")
        _verify(directory, meta["files"])
        scale = scale_of_json(meta.get("values"))
        labels = scheme_of_json(meta["labels"], ()) if "labels" in meta else None
        train, test = (_map(directory, split, source_name, meta, scale) for split in SPLITS)
        return meta, labels, train, test
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedCache(f"{type(error).__name__}: {error}") from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read packed images in {path}: {reason_of(error)}; repair that and try again, or name another "
        "directory with --cache-dir or $GEN_DIST_CACHE"
    )


def _map(directory: Path, split: SplitName, source_name: str, meta: dict[str, Any], scale: ValueScale) -> Split:
    # Copy-on-write maps: torch.from_numpy warns about arrays that cannot be written.
    labels, *names = (
        np.load(directory / name, mmap_mode="c", allow_pickle=False)
        for name in (labels_file(split), names_file(split))
        if name in meta["files"]
    )
    images = _images(directory, split, "c", meta.get("decoding"))
    of_images = ImageNames(names[0]) if names else None
    return Split(f"{split} split of {source_name}", images, labels, of_images, scale)


def _images(directory: Path, split: SplitName, mode: Literal["c", "r"], decoding: dict[str, Any] | None) -> Any:
    path = directory / images_file(split)
    content = np.load(path, mmap_mode=mode, allow_pickle=False)
    if decoding is None:
        return content
    return encoded_images(path, content, np.load(directory / offsets_file(split), mmap_mode=mode), decoding)


def _verify(directory: Path, files: dict[str, Any]) -> None:
    """Compare the files with their digests; large ones only if size, time or inode have changed."""
    names = [*_FILES, *(name for name in _MORE_FILES if name in files)]
    for name in names:
        if (size := (directory / name).stat().st_size) != files[name]["bytes"]:
            raise _DamagedCache(f"{name} has {size} bytes, not {files[name]['bytes']}")
    stamps = {name: _stamp(directory / name) for name in names}
    large = sum(files[name]["bytes"] for name in names) > _ALWAYS_VERIFIED_BYTES
    if large and _seen(directory) == stamps:
        return
    for name in names:
        if _describe(directory / name) != files[name]:
            raise _DamagedCache(f"{name} has another SHA-256")
    if large:
        # In a cache that is shared read-only the next opening verifies again.
        with contextlib.suppress(OSError):
            write_atomically(directory / "seen.json", json.dumps(stamps, indent=2))


def _seen(directory: Path) -> object:
    """Stamps of the files when they were last verified; None if they are not readable."""
    try:
        return json.loads(read_regular(directory / "seen.json"))
    except (OSError, ValueError, RecursionError):
        return None


def _describe(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _digest(meta: dict[str, Any]) -> str:
    content = [[meta["files"][name]["sha256"] for name in _FILES], list(meta["class_names"])]
    content += [meta[name] for name in ("values", "labels", "decoding") if name in meta]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digest_of_meta(meta: dict[str, Any]) -> str:
    """SHA-256 of what describes a cache, which stands in it as `digest_of_this_file`."""
    others = {name: value for name, value in meta.items() if name != "digest_of_this_file"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    sync(path)
