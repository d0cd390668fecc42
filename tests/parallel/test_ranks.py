"""Two real processes over gloo, started by the user's launcher, compared with one."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import nn

from gen_dist.records.checkpoint import checkpoint_paths, load
from gen_dist.records.metrics_file import read_metrics
from tests.conftest import REPOSITORY
from tests.parallel.rank_worker import (
    CODEBOOKS,
    LARGE_LAYER,
    LOCAL_STATISTICS,
    codebook_of_ranks,
    config_of_ranks,
    evaluations_of_uneven_splits,
    trained_codebook,
)
from tests.support.runs import (
    LEFT_OUT,
    OBJECTIVES,
    close_losses,
    each_of,
    losses_of,
    make_trainer,
    small_config,
    write_config,
)
from tests.support.two_players import GENERATOR_EVERY, STEPS, all_logs, state_norms, two_players
from tests.support.warm_python import in_two_ranks, warm_python

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
LAUNCHED_ONE = [*LAUNCH, str(REPOSITORY / "launch/configs/one_process.yaml")]
TWO = [*LAUNCH, str(REPOSITORY / "launch/configs/cpu_2_processes.yaml")]


def _run(*command: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of two processes, by objective and by experiment."""
    return _results(tmp_path_factory, [name for name in OBJECTIVES if name not in LEFT_OUT])


@pytest.fixture(scope="module")
def other_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _results(tmp_path_factory, [*sorted(LEFT_OUT), "--compiled"])


@pytest.fixture
def ranks_of(request: pytest.FixtureRequest, objective: str) -> Any:
    """Results of two processes for one objective."""
    return request.getfixturevalue("other_two_ranks" if objective in LEFT_OUT else "two_ranks")[objective]


def _results(tmp_path_factory: pytest.TempPathFactory, objectives: list[str]) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks") / "results.json"
    _run(*TWO, REPOSITORY / "tests/parallel/rank_worker.py", out, *objectives)
    return {"directory": out.parent, **json.loads(out.read_text())}


def test_the_config_file_joins_two_processes(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["world_size"] == 2


@each_of(OBJECTIVES)
def test_two_ranks_equal_one_rank(ranks_of: dict[str, Any], objective: str) -> None:
    config = config_of_ranks(objective)
    trainer = make_trainer(config)
    result = ranks_of
    logs = trainer.average_logs([trainer.run_step(step) for step in range(config.steps)])
    assert len(logs) == len(result["logs"]) == 50
    assert losses_of(result["logs"]) == close_losses(losses_of(logs))
    for name, values in _numbers(logs).items():
        if not name.endswith("loss"):
            # A gradient jumps if rounding moves one unit of one image across the kink of its activation.
            tolerance = 1e-3 if name.endswith("gradient_norm") else 1e-5
            usual_size = statistics.median(map(abs, values))
            found = _numbers(result["logs"])[name]
            assert found == pytest.approx(values, rel=tolerance, abs=tolerance * usual_size), name
    assert result["test"] == pytest.approx(trainer.evaluate(trainer.dataset.test), rel=1e-5, abs=1e-8)
    assert abs(result["parameter_spread"]) < 1e-9
    np.testing.assert_allclose(result["codebook"], trained_codebook(trainer), rtol=1e-5, atol=1e-6)
    for two, one in zip(result["uneven"], evaluations_of_uneven_splits(trainer), strict=True):
        # A KL near 0 is a float32 difference of numbers near 1.
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("update", CODEBOOKS)
def test_two_ranks_have_the_codebook_and_its_metrics_of_one(two_ranks: dict[str, Any], update: str) -> None:
    """While no latent lies so near the middle of two codes that rounding decides: then it would be another run."""
    one, two = codebook_of_ranks(update), two_ranks["codebooks"][update]
    assert two["counts"] == one["counts"]
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4, 5], ids=["four", "five, of unequal shares"])
def test_more_ranks_equal_one_rank(processes: int, tmp_path: Path) -> None:
    objectives = list(OBJECTIVES) if processes == 4 else ["vae", "dcgan", "conditional dcgan", "wgan-gp, lazy", "r3gan"]
    launch = [*LAUNCH, REPOSITORY / "launch/configs/cpu_4_processes.yaml", "--num_processes", processes]
    _run(*launch, REPOSITORY / "tests/parallel/rank_worker.py", tmp_path / "results.json", *objectives, timeout=500)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["world_size"] == processes
    for objective in objectives:
        trainer = make_trainer(config_of_ranks(objective))
        logs = trainer.average_logs([trainer.run_step(step) for step in range(50)])
        assert losses_of(found[objective]["logs"]) == close_losses(losses_of(logs)), objective
        assert abs(found[objective]["parameter_spread"]) < 1e-9


