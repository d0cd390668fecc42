"""metrics.jsonl: the figures of a run over its steps.

Each line is one JSON object with `step`, `images_seen`, figures of the machine's use such as `images_per_second`
(absent if no step was done since the line before), scalars such as `train/loss` and `test/loss`, and lists of numbers
such as `samples/class_shares`. JSON has no NaN and no infinity, so a number that is not finite is written as null,
which pandas reads as NaN.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen_dist.errors import CheckpointError, DamagedError
from gen_dist.files import write_atomically
from gen_dist.records.reading import COUNT, NUMBER, either, list_of, parsed_object, read_file
from gen_dist.records.run_paths import RunPaths

MACHINE_USE = ("images_per_second", "tflops_per_second", "fraction_of_peak", "peak_memory_mib")
"""Figures that differ between two runs of one config: throughput, arithmetic a second of all processes, its share of
the devices' peak, and the most memory of the main process (on a GPU, of its tensors)."""
METRICS = "metrics"
"""Fact of a checkpoint: size and digest of metrics.jsonl."""
_FIGURE = either(NUMBER, list_of(either(NUMBER, None)), None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl in file order, without a torn last line, as a killed process leaves it.

    Raises:
        CheckpointError: the file cannot be read, or a line before the last is not a record.
    """
    return [record for _, record in _lines_and_records(path)]


def metrics_of_run(run_path: Path) -> list[dict[str, Any]]:
    """Read the records of a run, an empty list if it has no metrics.jsonl yet.

    Raises:
        CheckpointError: as for `read_metrics`.
    """
    path = RunPaths(run_path).metrics
    return read_metrics(path) if path.exists() else []


def metrics_damage(run_path: Path, facts: Mapping[str, Any]) -> str | None:
    """Damage to the part of metrics.jsonl that was there at a checkpoint, as a sentence; None if there is none.

    Args:
        run_path: the run directory.
        facts: those of the checkpoint. Older versions recorded nothing about metrics.jsonl.
    """
    path, recorded = RunPaths(run_path).metrics, facts.get(METRICS)
    if recorded is None:
        return None
    try:
        content = read_file(path)[: recorded["bytes"]]
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() == recorded["sha256"]:
        return None
    return (
        f"{path} is damaged, or was edited: its first {recorded['bytes']:,} bytes are not those that a checkpoint was "
        "saved with, so its figures may be wrong"
    )


class MetricsFile:
    """A metrics.jsonl, open for appending."""

    def __init__(self, path: Path, start_step: int) -> None:
        """Open the file.

        Args:
            path: the file, which may be missing.
            start_step: steps done before. 0 empties the file. Otherwise a torn last line and the lines after this step
                are dropped: a run that was killed after its last checkpoint wrote them.

        Raises:
            CheckpointError: the file is damaged or cannot be written.
        """
        self._path = path
        try:
            kept = b""
            if start_step and path.exists():
                lines = [line for line, record in _lines_and_records(path) if record["step"] <= start_step]
                kept = "".join(f"{line}\n" for line in lines).encode()
                write_atomically(path, kept)
            self._bytes, self._digest = len(kept), hashlib.sha256(kept)
            self._file = open(path, "a" if start_step else "w", encoding="utf-8")  # noqa: SIM115 (kept open)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from None

    def append(self, record: Mapping[str, float | list[float]]) -> None:
        """Write one line, which a kill of this process no longer loses.

        Raises:
            CheckpointError: it cannot be written, e.g. because the disk is full.
        """
        try:
            values = {name: _as_json(value) for name, value in record.items()}
            line = json.dumps(values, allow_nan=False) + "\n"
            self._file.write(line)
            self._file.flush()
            self._bytes += len(line)  # json.dumps gives ASCII
            self._digest.update(line.encode())
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; free some space, then run the same command to go on"
            ) from None

    def recorded(self) -> dict[str, Any]:
        """Size and digest of the lines so far, for the checkpoint that comes after them; see `metrics_damage`."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def sync(self) -> None:
        """Force the lines to disk: a checkpoint that survives a power cut relies on them.

        Raises:
            OSError: the disk fails.
        """
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. `append` has reported what could not be written."""
        with contextlib.suppress(OSError):
            self._file.close()


def _lines_and_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Pairs of a whole line, without its line end, and its record."""
    try:
        lines = read_file(path).decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise CheckpointError(f"cannot read {path}: No such file or directory") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parsed_object(line, {"step": COUNT})
            if wrong := [name for name, value in record.items() if not _FIGURE.fits(value)]:
                raise ValueError(f"{wrong[0]} is not {_FIGURE.name}")
            records.append((line, record))
        except ValueError as error:
            if number < len(lines):
                raise DamagedError(
                    f"{path}: line {number} is not a record of metrics ({error}); remove that line, or start over with "
                    "--fresh"
                ) from None
    return records


def _as_json(value: float | list[float]) -> float | list[float | None] | None:
    if isinstance(value, list):
        return [one if math.isfinite(one) else None for one in value]
    return value if math.isfinite(value) else None
