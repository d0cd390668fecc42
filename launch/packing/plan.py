"""Plan of a packing into shards: which images of a source each shard has, whoever makes it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from numpy.typing import NDArray

from gen_dist.config import DataConfig
from gen_dist.config.addresses import refuse_secrets, shown
from gen_dist.config.labels import LabelScheme
from gen_dist.data.catalogue import source_named
from gen_dist.data.image_files import ImageFile
from gen_dist.data.labelling import MISSING
from gen_dist.data.naming import printable
from gen_dist.data.refusals import scheme_of_source
from gen_dist.data.shards.fetching import Fetcher
from gen_dist.data.shards.places import kind_of, shards_of
from gen_dist.data.shards.writing import CLASS_KEY, FILE_KEY
from gen_dist.data.sources.folder import Folder
from gen_dist.data.sources.parquet import Parquet
from gen_dist.data.sources.source import SPLITS, SplitName
from gen_dist.errors import DataError

_SHARDS = "shards:"
_FORMAT = 1
IMAGES_PER_SHARD = 4096

InputKind = Literal["files", "rows", "shard"]


@dataclass(frozen=True)
class ShardTask:
    """One shard that is to be made. It travels to other hosts, so it has plain values only."""

    split: SplitName
    number: int
    """Number of the shard in its split."""
    kind: InputKind
    inputs: list[Any]
    """By kind: `files` as [path, bytes, time, page] each; `rows` of parquet files as [path, column, first, count] each;
    or a `shard` as [place, bytes, tag]."""
    first: int = 0
    """Number of its first image in the split; images of a shard are counted from 0."""
    labels: list[list[Any]] = field(default_factory=list)
    """Labels of each image, one for each name of the plan: the name of a class, values of attributes, or numbers; None
    is a missing one. Empty for a shard, which has them itself."""
    names: list[str] = field(default_factory=list)
    """Name of each image; empty for a shard."""

    def file_name(self, kind: str) -> str:
        """Name of the shard that is made."""
        return f"{self.split}-{self.number:05}.{kind}"


class Tasks(Sequence[ShardTask]):
    """Tasks as compressed JSON, some 20 bytes an image: paths and names of neighbours are alike, and as objects of
    Python those of ten million images would take gigabytes."""

    def __init__(self, packed: Iterable[bytes] = ()) -> None:
        """`packed` is what `append` made of each."""
        self.packed = list(packed)

    def append(self, task: ShardTask) -> None:
        """Add a task behind the others."""
        self.packed.append(zlib.compress(json.dumps(vars(task)).encode(), 1))

    def only(self, wanted: Iterable[bool]) -> Tasks:
        """The tasks for which `wanted` is true."""
        return Tasks(itertools.compress(self.packed, wanted))

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, place: int) -> ShardTask: ...
    @overload
    def __getitem__(self, place: slice) -> Tasks: ...
    def __getitem__(self, place: int | slice) -> ShardTask | Tasks:
        return Tasks(self.packed[place]) if isinstance(place, slice) else task_of(self.packed[place])


def task_of(packed: bytes) -> ShardTask:
    """Task from its compressed JSON."""
    return ShardTask(**json.loads(zlib.decompress(packed)))


class LabelNames(NamedTuple):
    """Names of the labels of a source."""

    names: tuple[str, ...] = ()
    """`label` for classes; else those of attributes or numbers. Empty without labels."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in their order. None: there are none, or only the shards of the source know them."""


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a packing."""

    source: str
    """The source as lines name it."""
    tasks: Tasks
    labels: LabelNames
    remarks: list[str]
    """Lines about the source."""

    def key(self, options: Sequence[Any]) -> str:
        """Key of the source's images as far as file systems tell, and of the options."""
        digest = hashlib.sha256(json.dumps([_FORMAT, self.labels, list(options)]).encode())
        for task in self.tasks:
            values = [task.split, task.number, task.kind, task.inputs, task.first, task.labels, task.names]
            digest.update(json.dumps(values).encode())
        return digest.hexdigest()


