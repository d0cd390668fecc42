"""Normalization over two real processes, compared with torch's over the whole batch in one."""

from __future__ import annotations

import copy
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gen_dist.parallel.sync_batch_norm import SyncBatchNorm, synchronize
from tests.conftest import REPOSITORY
from tests.parallel.sync_batch_norm_worker import CASES, STEPS, make_case, run_case
from tests.support.warm_python import in_two_ranks


@pytest.fixture(scope="module", params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def two_ranks(how: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [*in_two_ranks(), "tests/parallel/sync_batch_norm_worker.py", str(out), how],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [load_file(out / f"{rank}.safetensors") for rank in (0, 1)]


def _assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected.double()).abs().max()) <= 1e-6 * scale


def _expected(name: str) -> dict[str, Tensor]:
    """Compute results by torch in one process, in float64: its float32 is too coarse for inputs far from zero."""
    layer, inputs, factors = make_case(name)
    return run_case(layer.double(), layer, inputs.double(), factors.double())


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_normalize_as_one_rank_does(two_ranks: list[dict[str, Tensor]], name: str) -> None:
    expected = _expected(name)
    first, second = ({key: value for key, value in rank.items() if key.startswith(f"{name}: ")} for rank in two_ranks)
    assert len(first) == len(expected) == 2 * STEPS + (3 if "no weights" in name else 5)
    for key, value in expected.items():
        one, other = (rank[f"{name}: {key}"] for rank in (first, second))
        if key.startswith(("outputs", "gradients")):
            _assert_close(torch.cat([one, other]), value)
        elif key.startswith("gradient of"):
            _assert_close(one + other, value)
        else:
            assert torch.equal(one, other)
            _assert_close(one, value)


@pytest.mark.parametrize("name", CASES)
def test_in_one_process_results_are_torchs(name: str) -> None:
    layer, inputs, factors = make_case(name)
    results = run_case(synchronize(layer), layer, inputs, factors)
    assert isinstance(layer, SyncBatchNorm)
    expected = _expected(name)
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        _assert_close(results[key], value)


def test_gradients_equal_finite_differences() -> None:
    layer = synchronize(nn.BatchNorm2d(2).double())
    inputs = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_only_the_class_of_a_layer_changes() -> None:
    shared = nn.BatchNorm2d(3)
    module = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Sequential(nn.BatchNorm1d(4), shared), nn.GroupNorm(1, 3))
    before = module.state_dict()
    parameters = list(module.parameters())
    assert synchronize(module) is module
    assert sum(isinstance(layer, SyncBatchNorm) for layer in module.modules()) == 2
    inner = module[2]
    assert isinstance(inner, nn.Sequential) and inner[1] is module[1]
    assert all(mine is theirs for mine, theirs in zip(module.parameters(), parameters, strict=True))
    assert all(value.data_ptr() == before[key].data_ptr() for key, value in module.state_dict().items())
    assert copy.deepcopy(module).state_dict().keys() == before.keys()
    assert isinstance(synchronize(nn.BatchNorm2d(3)), SyncBatchNorm)


def test_in_eval_mode_running_statistics_normalize() -> None:
    layer, inputs, _ = make_case("maps")
    layer(inputs[0])
    ours = synchronize(copy.deepcopy(layer)).eval()
    assert torch.equal(ours(inputs[1]), layer.eval()(inputs[1]))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), layer.buffers(), strict=True))


def test_half_precision_is_normalized_in_float32() -> None:
    layer, inputs, _ = make_case("maps")
    halves = inputs[0].bfloat16()
    assert torch.equal(synchronize(copy.deepcopy(layer))(halves), synchronize(layer)(halves.float()).bfloat16())
