import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.overhead import PARTS, Booked, booking, summarize, with_nothing_due
from bench.test_kernels import CASES, as_tuple
from gen_dist.presets import get_preset
from gen_dist.run import train
from tests.children import end_with_parent
from tests.conftest import REPOSITORY


def run_benchmarks(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=end_with_parent)


QUICK = "not whole_step and not startup and not two_processes"


def test_each_quick_benchmark_runs_once():
    done = run_benchmarks("bench", "--benchmark-disable", "-q", "-k", QUICK)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_other_benchmark_runs_once():
    done = run_benchmarks("bench", "--benchmark-disable", "-q", "-k", f"not ({QUICK})")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "21 passed" in done.stdout or "33 passed" in done.stdout  # of a processor without and with bf16


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


@pytest.mark.parametrize("case", ["reparameterize_kl", "normal", "binarize"])
def test_no_timed_draw_is_looked_up(case: str):
    """One step's draws are kept: those of the same step again would cost nothing, and of sixteen, all in the first."""
    made = CASES[case](torch.device("cpu"))
    draws = [as_tuple(made.ours(made.inputs))[0].clone() for _ in range(3)]
    assert not any(torch.equal(one, next_one) for one, next_one in itertools.pairwise(draws))
    assert made.calls == 16


def test_overhead_books_all_that_is_recorded_and_no_more(tmp_path: Path):
    """Parts within parts count once; what comes after the last step is a part of all."""
    config = replace(get_preset("vae-mnist"), data="synthetic", steps=8, global_batch_size=16, run_dir=str(tmp_path))
    config = replace(config, log_every=2, evaluate_every=4, sample_every=4, checkpoint_every=8, device="cpu")
    config = replace(config, packing=replace(config.packing, synthetic_images=64))
    booked = Booked(steps=config.steps)
    with booking(booked):
        start = time.perf_counter()
        train(config, say=lambda _line: None)
        whole = time.perf_counter() - start
    booked.run_seconds = whole - booked.start_seconds
    assert 0 < booked.last_seconds < booked.recording_seconds < booked.run_seconds < whole
    assert booked.calls["progress bar"] == 8
    assert booked.calls["evaluation on the test split"] == booked.calls["pictures"] == 2
    assert booked.calls["checkpoint"] == booked.calls["summary at the end"] == 1
    assert {part for part in PARTS if not booked.calls[part]} == set()
    figures = summarize(config, [(booked, booked)])
    assert figures["share_by_difference"]["median"] == pytest.approx(figures["share_by_stopwatch"]["median"])


def test_overhead_knows_a_run_with_nothing_due():
    never = with_nothing_due(get_preset("dcgan-mnist"))
    assert all(never.steps % every for every in (never.log_every, never.evaluate_every, never.sample_every))
    assert never.checkpoint_every > never.steps


def test_overhead_refuses_no_rounds():
    done = subprocess.run(
        [sys.executable, "bench/overhead.py", "--rounds", "0"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: rounds 0 is less than 1\n"