def plan_shards(
    source: str, packing: DataConfig, images_per_shard: int | None, announce: Callable[[str], None]
) -> ShardPlan:
    """Plan the shards of a source. Only names, labels and sizes are read.

    Args:
        source: `folder:PATH`, `parquet:PATH` or `shards:PATTERN`.
        packing: options of the source. `test_shards` is the test split of shards.
        images_per_shard: images of the source in each shard; fewer come out if some are left out. None is 4,096. Each
            shard of a source of shards becomes one, and needs None.
        announce: takes lines about servers that fail.

    Raises:
        DataError: another source, or it cannot be used; one line.
    """
    refuse_secrets("source", source)
    if source.startswith(_SHARDS):
        if images_per_shard is not None:
            raise DataError(
                f"{printable(shown(source))}: each shard becomes one, so that they can be made one by one; leave out "
                f"--images-per-shard {images_per_shard}"
            )
        return _plan_of_shards(source.removeprefix(_SHARDS), packing, announce)
    kind_of_source, _, path = source.partition(":")
    # Processes on other hosts are in other directories.
    found = source_named(f"{kind_of_source}:{Path(path).expanduser().absolute()}" if path else source, packing)
    if not isinstance(found, Folder | Parquet):
        raise DataError(f"{printable(source)}: only folder:PATH, parquet:PATH and shards:PATTERN become shards")
    scheme = scheme_of_source(found, found.class_names())
    labels = _label_names(scheme)
    _refuse_own_names(found.name, labels.names)
    at_once = images_per_shard or IMAGES_PER_SHARD
    tasks = Tasks()
    for split in SPLITS:
        images = iter(_files_of(found, split) if isinstance(found, Folder) else _rows_of(found, split))
        for number, some in enumerate(iter(lambda: list(itertools.islice(images, at_once)), [])):  # noqa: B023
            of_some = [_values(scheme, label) if labels.names else [] for _, label, _ in some]
            inputs = [one for one, _, _ in some]
            own_names = [name for _, _, name in some]
            kind: InputKind = "files" if isinstance(found, Folder) else "rows"
            of_kind = inputs if kind == "files" else _ranges(inputs)
            tasks.append(ShardTask(split, number, kind, of_kind, number * at_once, of_some, own_names))
    if not tasks:
        raise DataError(f"{found.name}: it has no images")
    return ShardPlan(found.name, tasks, labels, found.remarks())


def _plan_of_shards(pattern: str, packing: DataConfig, announce: Callable[[str], None]) -> ShardPlan:
    name = printable(f"{_SHARDS}{shown(pattern)}")
    _refuse_own_names(name, packing.label_columns)
    fetcher = Fetcher(name, announce)
    patterns = {"train": pattern, "test": packing.test_shards}
    tasks = Tasks()
    with fetcher.threads() as pool:
        for split in SPLITS:
            if not (of_split := patterns[split]):
                continue
            places = shards_of(name, of_split, fetcher.glob)
            for number, (place, facts) in enumerate(zip(places, pool.map(fetcher.facts, places), strict=True)):
                kind_of(name, place)
                tasks.append(ShardTask(split, number, "shard", [place, facts.size, facts.tag]))
    return ShardPlan(name, tasks, LabelNames(packing.label_columns or (CLASS_KEY,)), [])


def _refuse_own_names(source: str, names: Sequence[str]) -> None:
    if taken := sorted({FILE_KEY, "image"} & set(names)):
        raise DataError(f"{source}: a label is called {taken[0]}, which shards use themselves; rename it")


def _label_names(scheme: LabelScheme) -> LabelNames:
    if scheme.kind == "classes":
        return LabelNames((CLASS_KEY,), scheme.names) if scheme.are_labels else LabelNames()
    return LabelNames(scheme.names)


def _values(scheme: LabelScheme, label: NDArray[Any]) -> list[Any]:
    """Label of an image as plain values; None for missing ones."""
    if scheme.kind == "numbers":
        return [None if math.isnan(one) else one for one in label.tolist()]
    tables = scheme.values or (scheme.names,)
    found = []
    for one, table in zip(label.reshape(-1).tolist(), tables, strict=True):
        counted = scheme.kind == "attributes" and list(table) == list(map(str, range(len(table))))
        found.append(None if one == MISSING else one if counted else table[one])
    return found


def _files_of(source: Folder, split: SplitName) -> Iterator[tuple[Any, NDArray[Any], str]]:
    """Each image file of a split with its label and name."""
    for block in source.blocks():
        if block.split == split:
            for position, image in enumerate(block.images):
                assert isinstance(image, ImageFile)
                yield list(image), block.labels[position], block.name(position)


def _rows_of(source: Parquet, split: SplitName) -> Iterator[tuple[Any, NDArray[Any], str]]:
    """Each row of a split, as [path, column, row], with its label and name."""
    for path, column, labels in source.rows(split):
        for row, label in enumerate(labels):
            yield [str(path), column, row], label, f"{printable(path.name)} row {row}"


def _ranges(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows that follow one another as [path, column, first, count]."""
    ranges: list[list[Any]] = []
    for path, column, row in rows:
        if ranges and ranges[-1][:2] == [path, column] and row == ranges[-1][2] + ranges[-1][3]:
            ranges[-1][3] += 1
        else:
            ranges.append([path, column, row, 1])
    return ranges
