"""Damaged files of a sweep: the next start reads them, or ends with one line.

`make test` tries some, the slow tests as many as fit into their minutes (GEN_DIST_FUZZ_MINUTES). A failure names its
seed.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gen_dist.errors import UserError
from gen_dist.records.run_paths import RunPaths
from tests.launch.sweeps import SPACES, sweep_of
from tests.support.fuzzing import MINUTES, for_minutes, strange_json, tried


def sweep_in(path: Path) -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """Files of a sweep with figures of its trials, and the next start's reading, table and writing."""
    sweep = sweep_of(path, SPACES[0], 4)
    sweep.save()
    for trial in sweep.trials:
        paths = RunPaths(trial.path)
        trial.path.mkdir()
        paths.config.write_text(trial.config.to_json())
        lines = [{"step": step, "images_seen": 64 * step, sweep.metric.name: value} for step, value in trial.history]
        paths.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if trial.status == "finished":
            paths.summary.write_text(json.dumps({"steps": trial.config.steps}, indent=2))
    names = ["sweep.json", *(f"{one.path.name}/metrics.jsonl" for one in sweep.trials if one.history)]
    names += [f"{one.path.name}/summary.json" for one in sweep.trials if one.status == "finished"]
    files = {name: (path / name).read_bytes() for name in names}

    def read(name: str, content: bytes) -> None:
        chance = random.Random(hashlib.sha256(content).digest())
        if chance.random() < 0.7:
            content = strange_json(files[name], chance)
        (path / name).write_bytes(content)
        again = sweep_of(path, SPACES[0], 4)
        try:
            again.read()
            assert len(again.table()) == 5
            again.save_table()
            again.save()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 700, error
        finally:
            for other in ("sweep.json", name):
                (path / other).write_bytes(files[other])

    return files, read


READERS = {"files of a sweep": sweep_in}


FOUND = (593604585378,)
"""Seeds that once found a fault."""


def test_damaged_files_of_a_sweep_are_read_or_one_line(tmp_path: Path) -> None:
    files, read = sweep_in(tmp_path)
    assert tried(files, read, iter((*range(12), *FOUND))) == 12 + len(FOUND)


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_files_of_a_sweep_are_fuzzed_for_minutes(tmp_path: Path) -> None:
    for_minutes("files of a sweep", *sweep_in(tmp_path))
