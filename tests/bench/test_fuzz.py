"""Damaged figures of benchmarks: the history, pytest-benchmark's JSON and the gate's stored figures are read, or one
line.

`make test` tries some, the slow tests as many as fit into their minutes (GEN_DIST_FUZZ_MINUTES). A failure names its
seed.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.gate.gate import read_stored
from bench.history import history
from bench.history.draw import history_html
from gen_dist.errors import ConfigError, UserError
from tests.bench.test_history import result, results, some_records
from tests.support.fuzzing import MINUTES, for_minutes, strange_json, tried

OF_FILE: dict[str, Callable[[Path], Any]] = {
    "history.jsonl": lambda file: history_html(history.read_history(file)),
    "results.json": lambda file: history.records_of(history.read_results(file), file.name),
    "stored.json": read_stored,
}
"""Reader of each file of figures."""


def figures_in(path: Path) -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """Files of figures, and what reads each."""
    lines = [json.dumps(asdict(one)) for one in some_records()[:12]]
    figures = {"count": 1, "images": 8, "outputs": {}, "seconds": [0.1, 0.2]}
    stored = {"conditions": {"cpu": "a", "git_commit": "b"}, "benchmarks": {"step": figures}}
    files = {
        "history.jsonl": "".join(f"{line}\n" for line in lines).encode(),
        "results.json": json.dumps(results(result(), result("test_step[b]")), indent=2).encode(),
        "stored.json": json.dumps(stored, indent=2).encode(),
    }

    def read(name: str, content: bytes) -> None:
        chance = random.Random(hashlib.sha256(content).digest())
        if chance.random() < 0.7:
            content = strange_json(files[name], chance)
        (path / name).write_bytes(content)
        try:
            OF_FILE[name](path / name)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 700, error

    return files, read


READERS = {"figures of benchmarks": figures_in}


FOUND = (79990526989,)
"""Seeds that once found a fault."""


@pytest.fixture(autouse=True)
def _of_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "git", lambda *_words: None)  # a process for each file


def test_damaged_figures_are_read_or_one_line(tmp_path: Path) -> None:
    files, read = figures_in(tmp_path)
    assert tried(files, read, iter((*range(12), *FOUND))) == 12 + len(FOUND)


@pytest.mark.parametrize("name", OF_FILE)
@pytest.mark.parametrize("nested", ["[" * 5_000, '{"a":' * 5_000], ids=["lists", "objects"])
def test_json_that_is_nested_too_deeply_is_one_line(nested: str, name: str, tmp_path: Path) -> None:
    """Python's parser ends it in RecursionError, which is no ValueError."""
    with pytest.raises(RecursionError):
        json.loads(nested)
    (tmp_path / name).write_text(nested)
    with pytest.raises(ConfigError, match=r"is not|not a line of the history") as raised:
        OF_FILE[name](tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_figures_of_benchmarks_are_fuzzed_for_minutes(tmp_path: Path) -> None:
    for_minutes("figures of benchmarks", *figures_in(tmp_path))
