import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import end_with_parent
from tests.conftest import REPOSITORY


def run_benchmarks(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=end_with_parent)


@pytest.mark.timeout(600)
def test_each_benchmark_runs_once():
    done = run_benchmarks("bench", "--benchmark-disable", "-q")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_a_benchmark_notes_what_it_was_measured_under(tmp_path: Path):
    out = tmp_path / "benchmarks.json"
    chosen = ("bench/test_step.py", "-k", "vae-2d and eager and float32", f"--benchmark-json={out}")
    done = run_benchmarks(*chosen, "--device", "cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    facts = benchmark["extra_info"]
    assert facts["p20_ms"] <= facts["p50_ms"] <= facts["p80_ms"]
    assert facts["images_per_second"] == pytest.approx(192e3 / facts["p50_ms"])
    assert facts["p50_ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
    assert {"cpu", "threads", "torch", "numpy", "python", "git_commit", "load_average", "device"} <= set(facts)
    assert list(facts["parts_ms"]) == ["data", "vae/forward", "vae/backward", "vae/optimizer"]
    if sys.platform == "linux":
        assert facts["peak_memory_bytes"] > 2**20
    assert "test_whole_step[vae-2d-eager-float32]" in done.stdout
