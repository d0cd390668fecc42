"""The packed cache: keyed by everything that determines its content, verified, built once, memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.data.packing import cache_errors, images_file, labels_file, pack
from gen_dist.data.sources.source import SPLITS, Source, SplitName
from gen_dist.errors import DataError
from gen_dist.files import sync

# Part of the key: raise it when packing changes, to invalidate existing caches.
_FORMAT = 1
_FILES = tuple(name(split) for split in SPLITS for name in (images_file, labels_file))
# Files up to this size are hashed at every opening, larger ones only if their stamps have changed.
_ALWAYS_VERIFIED_BYTES = 2**30


@dataclass(frozen=True)
class Split:
    """Images of one split, in the source's order; those held out of a train split in keyed order."""

    name: str
    """Name in error messages: `train split of mnist5k`."""
    images: NDArray[np.uint8]
    """uint8 [N, C, H, W], 0..255, memory-mapped. Read-only by convention: a write stays private to the process."""
    labels: NDArray[np.int64]
    """int64 [N], indices into the class names of the data set; all 0 for a source without labels."""


@dataclass(frozen=True)
class Dataset:
    """A packed source: both splits have one image shape and one set of classes."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    """Names of the labels 0, 1, ...; one name for a source without labels."""
    digest: str
    """SHA-256 of images, labels and class names: equal digests are equal data, whatever the path or machine."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


class _DamagedCache(Exception):
    """A packed cache that differs from what was written; the text is the difference."""


def open_packed(source: Source, packing: DataConfig, announce: Callable[[str], None]) -> Dataset:
    """Open the packed cache of a source; build it if it is missing or damaged. One process builds, others wait.

    Raises:
        DataError: the source cannot be packed, or the cache directory cannot be written.
    """
    cache = cache_directory(packing)
    directory = _find(source, packing, cache)
    if directory is not None and directory.is_dir():
        # Without the lock, so that a finished cache can be shared read-only. Damage is checked again
        # under the lock, because another process may be replacing the cache.
        with contextlib.suppress(_DamagedCache, FileNotFoundError):
            return _open(directory, source, packing, announce)
    with _only_builder(cache, source, announce):
        directory = _find(source, packing, cache)
        if directory is None or not directory.exists():
            source.fetch()
            directory = _find(source, packing, cache)
            if directory is None:
                raise DataError(f"{source.name}: its files are still missing after the download")
        if directory.exists():
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
    decisive = json.dumps([_FORMAT, _options(source, packing), fingerprint], sort_keys=True)
    return cache / f"{source.slug}-{hashlib.sha256(decisive.encode()).hexdigest()[:16]}"


def _options(source: Source, packing: DataConfig) -> dict[str, Any]:
    """Options of the config that determine the content."""
    options: dict[str, Any] = {"image_size": packing.image_size, "channels": packing.channels}
    if not source.has_test_split:
        options["test_fraction"] = packing.test_fraction
    return options


@contextlib.contextmanager
def _only_builder(cache: Path, source: Source, announce: Callable[[str], None]) -> Iterator[None]:
    """Context manager that holds the lock of this source's builders. The system frees it if a builder dies."""
    with cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{source.slug}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            announce(f"waiting for another process that packs {source.name} into {cache}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(source: Source, packing: DataConfig, directory: Path) -> None:
    """Build the cache under a temporary name, sync it to the disk and rename it."""
    cache = directory.parent
    temporary_prefix = f".{source.slug}-building-"
    with cache_errors(cache):
        for left_over in cache.glob(f"{temporary_prefix}*"):
            # Left by a killed builder: a live one would hold the lock.
            shutil.rmtree(left_over)
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix, dir=cache))
    try:
        packed = pack(source, packing, temporary, shown_directory=cache)
        with cache_errors(cache):
            meta: dict[str, Any] = {
                "format": _FORMAT,
                "source": source.name,
                "options": _options(source, packing),
                "class_names": packed.class_names,
                "skipped": packed.skipped,
                "skipped_names": packed.skipped_names,
                "files": {name: _describe(temporary / name) for name in _FILES},
            }
            meta["digest"] = _digest(meta)
            _write_synced(temporary / "meta.json", meta)
            _write_synced(temporary / "seen.json", {name: _stamp(temporary / name) for name in _FILES})
            sync(temporary)
            temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
            temporary.rename(directory)
            sync(cache)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _open(directory: Path, source: Source, packing: DataConfig, announce: Callable[[str], None]) -> Dataset:
    """Verify and map a cache.

    Raises:
        DataError: images were left out, and the config treats this as an error.
        _DamagedCache: it differs from what was written.
        FileNotFoundError: the cache or one of its files is missing.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta["digest"] != _digest(meta):
            raise _DamagedCache("meta.json has another digest")
        _verify(directory, meta["files"])
        train, test = (_map(directory, split, source.name) for split in SPLITS)
    except (ValueError, KeyError, TypeError) as error:
        raise _DamagedCache(f"{type(error).__name__}: {error}") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"cannot read packed images in {directory}: {error.strerror or error}") from None
    if meta["skipped"]:
        names = ", ".join(meta["skipped_names"]) + (", ..." if meta["skipped"] > len(meta["skipped_names"]) else "")
        if packing.unreadable_images == "error":
            raise DataError(
                f"{source.name}: {meta['skipped']} images are unreadable: {names}; repair or remove them, or use "
                "--unreadable-images skip"
            )
        announce(f"{source.name}: left out {meta['skipped']} unreadable images: {names}")
    return Dataset(train, test, tuple(meta["class_names"]), meta["digest"])


def _map(directory: Path, split: SplitName, source_name: str) -> Split:
    # Copy-on-write maps: torch.from_numpy warns about arrays that cannot be written.
    images, labels = (
        np.load(directory / name(split), mmap_mode="c", allow_pickle=False) for name in (images_file, labels_file)
    )
    return Split(f"{split} split of {source_name}", images, labels)


def _verify(directory: Path, files: dict[str, Any]) -> None:
    """Compare the files with their digests; large ones only if size, time or inode have changed."""
    for name in _FILES:
        if (size := (directory / name).stat().st_size) != files[name]["bytes"]:
            raise _DamagedCache(f"{name} has {size} bytes, not {files[name]['bytes']}")
    stamps = {name: _stamp(directory / name) for name in _FILES}
    large = sum(files[name]["bytes"] for name in _FILES) > _ALWAYS_VERIFIED_BYTES
    seen_path = directory / "seen.json"
    if large and seen_path.exists() and json.loads(seen_path.read_text(encoding="utf-8")) == stamps:
        return
    for name in _FILES:
        if _describe(directory / name) != files[name]:
            raise _DamagedCache(f"{name} has another SHA-256")
    if large:
        # In a cache that is shared read-only the next opening verifies again.
        with contextlib.suppress(OSError):
            temporary = directory / f"seen.json.{os.getpid()}"
            _write_synced(temporary, stamps)
            temporary.rename(seen_path)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _digest(meta: dict[str, Any]) -> str:
    content = [[meta["files"][name]["sha256"] for name in _FILES], list(meta["class_names"])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _write_synced(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    sync(path)
