"""Float32 means float32 in a run, by whichever interface of torch it was changed, and is given back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gen_dist.config import TrainConfig
from gen_dist.parallel.processes import _compute_alike_every_time, settings_kept, start_processes
from gen_dist.plugins import float32_precision

backends: Any = torch.backends
BY_USERS = {
    "nothing": "",
    "matmul.allow_tf32": "backends.cuda.matmul.allow_tf32 = True",  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    "cudnn.allow_tf32": "backends.cudnn.allow_tf32 = False",
    "high": "torch.set_float32_matmul_precision('high')",
    "matmul": "backends.cuda.matmul.fp32_precision = 'tf32'",
    "all": "backends.fp32_precision = 'tf32'",
    "all, in full": "backends.fp32_precision = 'ieee'",
    "convolutions": "backends.cudnn.conv.fp32_precision = 'ieee'",
    "CPU": "backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "both interfaces": "torch.set_float32_matmul_precision('high'); backends.cuda.matmul.fp32_precision = 'ieee'",
}
"""Statements of a notebook."""
PRODUCTS = (backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv)
CONVOLUTIONS = (backends.cudnn.conv, backends.cudnn.rnn)


@pytest.fixture(params=list(BY_USERS))
def set_by_user(request: Any) -> Iterator[None]:
    before = float32_precision.read()
    exec(BY_USERS[request.param], {"torch": torch, "backends": backends})
    yield
    float32_precision.put_back(before)


@pytest.mark.usefixtures("set_by_user")
def test_float32_is_float32_in_a_run_and_given_back() -> None:
    deterministic, before = backends.cudnn.deterministic, float32_precision.read()
    for of_cudnn in (False, True):
        with settings_kept():
            start_processes(TrainConfig(device="cpu"))
            if of_cudnn:
                _compute_alike_every_time()
                assert not backends.cudnn.allow_tf32
            owners = PRODUCTS + of_cudnn * CONVOLUTIONS
            assert {owner.fp32_precision for owner in owners} <= {"none", "ieee"}
            assert torch.get_float32_matmul_precision() == "highest"
            assert not backends.cuda.matmul.allow_tf32
        assert float32_precision.read() == before
        assert backends.cudnn.deterministic == deterministic


def test_a_precision_that_was_inherited_is_so_again() -> None:
    before = float32_precision.read()
    try:
        backends.fp32_precision = "tf32"
        with settings_kept():
            _compute_alike_every_time()
        backends.fp32_precision = "ieee"
        assert backends.cuda.matmul.fp32_precision == backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        float32_precision.put_back(before)
