import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.costs.overhead import PARTS, Booked, booking, summarize, with_nothing_due
from bench.measuring.out_file import check_out, print_and_write
from bench.suite.test_kernels import CASES, as_tuple
from bench.suite.test_step import why_without
from gen_dist.errors import ConfigError
from gen_dist.presets import get_preset
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.children import end_with_parent, ended_by_sigterm
from tests.support.warm_python import warm_python


def run_benchmarks(*words: str) -> subprocess.CompletedProcess[str]:
    command = [*warm_python(), "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *words]
    # The variables of an xdist worker would switch measuring off.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, preexec_fn=end_with_parent
    )


SLOW = ("whole_step", "startup", "two_processes", "256", "contiguous", "32-forward", "32-backward")
"""Words in the names of benchmarks that `make test` leaves out; the last four are of the larger maps."""
QUICK = " and ".join(f"not {word}" for word in SLOW)


def test_each_quick_benchmark_runs_once():
    done = run_benchmarks("bench", "--benchmark-disable", "-q", "-k", QUICK)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_each_other_benchmark_runs_once():
    words = ("bench", "-q", "-k", f"not ({QUICK})")
    done = run_benchmarks(*words, "--benchmark-disable")
    assert done.returncode == 0, done.stdout[-3000:]
    collected = run_benchmarks(*words, "--collect-only").stdout.splitlines()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    absent = tuple(f"-{precision}]" for precision in ("bf16", "fp16") if why_without(precision, device) is not None)
    names = [line for line in collected if "::" in line]
    assert re.search(rf"\b{sum(not name.endswith(absent) for name in names)} passed", done.stdout)


def test_a_benchmark_notes_what_it_was_measured_under(tmp_path: Path):
    out = tmp_path / "benchmarks.json"
    chosen = ("bench/suite/test_step.py", "-k", "vae-2d and eager and float32", f"--benchmark-json={out}")
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
    """A step's draws are cached: repeating a step would cost nothing, and of sixteen steps the first would cost all."""
    made = CASES[case](torch.device("cpu"))
    draws = [as_tuple(made.ours(made.inputs))[0].clone() for _ in range(3)]
    assert not any(torch.equal(one, next_one) for one, next_one in itertools.pairwise(draws))
    assert made.calls == 16


def test_overhead_books_all_that_is_recorded_and_no_more(tmp_path: Path):
    """Nested parts count once; time after the last step is a part of the whole."""
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "rounds 0 is less than 1"),
        (["--rounds", "x"], "--rounds"),
        (["--presets"], "name at least one preset"),
        (["--out", "/no/such/directory/out.json"], "directory is missing"),
    ],
)
def test_overhead_refuses_wrong_input_in_one_line(words: list[str], said: str):
    done = subprocess.run(
        [*warm_python(), "bench/costs/overhead.py", *words], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_a_stopped_overhead_measurement_leaves_nothing(tmp_path: Path):
    """The second directory is that of the run which the process itself trains at that time."""
    words = ["bench/costs/overhead.py", "--presets", "vae-mnist", "--data", "synthetic"]
    assert ended_by_sigterm(warm_python(), words, tmp_path, directories=2) == 143
    assert list(tmp_path.glob("gen_dist-*")) == []


def test_figures_that_cannot_be_written_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "directory/out.json"
    with pytest.raises(ConfigError, match=r"out\.json cannot be written: No such file"):
        print_and_write("figures", out)
    assert capsys.readouterr().out == "figures\n"


def test_out_is_a_file_that_can_be_written(tmp_path: Path):
    check_out(None)
    check_out(tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []
    for wrong in (tmp_path, tmp_path / "missing/new.json"):
        with pytest.raises(ConfigError, match="cannot be written"):
            check_out(wrong)
