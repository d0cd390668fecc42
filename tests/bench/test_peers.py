"""bench/peers/: all compute the same, all wait their turn, and a peer that learns something else is not timed."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.costs.limit import trainer_of
from bench.peers import BATCH_SIZE
from bench.peers import compare as comparison
from bench.peers.compare import PEERS, refuse_differences, summarize
from bench.peers.gen_dist_run import config_of, cycle_steps
from bench.peers.recipe import Recipe
from bench.peers.turnstile import Turnstile, peak_memory_mib
from gen_dist.kernels import Key, normal
from gen_dist.presets import get_preset
from tests.conftest import REPOSITORY
from tests.support.children import ended_by_sigterm
from tests.support.digits import mnist_files
from tests.support.warm_python import warm_python


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand digits in files of the MNIST format."""
    root = tmp_path_factory.mktemp("data")
    mnist_files(root)
    return root


def test_plain_loop_and_ours_take_the_same_step(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = normal(Key(torch.tensor([0, 0]), 5, 0), BATCH_SIZE, 20).clone()
    monkeypatch.setattr(torch, "randn_like", lambda _tensor: noise)
    monkeypatch.setattr("gen_dist.kernels.latent.normal", lambda *_: noise)
    recipe = Recipe(data_root, seed=0)
    with trainer_of(config_of(data_root, tmp_path, seed=0)) as trainer:
        images = trainer.batches.micro_batch(0, 0)[0]
        recipe.train_loader = [(images / 255.0, None)]  # type: ignore[assignment]
        theirs = dict(recipe.model.named_parameters())
        load(theirs, trainer.objective.networks.state_dict())
        losses: list[float] = []
        recipe.train_epoch(losses.append)
        loss = float(trainer.run_step(0)["loss"])
        after = trainer.objective.networks.state_dict()
    assert losses == [pytest.approx(loss, rel=1e-5)]
    # Adam's first step is the rate times the sign of each gradient, except near zero.
    moved = theirs["decoder.weight"] - after["decoder.layers.0.weight"]
    assert (moved.abs() < 1e-5).float().mean() > 0.99


def load(theirs: dict[str, torch.nn.Parameter], ours: dict[str, Tensor]) -> None:
    names = {"encoder": "encoder.layers.0", "decoder": "decoder.layers.0", "output": "decoder.layers.2"}
    with torch.no_grad():
        for part in ("weight", "bias"):
            for name, our_name in names.items():
                theirs[f"{name}.{part}"].copy_(ours[f"{our_name}.{part}"])
            for name, half in zip(("mean", "logvar"), ours[f"encoder.head.{part}"].chunk(2), strict=True):
                theirs[f"{name}.{part}"].copy_(half)


def test_turnstile_answers_after_step_one_and_each_block() -> None:
    commands = io.StringIO('{"steps": 3, "test": true}\n{"steps": 2, "test": false}\n')
    answers = io.StringIO()
    turnstile = Turnstile(commands, answers)
    for step in range(5):  # the last block is not done
        turnstile.passed(torch.tensor(float(step)), lambda: 7.0, extra=step)
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert (first["loss"], second["loss"]) == (0.0, 2.0)  # of the steps 1 to 3
    assert ("test_negative_elbo" in first, second["test_negative_elbo"]) == (False, 7.0)
    assert second["extra"] == 3
    assert second["seconds"] > 0


def test_peak_memory_is_of_this_process() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell")
    held = np.ones(2**29 // 8)  # allocated here, so that this process has more memory than the new one ever will
    words = [sys.executable, "-c", PEAKS]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    base, highest = map(float, done.stdout.split())
    here = peak_memory_mib()
    assert here is not None and here > held.nbytes / 2**20
    assert base < here
    assert 0.9 * 256 < highest - base < 1.1 * 256  # although it is freed


PEAKS = """
import numpy as np
from bench.peers.turnstile import peak_memory_mib
print(peak_memory_mib())
np.ones(2**28 // 8)
print(peak_memory_mib())
"""


def test_a_cycle_of_ours_ends_with_all_that_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(get_preset("vae-mnist"), evaluate_every=6, sample_every=4, checkpoint_every=3)
    monkeypatch.setattr("bench.peers.gen_dist_run.get_preset", lambda _name: preset)
    assert cycle_steps() == 12


def test_who_learns_something_else_is_named_with_both_values() -> None:
    plain = {"loss": 130.0, "test_negative_elbo": 126.0}
    refuse_differences({"ours": {**plain, "loss": 131.0}, "plain": plain}, tolerance=0.015)
    with pytest.raises(SystemExit, match=r"pythae does not learn the same: test negative elbo 130\.00 .* 126\.00"):
        refuse_differences({"plain": plain, "pythae": {**plain, "test_negative_elbo": 130.0}}, tolerance=0.015)
    with pytest.raises(SystemExit, match="loss nan"):
        refuse_differences({"plain": plain, "pythae": {**plain, "loss": float("nan")}}, tolerance=0.015)


def test_ratios_are_of_the_blocks_of_one_round() -> None:
    """A machine that is slower by half in one round leaves all ratios unchanged."""
    shared = {"cpu_seconds": 1.0, "peak_mib": 100.0}
    blocks = {
        "ours": [{"seconds": each, "step_seconds": clock, **shared} for each, clock in ((1.0, 0.9), (2.0, 2.7))],
        "compiled": [{"seconds": each, "step_seconds": each, **shared} for each in (0.5, 1.0)],
        "plain": [{"seconds": each, **shared} for each in (4.0, 8.0)],
    }
    figures = summarize(blocks, {"ours": 200, "compiled": 200, "plain": 100})
    assert figures["plain"]["ratio"] == {"p20": 8.0, "median": 8.0, "p80": 8.0, "n": 2}
    assert figures["plain"]["compiled_ratio"]["median"] == 16.0
    assert figures["ours"]["images_per_second"]["median"] == pytest.approx(0.75 * 200 * BATCH_SIZE)
    assert figures["ours"]["outside_steps"]["median"] == pytest.approx(0.1)
    assert figures["memory_ratio"] == 1.0


def test_a_missing_peer_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PEERS, "pythae", replace(PEERS["pythae"], needs="no_such_package"))
    assert comparison.installed(["ours", "plain", "pythae"]) == ["ours", "plain"]
    assert "'.[bench]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["compiled", "plain", "pythae", "lightning", "limit"])
def test_each_peer_is_measured_beside_ours(peer: str, data_root: Path, tmp_path: Path) -> None:
    needs = PEERS[peer].needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed: {comparison.INSTALL}")
    # Blocks cross the ends of epochs, of 7 steps here. After so few steps, losses agree only roughly.
    words = ["--peers", peer, "--rounds", "2", "--block-steps", "10", "--learn-steps", "20", "--tolerance", "0.2"]
    done = compare("--data-root", str(data_root), *words, "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["figures"][peer]["ratio"]["n"] == 2
    assert result["conditions"]["threads"] == 1
    assert {answer["threads"] for answer in result["learned"].values()} == {1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data-root", "MISSING", "--rounds", "0"], "rounds 0"),
        (["--data-root", "DAMAGED", "--peers", "plain"], "is not an idx file"),
        (["--data-root", "MISSING", "--threads", "0"], "threads 0"),
        (["--data-root", "MISSING", "--rounds", "x"], "--rounds"),
        (["--data-root", "MISSING", "--out", "MISSING/out.json"], "directory is missing"),
        ([], "--data-root"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(words: list[str], said: str, tmp_path: Path) -> None:
    raw = tmp_path / "DAMAGED/MNIST/raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for content in ("images-idx3", "labels-idx1"):
            (raw / f"{split}-{content}-ubyte").write_bytes(b"no idx file")
    words = [str(tmp_path / word) if word.startswith(("DAMAGED", "MISSING")) else word for word in words]
    done = compare(*words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("asked", ["0", "abc"])
def test_threads_of_the_environment_are_checked_as_in_a_run(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEN_DIST_THREADS", asked)
    done = compare("--data-root", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"error: GEN_DIST_THREADS is {asked!r}; it takes a whole number of at least 1\n"


def test_nothing_stays_of_a_comparison_that_is_asked_to_end(data_root: Path, tmp_path: Path) -> None:
    words = ["bench/peers/compare.py", "--data-root", str(data_root), "--peers", "plain"]
    assert ended_by_sigterm(warm_python(), words, tmp_path) == 143
    assert list(tmp_path.glob("gen_dist-*")) == []


def compare(*words: str) -> subprocess.CompletedProcess[str]:
    command = [*warm_python(), "bench/peers/compare.py", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
