"""Choice of the parquet files of a data set, and of each one's split."""

from __future__ import annotations

import collections
import os
import re
from pathlib import Path
from typing import Literal

from gen_dist.data.naming import names_test, names_train, printable, some
from gen_dist.errors import DataError

_SHARD = re.compile(r"(?P<prefix>.*)-(?P<number>\d+)-of-(?P<count>\d+)")

Splits = dict[Literal["train", "test"], list[Path]]


def find_files(name: str, path: Path) -> tuple[Splits, list[str]]:
    """Files of each split, and lines about those that are not used.

    Args:
        name: the source in error messages.
        path: a file, or a directory.

    Raises:
        DataError: there are none, or their names are ambiguous.
        OSError: the directory cannot be read.
    """
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise DataError(f"{name}: there is no such file or directory")
    found = sorted(path / one for one in os.listdir(path) if one.endswith(".parquet") and not one.startswith("."))
    files = [file for file in found if file.is_file()]
    if not files:
        raise DataError(f"{name}: no *.parquet files in that directory")
    _check_shards(name, files)
    remarks = []
    if irregular := [file for file in found if file not in files]:
        remarks.append(f"left out {_names(irregular)}: broken links, pipes, sockets or devices")
    by_split = {
        split: [file for file in files if _split(name, file) == split] for split in ("train", "test", "val", "")
    }
    train = by_split["train"] or by_split[""]
    test = by_split["test"] or by_split["val"]
    if not train:
        raise DataError(f"{name}: no train*.parquet files there, only {printable(files[0].name)} and the like")
    if unused := [file for file in files if file not in (*train, *test)]:
        remarks.append(f"not used beside {printable(train[0].name)}: {_names(unused)}")
    return ({"train": train, "test": test} if test else {"train": train}), remarks


def _of_file(path: Path) -> tuple[Splits, list[str]]:
    """One file; `train.parquet` has its sibling `test.parquet` as test split."""
    test = path.with_name("test.parquet")
    if path.name == "train.parquet" and test.is_file():
        return {"train": [path], "test": [test]}, []
    words = _words(path)
    others = [word for word in ("test", "val", "validation") if "train" in words]
    siblings = [path.with_name(re.sub("train", other, path.name, flags=re.IGNORECASE)) for other in others]
    remarks = [
        f"{printable(sibling.name)} beside it is not used; give the directory to use both"
        for sibling in siblings
        if sibling.is_file()
    ]
    if shard := _SHARD.fullmatch(path.stem):
        remarks += [f"this is one of {int(shard['count']):,} shards; give the directory to use all"] * (
            int(shard["count"]) > 1
        )
    return {"train": [path]}, remarks


def _split(name: str, file: Path) -> str:
    """`train`, `test`, `val` or nothing, by the words of a file's name, such as pets_train or Test-00000-of-00001."""
    words = _words(file)
    train = any(map(names_train, words)) or file.name.startswith("train")
    tests = [word for word in words if names_test(word)]
    test = bool(tests) or file.name.startswith(("test", "val"))
    if train and test:
        raise DataError(f"{name}: {printable(file.name)} is named after two splits; rename it")
    if test:
        return "val" if file.name.startswith("val") or (tests and not tests[0].startswith("t")) else "test"
    return "train" if train else ""


def _words(file: Path) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", file.stem.casefold()) if word]


def _check_shards(name: str, files: list[Path]) -> None:
    """Refuse a set of which a shard is missing, or that is a mixture of two sets."""
    present: dict[str, dict[int, set[int]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for file in files:
        if shard := _SHARD.fullmatch(file.stem):
            present[shard["prefix"]][int(shard["count"])].add(int(shard["number"]))
    for prefix, by_count in present.items():
        shown = printable(prefix)
        if len(by_count) > 1:
            counts = " and ".join(f"-of-{count:05}" for count in by_count)
            raise DataError(f"{name}: the shards {shown}-* are of two data sets, {counts}; move one away")
        ((count, numbers),) = by_count.items()
        first = 0 if 0 in numbers or count not in numbers else 1  # some writers count from 1
        if len(numbers) < count:
            missing = next(number for number in range(first, count + first) if number not in numbers)
            raise DataError(
                f"{name}: {count - len(numbers):,} of the {count:,} shards {shown}-* are missing, the first "
                f"{shown}-{missing:05}-of-{count:05}.parquet; fetch them, or rename the others without -of-{count:05}"
            )


def _names(files: list[Path]) -> str:
    return some(printable(file.name) for file in files)
