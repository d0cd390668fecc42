"""Damaged reference statistics: they are those that were written, or are computed again.

`make test` tries some, the slow test as many as fit into its minutes (GEN_DIST_FUZZ_MINUTES). A failure names its seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gen_dist.evaluation.kept import KeptTensors
from gen_dist.parallel.processes import Processes
from tests.support.fuzzing import MINUTES, for_minutes, tried


def statistics_in(path: Path) -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """A file of statistics, and a reader that checks that no other number comes out of it."""
    true = {"mean": torch.randn(64, generator=torch.Generator().manual_seed(0)), "count": torch.tensor(5)}
    processes = Processes(0, 0, 1, torch.device("cpu"))

    def kept(compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        statistics = KeptTensors(path, "digest", "test", None, processes)
        found = statistics.get("mean", compute)
        statistics.keep()
        return found

    kept(lambda: dict(true))
    (file,) = path.glob("reference-*")
    content = file.read_bytes()

    def read(_name: str, damaged: bytes) -> None:
        file.write_bytes(damaged)
        found = kept(lambda: dict(true))
        assert found.keys() == true.keys() and all(torch.equal(found[name], true[name]) for name in true)
        assert file.read_bytes() == content

    return {file.name: content}, read


def test_damaged_statistics_change_no_number(tmp_path: Path) -> None:
    files, read = statistics_in(tmp_path)
    assert tried(files, read, iter(range(40))) == 40


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_statistics_are_fuzzed_for_minutes(tmp_path: Path) -> None:
    for_minutes("reference statistics", *statistics_in(tmp_path))
