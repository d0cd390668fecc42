"""A set of latents on disk: one directory that several processes fill, shard by shard, and any start completes.

    encoding.json                      what is encoded by which model, columns, statistics, digest of each file
    train-00000-of-00025.parquet       a shard: consecutive rows of one split; or train.npz, train.csv with all of them
    README.md                          card: what the columns mean, and code that reads them
    .train-00000-of-00025.parquet.json while the set is incomplete: digest of a shard, written before it

A file is whole or absent, and is trusted only with the digest that was recorded for it. Files without a record are
not of the set: they are neither overwritten nor removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gen_dist.data.sources.source import SplitName
from gen_dist.errors import CheckpointError, ConfigError, DamagedError, MachineError, OtherVersionError, UnreadableError
from gen_dist.files import open_regular, reason_of, retrying, unreadable, write_atomically
from gen_dist.inference.latent_files import WRITERS, Column, FileFormat, Rows, from_safetensors, joined
from gen_dist.records.reading import (
    COUNT,
    NUMBER,
    OBJECT,
    TEXT,
    list_of,
    object_with,
    read_file,
    read_object,
    values_of,
    write_object,
)

FORMAT = 1
CARD, MANIFEST, LOCK = "README.md", "encoding.json", ".encoding.lock"
# Fields that read_object keeps for itself, such as sha256, cannot be used.
_SUMS = object_with(count=COUNT, sum=list_of(NUMBER), squares=list_of(NUMBER))
_RECORD = {"rows": COUNT, "bytes": COUNT, "digest": TEXT, "sums": OBJECT}
_MANIFEST = {
    "format": COUNT,
    "made_of": OBJECT,
    "about": OBJECT,
    "columns": list_of(OBJECT),
    "files": values_of(object_with(split=TEXT, rows=COUNT, bytes=COUNT, digest=TEXT)),
    "statistics": OBJECT,
}


class Shard(NamedTuple):
    """Consecutive rows of one split, and their file."""

    file: str
    split: SplitName
    first: int
    last: int
    """Rows first .. last - 1 of the split."""


@dataclass(frozen=True)
class LatentSet:
    """A directory of latents, and what it has to hold."""

    path: Path
    made_of: Mapping[str, Any]
    """Facts that determine every bit: a directory with others is refused."""
    about: Mapping[str, Any]
    """Further facts: `run`, `step`, `preset`, `data` and `class_names`."""
    columns: Sequence[Column]
    rows: Mapping[SplitName, int]
    """Images of each split."""
    file_format: FileFormat
    shard_size: int
    """Rows of a shard; the last one of a split has the rest."""

    @property
    def in_one_file(self) -> bool:
        """True if the shards of a split are joined to one file at the end."""
        return self.file_format in ("npz", "csv")

    def shards(self) -> list[Shard]:
        """All shards in the order of their rows."""
        suffix = "safetensors" if self.in_one_file else self.file_format
        found = []
        for split, rows in self.rows.items():
            count = -(-rows // self.shard_size)
            for number in range(count):
                first, file = number * self.shard_size, f"{split}-{number:05}-of-{count:05}.{suffix}"
                found.append(Shard(file, split, first, min(first + self.shard_size, rows)))
        return found

    def files(self) -> dict[str, SplitName]:
        """Files of the complete set, with their splits."""
        if self.in_one_file:
            return {f"{split}.{self.file_format}": split for split in self.rows}
        return {shard.file: shard.split for shard in self.shards()}

    # --------------------------------------------------------------------------------------------------- beginning

    def begin(self, announce: Callable[[str], None]) -> list[Shard]:
        """Claim the directory, and return the shards that are still to be computed.

        Raises:
            ConfigError: the directory holds other files under these names, or a set of something else.
            CheckpointError: encoding.json is damaged, or a file cannot be read just now.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        manifest = manifest_at(self.path)
        if manifest is None:
            names = [CARD, *self.files(), *(shard.file for shard in self.shards())]
            if taken := [name for name in names if os.path.lexists(self.path / name)]:
                raise ConfigError(
                    f"{self.path} has a {taken[0]} that is not of a set of latents, and is not overwritten; choose "
                    "another --out"
                )
            write_object(self.path / MANIFEST, self._manifest({}, {}))
            return self.shards()
        self._refuse_another(manifest)
        known = manifest["files"]
        if self.in_one_file and known and all(self._is_whole(name, known, announce) for name in self.files()):
            return []
        return [shard for shard in self.shards() if not self._is_whole(shard.file, known, announce)]

    def _refuse_another(self, manifest: Mapping[str, Any]) -> None:
        """Raise ConfigError if the directory holds a set of other facts than this one."""
        about, wanted = manifest["about"], self.about
        for name, value in self.made_of.items():
            if (there := manifest["made_of"].get(name)) == value:
                continue
            match name:
                case "weights":
                    what = (
                        f"of {about.get('run')} at step {about.get('step')}, not of {wanted['run']} at {wanted['step']}"
                    )
                case "data_digest":
                    what = f"of other images: of {about.get('data')}, not of {wanted['data']} as they are"
                case _:
                    what = f"with {name.replace('_', ' ')} {there}, not {value}"
            raise ConfigError(f"{self.path} holds latents {what}; choose another --out, or remove the directory")

    def _is_whole(self, name: str, known: Mapping[str, Any], announce: Callable[[str], None]) -> bool:
        """True if a file is there with its recorded digest.

        Raises:
            ConfigError: it is there without a record.
            UnreadableError: it cannot be read just now.
        """
        path = self.path / name
        record = self.record(name) or known.get(name)
        if not os.path.lexists(path):
            if name in known:
                announce(f"{path} is missing; encoding its images again")
            return False
        if record is None and not os.path.lexists(self._record_file(name)):
            raise ConfigError(f"{path} is not of this set of latents, and is not overwritten; move it away")
        if record is None or _describe(path) != (record["bytes"], record["digest"]):
            announce(f"{path} is damaged; encoding its images again")
            return False
        return True

    # ----------------------------------------------------------------------------------------------------- filling

    def write(self, name: str, rows: Rows, sums: Mapping[str, Any]) -> None:
        """Write a file of the set, whole or not at all. Its record comes first, so that the file is known as ours.

        Raises:
            OSError: it cannot be written.
        """
        facts = {**self.made_of, "class_names": self.about["class_names"]}
        content = WRITERS[Path(name).suffix.removeprefix(".")](self.columns, rows, facts)
        record = {
            "rows": len(rows["row"]),
            "bytes": len(content),
            "digest": hashlib.sha256(content).hexdigest(),
            "sums": sums,
        }
        write_object(self._record_file(name), record)
        write_atomically(self.path / name, content)

    def record(self, name: str) -> dict[str, Any] | None:
        """Record of a file of an incomplete set; None if it is missing or damaged."""
        try:
            found = read_object(self._record_file(name), _RECORD, "")
        except (FileNotFoundError, DamagedError):
            return None
        is_joined = self.in_one_file and name in self.files()  # its sums are those of its shards
        return found if is_joined or self._are_sums(found["sums"]) else None

    def _are_sums(self, sums: Any) -> bool:
        """True for sums as `latent_rows.sums_of` gives for the latents of this set."""
        channels = [column.shape[0] for column in self.columns if column.name in ("mean", "latents")]
        return _SUMS.fits(sums) and [len(sums["sum"]), len(sums["squares"])] == 2 * channels

    def _record_file(self, name: str) -> Path:
        return self.path / f".{name}.json"

    # ---------------------------------------------------------------------------------------------------- completing

    def complete(self, statistics_of: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
        """Join the shards if they are one file, and record all files in encoding.json; returns its content.

        Args:
            statistics_of: statistics of the set from the sums of its shards, in their order.

        Raises:
            CheckpointError: a shard is not there, or is damaged.
            OSError: a file cannot be written.
        """
        manifest = manifest_at(self.path)
        known = manifest["files"] if manifest else {}
        records = {shard.file: self.record(shard.file) for shard in self.shards()}
        statistics = manifest["statistics"] if manifest and known else {}
        if not statistics:
            statistics = statistics_of([self._present(name, record)["sums"] for name, record in records.items()])
        if self.in_one_file:
            for name, split in self.files().items():
                if not self._is_whole(name, known, lambda _line: None):
                    self.write(name, self._joined(split), {})
        files = {}
        for name, split in self.files().items():
            record = self._present(name, self.record(name) or known.get(name))
            files[name] = {"split": split, **{key: record[key] for key in ("rows", "bytes", "digest")}}
        if files != known:
            write_object(self.path / MANIFEST, self._manifest(files, statistics))
        return self._manifest(files, statistics)

    def clear_up(self) -> None:
        """Remove what only an incomplete set needs: records, and shards that are joined."""
        whole = self.files()
        for name in [shard.file for shard in self.shards()] + list(whole):
            if os.path.lexists(self._record_file(name)):
                if name not in whole:
                    (self.path / name).unlink(missing_ok=True)
                self._record_file(name).unlink(missing_ok=True)

    def _joined(self, split: SplitName) -> Rows:
        parts = []
        for shard in self.shards():
            if shard.split == split:
                record = self._present(shard.file, self.record(shard.file))
                content = read_file(self.path / shard.file)
                if hashlib.sha256(content).hexdigest() != record["digest"]:
                    raise DamagedError(f"{self.path / shard.file} is damaged; run the same command again")
                parts.append(from_safetensors(self.columns, content))
        return joined(parts)

    def _present(self, name: str, record: Mapping[str, Any] | None) -> Mapping[str, Any]:
        path = self.path / name
        if record is None or not path.exists() or path.stat().st_size != record["bytes"]:
            raise CheckpointError(
                f"{path} is not there: its process failed, or writes elsewhere; all need one directory"
            )
        return record

    def _manifest(self, files: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "made_of": self.made_of,
            "about": self.about,
            "columns": [column._asdict() for column in self.columns],
            "files": files,
            "statistics": statistics,
        }


def manifest_at(directory: Path) -> dict[str, Any] | None:
    """Content of encoding.json; None without it. The set is complete if it names files.

    Raises:
        CheckpointError: it is damaged, of another version, or cannot be read just now.
    """
    path = directory / MANIFEST
    try:
        found = read_object(path, _MANIFEST, "remove the directory, or choose another --out")
    except FileNotFoundError:
        return None
    if found["format"] != FORMAT:
        raise OtherVersionError(
            f"{path} has format {found['format']}; this version of gen_dist reads {FORMAT}: choose another --out"
        )
    return found


@contextlib.contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Context manager that turns an OSError while writing a set into one line."""
    try:
        yield
    except OSError as error:
        raise MachineError(  # not shared: any process may meet it alone
            f"{path} cannot be written: {reason_of(error)}; fix that, then run the same command: it goes on, or choose "
            "another --out"
        ) from None


def _describe(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""

    def describe() -> tuple[int, str]:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()

    try:
        return retrying(describe)
    except OSError as error:
        raise UnreadableError(unreadable(path, error)) from None
