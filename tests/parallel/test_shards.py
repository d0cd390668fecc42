"""The same bits on any number of processes: batches in fixed parts, summed in one order."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.parallel.part_gradients import PartReduction
from gen_dist.parallel.part_sums import PartSums, tree_sum
from gen_dist.parallel.processes import Processes, threads_by_default
from gen_dist.parallel.sync_batch_norm import synchronize
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import read_metrics
from gen_dist.training.replay import replay
from tests.conftest import REPOSITORY
from tests.parallel.shards_worker import ROUNDED, UNEVEN, config_with_shards
from tests.support.runs import OBJECTIVES, assert_same_bits, make_trainer, small_config, write_config
from tests.support.warm_python import in_two_ranks, warm_python

QUICK = ("vae", "dcgan", UNEVEN)
"""Without sums in a phase; with those of batch normalization, in two phases; with shards of 3 and 4 images."""
CPU = torch.device("cpu")


def _ranks(number: int) -> list[str]:
    file = str(REPOSITORY / "launch/configs/cpu_4_processes.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    return [*launch, "--num_processes", str(number)]


def _environment() -> dict[str, str]:
    """Environment of a worker: the bits depend on the threads."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "GEN_DIST_THREADS": "1"}


def _trained(
    launch: Sequence[str], out: Path, steps: int, objectives: Sequence[str], timeout: float = 240
) -> dict[str, Any]:
    """Logs and test metrics, and the state, by objective."""
    out.mkdir()
    done = subprocess.run(
        [*launch, str(REPOSITORY / "tests/parallel/shards_worker.py"), str(out), str(steps), *objectives],
        cwd=REPOSITORY,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return {name: (result, load_file(out / f"{name}.safetensors")) for name, result in found.items()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    out = tmp_path_factory.mktemp("shards")
    launches = {1: warm_python(), 2: in_two_ranks()}
    return {number: _trained(launch, out / str(number), 5, (*QUICK, ROUNDED)) for number, launch in launches.items()}


def _assert_equal(first: tuple[Any, dict[str, Tensor]], second: tuple[Any, dict[str, Tensor]]) -> None:
    assert first[0] == second[0]
    assert_same_bits(first[1], second[1])


@pytest.mark.parametrize("objective", [*QUICK, ROUNDED])
def test_two_processes_have_the_bits_of_one(quick: dict[int, Any], objective: str) -> None:
    _assert_equal(quick[1][objective], quick[2][objective])


@pytest.mark.parametrize("objective", QUICK)
def test_shards_change_a_run_by_rounding_alone(quick: dict[int, Any], objective: str) -> None:
    config = config_with_shards(objective).with_options(shards=None)
    trainer = make_trainer(config)
    wanted = trainer.average_logs([trainer.run_step(step) for step in range(5)])
    for row, other in zip(quick[1][objective][0]["logs"], wanted, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_every_objective_has_the_bits_of_one_process(processes: int, tmp_path: Path) -> None:
    objectives = list(OBJECTIVES)
    one = _trained(warm_python(), tmp_path / "1", 14, objectives, timeout=1000)
    many = _trained(_ranks(processes), tmp_path / "many", 14, objectives, timeout=1900)
    for objective in objectives:
        _assert_equal(one[objective], many[objective])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("objective", "steps", "checkpoint_every"),
    [("vae", 400, 20), ("vae-gan", 60, 10), ("latent autoencoder, vq, adaptive adversary", 60, 10)],
)
def test_killed_on_one_and_on_four_a_run_ends_the_same_on_two(
    objective: str, steps: int, checkpoint_every: int, tmp_path: Path
) -> None:
    config = config_with_shards(objective).with_options(
        steps=steps, checkpoint_every=checkpoint_every, evaluate_every=steps // 4, sample_every=1000
    )
    file = write_config(tmp_path / "config.json", config)
    words = [str(REPOSITORY / "launch/train.py"), "--config", str(file), "--run-dir"]

    def start(launch: list[str], run: Path) -> subprocess.Popen[str]:
        command = [*launch, *words, str(run)]
        return subprocess.Popen(command, cwd=REPOSITORY, env=_environment(), text=True, start_new_session=True)

    assert start([sys.executable], tmp_path / "whole").wait(300) == 0
    for launch in ([sys.executable], _ranks(4)):
        before = len(_steps(tmp_path / "changing"))
        process = start(launch, tmp_path / "changing")
        _wait_for(lambda known=before: len(_steps(tmp_path / "changing")) > known)  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    assert 0 < _steps(tmp_path / "changing")[-1] < steps
    assert start(_ranks(2), tmp_path / "changing").wait(300) == 0
    whole, changing = (checkpoints.load(checkpoint_paths(tmp_path / name)[0])[0] for name in ("whole", "changing"))
    assert whole.step == changing.step == steps
    for group in whole.tensors:
        assert_same_bits(dict(whole.tensors[group]), dict(changing.tensors[group]))
    assert _figures(tmp_path / "whole") == _figures(tmp_path / "changing")


def _steps(run: Path) -> list[int]:
    """Steps of this run's checkpoints."""
    return sorted(int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*"))


def _figures(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if name.startswith(("step", "train/", "test/"))} for line in lines
    ]


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_step_of_a_run_with_shards_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gen_dist.training.run import train

    config = small_config("gan", steps=4, shards=4, run_dir=str(tmp_path / "run"))
    train(config, say=lambda _line: None)
    line = read_metrics(tmp_path / "run/metrics.jsonl")[2]
    found = replay(tmp_path / "run", 3, lambda _line: None)
    assert found["generator/loss"] == line["train/generator/loss"]


def test_sums_follow_one_tree() -> None:
    values = torch.randn(8, 1000) * 10.0 ** torch.arange(-4, 4)[:, None]
    a, b, c, d, e, f, g, h = values
    assert torch.equal(tree_sum(list(values)), ((a + b) + (c + d)) + ((e + f) + (g + h)))
    assert not torch.equal(tree_sum(list(values)), sum(values, torch.zeros(1000)))


def _sums(parts: int = 4) -> PartSums:
    return PartSums(parts, Processes(0, 0, 1, CPU))


def test_parts_wait_for_each_other_at_sums() -> None:
    sums = _sums()
    order: list[str] = []

    def work(items: Sequence[Tensor]) -> list[Tensor]:
        (value,) = items
        order.append(f"{int(value)}a")
        total = sums.total(value.clone().requires_grad_())
        order.append(f"{int(value)}b")
        (gradient,) = torch.autograd.grad(total * value, [total])
        return [total.detach() + gradient]

    found = sums.each(work, [torch.tensor(float(part)) for part in range(4)])
    assert [float(value) for value in found] == [6.0, 7.0, 8.0, 9.0]
    assert order == ["0a", "1a", "2a", "3a", "0b", "1b", "2b", "3b"]


def test_batch_normalization_of_parts_is_that_of_the_batch() -> None:
    torch.manual_seed(1)
    sums, images = _sums(), torch.randn(8, 3, 4, 4, dtype=torch.float64)
    layers = [nn.BatchNorm2d(3).double() for _ in range(2)]
    whole = images.clone().requires_grad_()
    (layers[0](whole) ** 3).sum().backward()
    synchronize(layers[1], sums)

    def work(parts: Sequence[Tensor]) -> list[Tensor]:
        part = parts[0].clone().requires_grad_()
        return [torch.autograd.grad((layers[1](part) ** 3).sum(), part)[0]]

    found = torch.cat(sums.each(work, images.split(2)))
    assert whole.grad is not None
    assert torch.allclose(found, whole.grad, atol=1e-12)
    for own, wanted in zip(layers[1].buffers(), layers[0].buffers(), strict=True):
        assert torch.allclose(own, wanted)  # moved once, not once a part


def test_parts_compute_with_the_threads_of_the_process() -> None:
    """OpenMP starts each new thread with a number of its own, which oneDNN and MKL ask for before torch sets it."""
    libraries = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not libraries:
        pytest.skip("torch was built without GNU OpenMP")
    threads_of = ctypes.CDLL(str(libraries[0])).omp_get_max_threads
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            assert _sums().each(lambda _: [threads_of()], range(4)) == [threads] * 4
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_an_error_of_one_part_ends_all(failing: int) -> None:
    sums = _sums()

    def work(items: Sequence[int]) -> list[Tensor]:
        if items[0] == failing:
            raise ValueError("this part fails")
        return [sums.total(torch.ones(1)) + sums.total(torch.ones(1))]

    with pytest.raises(ValueError, match="this part fails"):
        sums.each(work, range(4))
    assert [float(one) for one in sums.each(lambda _: [sums.total(torch.ones(1))], range(4))] == [4.0] * 4


@pytest.mark.parametrize("other", [0, 1, 3])
@pytest.mark.parametrize("more", [True, False])
def test_parts_with_different_sums_are_refused(other: int, more: bool) -> None:
    sums = _sums()

    def work(items: Sequence[int]) -> list[Tensor]:
        count = 2 + more if items[0] == other else 2 + (not more)
        return [torch.stack([sums.total(torch.ones(1)) for _ in range(count)])]

    with pytest.raises(ConfigError, match="different sums"):
        sums.each(work, range(4))


def test_weights_that_parts_of_one_process_use_move_in_all() -> None:
    """Else the weights of the processes part, and nothing says so."""
    sent: list[Tensor] = []
    everywhere, somewhere, nowhere = (torch.full((2,), value) for value in (1.0, 2.0, 0.0))

    def over_processes(own: Tensor) -> Tensor:
        sent.append(own.clone())
        return own if len(sent) == 1 else sent[0] + own

    for rank, gradients in enumerate([(everywhere, somewhere, None), (everywhere, None, None)]):
        parameters = [nn.Parameter(value) for value in (everywhere, somewhere, nowhere)]
        sums = PartSums(4, Processes(rank, rank, 2, CPU))
        sums.over_processes = over_processes  # type: ignore[method-assign]
        reduction = PartReduction(parameters, sums)
        for _ in sums.own_parts:
            reduction.add_part(gradients)
        reduction.average()
    found = [None if one.grad is None else one.grad.tolist() for one in parameters]
    assert found == [[1.0, 1.0], [1.0, 1.0], None]  # of all four parts, of two of four, of none


def test_a_sum_over_micro_batches_first_is_refused() -> None:
    with pytest.raises(ConfigError, match="have it call sum_over_batch"):
        _sums().total(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"shards": 6}, "shards 6 is not a power of two; use 4 or 8"),
        ({"shards": 0}, "shards 0 is less than 1"),
        ({"shards": 32}, "shards 32 of a batch of 24 images: some would have no images; use at most 16"),
        ({"shards": 4, "accumulation": 2}, "leave out --accumulation"),
        ({"shards": 4, "compile": True}, "leave out --compile"),
    ],
)
def test_shards_that_cannot_be_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        small_config("vae").with_options(**options)


def test_networks_and_processes_that_break_the_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 shards cannot be shared out evenly among 3 processes; use 1, 2, 4 or 8"):
        PartSums(8, Processes(0, 0, 3, CPU))
    with pytest.raises(ConfigError, match=r"--shards with batch normalization .*; add --sync-batch-norm"):
        make_trainer(small_config("dcgan", shards=4))


def test_a_shard_has_its_threads_on_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEN_DIST_THREADS", raising=False)
    assert len({threads_by_default(world_size, 2) for world_size in (1, 2)}) == 1
    monkeypatch.setenv("GEN_DIST_THREADS", "3")
    assert threads_by_default(1, 8) == 3


def test_a_config_before_shards_still_loads() -> None:
    values = json.loads(small_config("vae").to_json())
    del values["shards"]
    assert TrainConfig.from_json(json.dumps(values), "an old run").shards is None
