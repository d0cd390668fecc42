"""Checks of data sources: what they pack is always the same, whole and told apart from damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.data.catalogue import source_kinds
from gen_dist.data.sources.source import HasLabels, Request, Source
from gen_dist.errors import DataError
from gen_dist.files import temporary_directory
from gen_dist.testing.report import Announce, Check, Failure, Result, Skipped, nobody, raise_failures, run_checks


class SourceTrial:
    """A source as `--data` names it, packed into directories of this trial."""

    def __init__(self, data: str, packing: DataConfig, root: str, folder: Path) -> None:
        self.data = data
        self.packing = packing
        self.root = root
        self.folder = folder

    @property
    def path(self) -> Path | None:
        """The path behind `NAME:`; None for sources without one."""
        path = self.data.partition(":")[2]
        return Path(path).expanduser() if path else None

    def source(self) -> Source:
        """A new source object."""
        request = Request(self.path or Path(), Path(self.root), self.packing)
        return source_kinds()[self.data.partition(":")[0]].open(request)

    def pack(self, cache: str, data: str | None = None) -> Dataset:
        """Pack into a cache of its own."""
        packing = replace(self.packing, cache_dir=str(self.folder / cache))
        return open_dataset(data or self.data, self.root, packing, lambda _line: None)


def check_it_can_be_packed(trial: SourceTrial) -> None:
    """Both splits have images of one shape and type, and labels of the classes."""
    dataset = trial.pack("first")
    if len(set(dataset.class_names)) != len(dataset.class_names):
        raise Failure(f"class names are not unique: {', '.join(dataset.class_names[:20])}")
    for split in (dataset.train, dataset.test):
        if not len(split.images):
            raise Failure(f"the {split.name} has no images")


def check_packed_twice_it_has_one_digest(trial: SourceTrial) -> None:
    """Packing depends on the source alone, not on time, order of files or global generators."""
    if (first := trial.pack("first").digest) != (second := trial.pack("second").digest):
        raise Failure(f"packed twice, its images or labels differ: digests {first[:12]} and {second[:12]}")


def check_its_blocks_can_be_read_twice(trial: SourceTrial) -> None:
    """A second call of `blocks` starts anew, and a block has as many labels as images."""
    source = trial.source()
    wanted = source.label_scheme().dtype if isinstance(source, HasLabels) else "int64"

    def counts() -> Iterator[tuple[str, int]]:
        for block in source.blocks():
            if len(block.images) != len(block.labels):
                raise Failure(f"{block.name(0)}: {len(block.images)} images and {len(block.labels)} labels")
            if str(block.labels.dtype) != wanted:
                raise Failure(f"{block.name(0)}: labels are {block.labels.dtype}, not {wanted}")
            yield block.split, len(block.labels)

    first, second = list(counts()), list(counts())
    if first != second:
        raise Failure(f"`blocks` gives {len(first)} blocks at first and {len(second)} at its second call")
    if not source.has_test_split and any(split == "test" for split, _ in first):
        raise Failure("has_test_split is False, but blocks are of the test split")
    total = source.image_count()
    if total is not None and total != (found := sum(count for _, count in first)):
        raise Failure(f"image_count is {total}, but there are {found} images")


def check_its_fingerprint_is_stable(trial: SourceTrial) -> None:
    """The fingerprint is JSON and the same for two objects of one source."""
    if trial.source().fingerprint() is None:  # its files are not there yet
        trial.source().fetch()
    first, second = (json.dumps(trial.source().fingerprint()) for _ in range(2))
    if first != second:
        raise Failure("two objects of the source have different fingerprints, so its cache is never found again")


def check_a_damaged_file_is_named(trial: SourceTrial) -> None:
    """A file that ends too early is refused in a line that names it."""
    if trial.path is None or not trial.path.is_file():
        raise Skipped("the source has no single file to damage")
    damaged = trial.folder / "damaged" / trial.path.name
    damaged.parent.mkdir(exist_ok=True)
    shutil.copyfile(trial.path, damaged)
    with damaged.open("r+b") as file:
        file.truncate(damaged.stat().st_size // 2)
    try:
        dataset = trial.pack("third", f"{trial.data.partition(':')[0]}:{damaged}")
    except DataError as error:
        if damaged.name not in str(error):
            raise Failure(f"the error about a damaged file does not name it: {error}") from None
        return
    except Exception as error:
        raise Failure(
            f"a damaged file ends in {type(error).__name__}: {error}; raise DataError with its name"
        ) from error
    whole = trial.pack("first")
    if len(dataset.train.images) + len(dataset.test.images) >= len(whole.train.images) + len(whole.test.images):
        raise Failure("half of its file gives as many images as the whole")
    raise Failure("half of its file is read without a word; compare its length with what its header says")


_STABLE, _PACKED = "its fingerprint is stable", "it can be packed"
SOURCE_CHECKS = (
    Check(check_its_fingerprint_is_stable),
    Check(check_it_can_be_packed, (_STABLE,)),
    Check(check_packed_twice_it_has_one_digest, (_PACKED, _STABLE)),
    Check(check_its_blocks_can_be_read_twice),
    Check(check_a_damaged_file_is_named, (_PACKED, _STABLE)),
)


def check_source(
    data: str, *, packing: DataConfig | None = None, root: str = "data", announce: Announce = nobody
) -> list[Result]:
    """Check a source, named as `--data` takes it: `NAME` or `NAME:PATH`. It is packed twice, into temporary files.

    Raises:
        Failure: a line for each check that failed.
    """
    with temporary_directory("check") as folder:
        trial = SourceTrial(data, packing or DataConfig(), root, folder)
        results = run_checks(data, SOURCE_CHECKS, trial, announce)
    raise_failures(results)
    return results
