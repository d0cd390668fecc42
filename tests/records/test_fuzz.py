"""Damaged files of a run: no traceback but our errors, in the readers of commands and in the page of a report.

Bytes of any file change at random, and values in its JSON become others of JSON's kinds. Sums of a checkpoint are made
anew in half of the tries, so that its readers meet the damage and not the digests alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gen_dist.errors import UserError
from gen_dist.inference.model import load
from gen_dist.records.run_directory import wandb_id_of
from gen_dist.reports.page import report_html
from gen_dist.reports.run_record import read_run
from tests.records.test_run_mark import OLD_RUN
from tests.support.fuzzing import MINUTES, for_minutes, mutated, tried

STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, 10**400, float("nan"), float("inf"), "", "\u0000", "\ud800", "<b>", "../..", "0" * 500),
    *([], [[]], [None], [1, "a"], {}, {"": {}}, {"kind": "vae"}, {"step": -5}),
)
"""Values of JSON that few writers think of."""


def _strange_json(content: bytes, chance: random.Random) -> bytes:
    """Lines of JSON in which one value is another; the bytes damaged if they are no JSON."""
    try:
        text = content.decode()
        whole = text.startswith("{\n")
        lines = [json.loads(text)] if whole else [json.loads(line) for line in text.splitlines()]
        places = list(_places(lines))
        holder, key = chance.choice(places)
    except (ValueError, IndexError):
        return mutated(content, [content], chance)
    if isinstance(holder, dict) and chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = chance.choice(STRANGE)
    return "\n".join(json.dumps(line, indent=2 if whole else None) for line in lines).encode() + b"\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value within another, as (container, key)."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(inner)


def run_files_in(path: Path) -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """Files of a run, and all that reads them on one damaged file."""
    run = path / "run"
    shutil.copytree(OLD_RUN, run)
    files = {entry.relative_to(run).as_posix(): entry.read_bytes() for entry in run.rglob("*") if entry.is_file()}

    def read(name: str, content: bytes) -> None:
        chance = random.Random(hashlib.sha256(content).digest())
        if chance.random() < 0.5:
            content = _strange_json(files[name], chance)
        (run / name).write_bytes(content)
        checkpoint = (run / name).parent
        sums = checkpoint / "SHA256SUMS"
        if checkpoint != run and name != sums.relative_to(run).as_posix() and chance.random() < 0.5:
            _write_sums(checkpoint)
        try:
            for reader in (_sample, _report, wandb_id_of):
                _one_line(reader, run)
        finally:
            (run / name).write_bytes(files[name])
            if checkpoint != run:
                sums.write_bytes(files[sums.relative_to(run).as_posix()])

    return files, read


def _one_line(reader: Callable[[Path], object], run: Path) -> None:
    try:
        reader(run)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700, error


def _sample(run: Path) -> None:
    load(run, announce=_unheard).sample(2)


def _report(run: Path) -> None:
    assert "<b>" not in report_html([read_run(run)], [None], None)


def _write_sums(checkpoint: Path) -> None:
    names = sorted(file.name for file in checkpoint.iterdir() if file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (checkpoint / "SHA256SUMS").write_text("".join(lines))


def _unheard(_line: str) -> None:
    pass


def test_damaged_files_of_a_run_are_read_or_one_line(tmp_path: Path) -> None:
    files, read = run_files_in(tmp_path)
    assert tried(files, read, iter(range(25))) == 25


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_readers_of_a_run_are_fuzzed_for_minutes(tmp_path: Path) -> None:
    for_minutes("files of a run", *run_files_in(tmp_path))
