"""Optimizer state and moving average that are split over the processes: the bits of whole ones, in less memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gen_dist.errors import ConfigError
from gen_dist.parallel.own_part import Chunks, make_dense
from gen_dist.parallel.processes import Processes
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import read_metrics
from gen_dist.records.reading import read_config
from gen_dist.training.moving_average import MovingAverage, SplitAverage
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.runs import OBJECTIVES, assert_same_bits, small_config
from tests.support.warm_python import in_two_ranks

CASES = (
    "vae + shared memory",
    "dcgan + scattered",
    "gan + sgd, clipped",
    "vae + sgd, clipped + shards",
)
MORE = (
    "vae + scattered",
    "dcgan",
    "gan + sgd, clipped + scattered",
    "vae, learned Gaussian scale + adamw, no average + accumulated",
    "vae + compiled",
    "dcgan + shards",
)


def _results(launch: Sequence[str], out: Path, cases: Sequence[str], timeout: float = 240) -> list[dict[str, Any]]:
    """Results of all processes."""
    done = subprocess.run(
        [*launch, "tests/parallel/split_worker.py", str(out), *cases],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "GEN_DIST_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def quick(directory: Path) -> list[dict[str, Any]]:
    return _results(in_two_ranks(), directory, CASES)


def _assert_equal(of_ranks: list[dict[str, Any]], case: str) -> None:
    for found in (one[case] for one in of_ranks):
        assert found["different"] == []
        assert found["figures"] and found["finite"]
        assert found["resumed"] == []


@pytest.mark.parametrize("case", CASES)
def test_split_state_has_the_bits_of_whole(quick: list[dict[str, Any]], case: str) -> None:
    _assert_equal(quick, case)


@pytest.mark.parametrize("case", CASES)
def test_each_process_has_its_share_of_the_state(quick: list[dict[str, Any]], case: str) -> None:
    wholes, splits = zip(*[one[case]["values"] for one in quick], strict=True)
    shared = case.endswith("shared memory")  # whose optimizer state is split anyway
    for kind, whole in enumerate(wholes[0]):
        shares = [split[kind] for split in splits]
        assert sum(shares) == (sum(one[kind] for one in wholes) if shared and kind == 0 else whole)
        assert max(shares) <= whole / len(shares) + 16 * 40 or (shared and kind == 0)


def test_a_recorded_step_with_split_state_equals_a_launched_one(quick: list[dict[str, Any]]) -> None:
    for found in quick:
        assert found["recorded"]["gan"] == {"losses": True, "different": []}


def test_a_run_with_split_state_writes_what_one_without_writes(quick: list[dict[str, Any]], directory: Path) -> None:
    plain, split = ([directory / name / one for name in ("plain", "split")] for one in ("samples", "checkpoints"))
    for first, second in (plain, split):
        names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
        for name in names:
            if name.suffix in (".png", ".safetensors"):
                assert (first / name).read_bytes() == (second / name).read_bytes(), name
    figures = [
        [
            {name: value for name, value in line.items() if name.startswith(("step", "train/", "test/", "samples/"))}
            for line in read_metrics(directory / run / "metrics.jsonl")
        ]
        for run in ("plain", "split")
    ]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_one_process_goes_on_from_split_state(quick: list[dict[str, Any]], directory: Path, tmp_path: Path) -> None:
    """Its checkpoints name no number of processes."""
    states = []
    for name in ("plain", "split"):
        run = tmp_path / name
        shutil.copytree(directory / name, run)
        shutil.rmtree(run / "checkpoints/step_00000008")
        config = read_config(run / "config.json").with_options(split_state=False, run_dir=str(run))
        config = config.with_options(sample_every=100, evaluate_every=100)
        lines: list[str] = []
        assert train(config, say=lines.append).step == 8
        assert any(line.endswith("at step 4 of 8, now with 1 process") for line in lines)
        states.append(checkpoints.load(checkpoint_paths(run)[0])[0].tensors)
    for group in states[0]:
        assert_same_bits(dict(states[0][group]), dict(states[1][group]))


def test_chunks_tile_all_tensors() -> None:
    shapes = [(3,), (40, 7), (), (16,), (5, 3, 2, 2)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[4] = tensors[4].to(memory_format=torch.channels_last)
    for world_size in (1, 2, 3, 8, 40):
        of_ranks = [Chunks(tensors, rank, world_size) for rank in range(world_size)]
        assert len({one.own.stop - one.own.start for one in of_ranks}) == 1
        for index, tensor in enumerate(tensors):
            pieces = [piece for one in of_ranks for piece in one.pieces if piece.tensor == index]
            ends = [0, *(piece.stop for piece in pieces)]
            assert [piece.start for piece in pieces] == ends[:-1] and ends[-1] == tensor.numel()
            assert all(piece.start % 16 == 0 for piece in pieces)
        found = [value for one in of_ranks for value in one.of([nn.Parameter(tensor) for tensor in tensors])]
        assert sum(one.numel() for one in found) == sum(tensor.numel() for tensor in tensors)


class _Small(nn.Module):
    """Networks of an objective: a transposed weight, one with gaps, and a buffer that averages copy."""

    def __init__(self) -> None:
        super().__init__()
        network = nn.Linear(7, 3)
        network.transposed = nn.Parameter(torch.randn(40, 30).t())
        network.sparse = nn.Parameter(torch.randn(40, 30)[:, ::2])
        network.register_buffer("codes", torch.zeros(2))
        self.networks = nn.ModuleDict({"one": network})


def _averages(newest: Any) -> tuple[MovingAverage, list[SplitAverage]]:
    """A whole average, and those of two processes, after a move."""
    whole = MovingAverage(newest)
    splits = [SplitAverage(newest, Processes(rank, rank, 2, torch.device("cpu"))) for rank in range(2)]
    with torch.no_grad():
        for value in (*newest.networks.parameters(), *newest.networks.buffers()):
            value.add_(torch.arange(value.numel()).view(value.shape))
    for average in (whole, *splits):
        average.move(0.5)
    return whole, splits


def test_split_averages_are_right_in_any_layout() -> None:
    whole, splits = _averages(_Small())
    weights = list(whole.objective.networks.parameters())
    make_dense(weights)
    for split in splits:
        (chunks,), (pieces,) = split._chunks, split._pieces
        assert all(map(torch.equal, pieces, chunks.of(weights)))


def test_a_process_without_weights_copies_buffers() -> None:
    newest = _Small()
    network = newest.networks["one"]
    for name in [name for name, _ in network.named_parameters()]:
        delattr(network, name)
    network.factor = nn.Parameter(torch.ones(1))
    _, splits = _averages(newest)
    assert not splits[1]._pieces[0]
    assert splits[1].objective.networks.get_buffer("one.codes").tolist() == [0.0, 1.0]


def test_a_process_that_is_lost_while_averages_gather_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_flat: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[gloo] Connection closed by peer")

    _, (split, _) = _averages(_Small())
    monkeypatch.setattr("gen_dist.parallel.own_part.gathered", lost)
    with pytest.raises(RuntimeError, match="Connection closed by peer"), split.whole():
        pass


def test_half_precision_and_trials_with_split_state_are_refused(quick: list[dict[str, Any]]) -> None:
    assert all("split_state in fp16" in found["refusal"] for found in quick)
    with pytest.raises(ConfigError, match="leave out --auto-accumulation"):
        small_config("vae", split_state=True, auto_accumulation=True)


def test_split_state_is_advised_where_it_leaves_less_to_keep(quick: list[dict[str, Any]]) -> None:
    for found in quick:
        assert all("out of memory" in advice for advice in found["advice"].values())
        advised = {name for name, advice in found["advice"].items() if "keeps 1/2 of the optimizer's" in advice}
        assert advised == {"state", "average", "shared state, average"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_objective_has_equal_bits_with_split_state(tmp_path: Path) -> None:
    more = [f"{name} + shards" for name in ("wgan-gp", "vae-gan", "r3gan")]
    cases = [*OBJECTIVES, "gan + sgd, clipped", *more]
    file = str(REPOSITORY / "launch/configs/cpu_4_processes.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    found = _results(launch, tmp_path, cases, timeout=1400)
    for case in cases:
        _assert_equal(found, case)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_more_cases_have_equal_bits_with_split_state(tmp_path: Path) -> None:
    found = _results(in_two_ranks(), tmp_path, MORE, timeout=550)
    for case in MORE:
        _assert_equal(found, case)