def _numbers(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Collect the values of each log in the order of steps, without histograms."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list))
    return {name: [row[name] for row in rows if name in row] for name in names}


@each_of(OBJECTIVES)
def test_each_turn_reduces_only_its_own_gradients_and_once(ranks_of: dict[str, Any], objective: str) -> None:
    """The statistics of synchronized batch normalization are not counted, since they are not gradients of weights."""
    trainer = make_trainer(config_of_ranks(objective))
    networks = trainer.objective.networks
    expected: dict[str, list[int]] = {"other": []}
    for phase in trainer.objective.phases().values():
        trained = [p for name in phase.trains for p in networks[name].parameters() if p.requires_grad]
        expected[type(phase).__name__] = [sum(p.numel() for p in trained)] * -(-50 // phase.every)
    assert ranks_of["reduced"] == expected


def test_on_cpus_large_gradients_are_reduced_at_once(two_ranks: dict[str, Any]) -> None:
    networks = make_trainer(LARGE_LAYER).objective.networks
    everything = sum(p.numel() for p in networks.parameters())
    assert everything * 4 > 2 * 2**20
    assert two_ranks["reduced by large layers"] == {"MaximizeElbo": [everything] * LARGE_LAYER.steps, "other": []}


def test_without_shared_weights_a_turn_has_one_bucket(two_ranks: dict[str, Any]) -> None:
    """As between hosts. The bucket has only the gradients of the phase's own parameters."""
    sizes = {name: _count(network) for name, network in two_players().objective.networks.items()}
    assert two_ranks["buckets"] == {
        "MaximizeElbo": [_count(make_trainer(LARGE_LAYER).objective.networks)] * LARGE_LAYER.steps,
        "DiscriminatorPhase": [sizes["discriminator"]] * STEPS,
        "GeneratorPhase": [sizes["generator"]] * (STEPS // GENERATOR_EVERY),
    }
    assert abs(two_ranks["parameter spread through gloo"]) < 1e-9


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_a_run_on_shared_weights_equals_one_through_gloo(two_ranks: dict[str, Any]) -> None:
    """To a tolerance: the optimizer's kernel rounds the last values of each tensor differently from the others."""
    found = two_ranks["without shared memory"]
    assert found["shared"]
    assert found["names"]
    assert found["apart"] < 1e-6


def test_evaluation_uses_the_main_batch_statistics(two_ranks: dict[str, Any]) -> None:
    result = two_ranks["local statistics"]
    assert result["before"] > 1e-9
    assert result["after"] == 0
    one = make_trainer(small_config("vae-gan"))
    assert one.averaged is not None
    one.averaged.networks.load_state_dict(load_file(two_ranks["directory"] / LOCAL_STATISTICS))
    assert result["test"] == pytest.approx(one.evaluate(one.dataset.test), rel=1e-6)


def _assert_same_losses(logs: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    assert len(logs) == STEPS
    for row, other in zip(logs, others, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_two_phases_on_two_ranks_equal_one_rank(two_ranks: dict[str, Any]) -> None:
    whole = two_players()
    logs = all_logs(whole)
    assert logs[1].keys() < logs[0].keys()
    assert abs(logs[-2]["generator/loss"] - logs[0]["generator/loss"]) > 0.1
    result = two_ranks["two players"]
    _assert_same_losses(result["logs"], logs)
    assert result["state"] == pytest.approx(state_norms(whole), rel=1e-5)
    assert abs(result["parameter_spread"]) < 1e-9


@pytest.mark.slow
def test_compiled_turns_on_two_ranks_equal_eager_ones_on_one(other_two_ranks: dict[str, Any]) -> None:
    alone, result = two_players(), other_two_ranks["compiled players"]
    _assert_same_losses(result["logs"], all_logs(alone))
    assert result["state"] == pytest.approx(state_norms(alone), rel=1e-5)


def test_micro_batches_are_reduced_once_a_turn(two_ranks: dict[str, Any]) -> None:
    networks = two_players().objective.networks
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert two_ranks["two players"]["reduced"] == {
        "DiscriminatorPhase": [sizes["discriminator"]] * STEPS,
        "GeneratorPhase": [sizes["generator"]] * (STEPS // GENERATOR_EVERY),
        "other": [],
    }


def test_accumulated_compiled_phases_equal_whole_eager_ones() -> None:
    whole, changed = two_players(), two_players(compile=True, accumulation=2)
    _assert_same_losses(all_logs(changed), all_logs(whole))
    assert state_norms(changed) == pytest.approx(state_norms(whole), rel=1e-5)
    assert all(parameter.requires_grad for parameter in changed.objective.parameters())


@pytest.mark.parametrize(("start", "resume"), [(in_two_ranks, warm_python), (warm_python, in_two_ranks)])
def test_a_run_resumes_with_another_number_of_ranks(
    start: Callable[[], list[str]], resume: Callable[[], list[str]], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.json", small_config("vae", checkpoint_every=25))
    train = (REPOSITORY / "launch/train.py", "--config", config, "--run-dir", tmp_path / "run")
    _run(*start(), *train)
    before = read_metrics(tmp_path / "run/metrics.jsonl")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000050")
    done = _run(*resume(), *train)
    assert "resuming" in done.stderr
    after = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in after] == list(range(1, 51))
    for name in ("train/loss", "train/nll", "train/kl"):
        assert [record[name] for record in after] == pytest.approx([record[name] for record in before], rel=1e-5)
    assert after[:25] == before[:25]


@pytest.mark.parametrize("launch", [LAUNCHED_ONE, TWO], ids=["one", "two"])
def test_a_signal_to_the_launcher_saves_every_process(launch: list[str], tmp_path: Path) -> None:
    """Accelerate's launcher of one process forwards no signal to its child; that of two does, at different steps."""
    run = tmp_path / "run"
    config = small_config("vae", steps=100_000, checkpoint_every=100_000, sample_every=100_000, evaluate_every=100_000)
    words = [*launch, REPOSITORY / "launch/train.py", "--config", write_config(tmp_path / "config.json", config)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [*map(str, words), "--run-dir", str(run)],
        cwd=REPOSITORY,
        env=environment,
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )
    _wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 6000)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    _wait_for(lambda: bool(checkpoint_paths(run)))
    checkpoint, _ = load(checkpoint_paths(run)[0])
    assert 10 < checkpoint.step < 100_000
    assert checkpoint.step == read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert f"stopped at step {checkpoint.step}" in output


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
