"""Memory traffic of the compiled kernels, counted per access while they run: every element moves once.

A byte that is loaded twice may come from a cache the second time; these kernels do not rely on it.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from tests.kernels.calls import Call, Run
from tests.kernels.latent_calls import QUICK_CASES, Case, Inputs, backward_call, forward_call
from tests.kernels.noise_calls import normal_call

TENSORS = (
    "parameters_ptr",
    "prior_ptr",
    "latents_gradient_ptr",
    "latents_ptr",
    "parameters_gradient_ptr",
    "prior_gradient_ptr",
)
"""Tensors with a size proportional to the latents. The others are [B] or [2]."""


@dataclass
class Traffic:
    """Elements loaded and stored per latent of one sample, in tensors of the size of the latents."""

    loaded: float
    stored: float


def traffic(call: Call, case: Case, target: str = "sm_90") -> tuple[Traffic, Run]:
    """Run a call, and check that every input byte is loaded once and every output byte stored once."""
    run = call.run(target)
    total: Counter[str] = Counter()
    for name in run.sizes:
        if name not in TENSORS:
            continue
        kind, other = ("load", "store") if name in call.inputs else ("store", "load")
        counts = run.counts(name, kind)
        assert (counts == 1).all(), f"{name}: {kind}s of a byte between {counts.min()} and {counts.max()}"
        assert not run.counts(name, other).any()
        total[kind] += counts.sum()
    latents = case.shape[0] * case.latents * case.dtype.itemsize
    return Traffic(total["load"] / latents, total["store"] / latents), run


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_forward_accesses_each_parameter_and_latent_once(case: Case) -> None:
    moved, run = traffic(forward_call(Inputs.of(case), "sm_90"), case)
    assert moved == Traffic(loaded=2.0 + 2.0 * case.prior, stored=1.0 * case.samples)
    assert (run.counts("kl_ptr", "store") == 1).all()


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_backward_accesses_each_parameter_and_gradient_once(case: Case) -> None:
    moved, run = traffic(backward_call(Inputs.of(case), "sm_90"), case)
    assert moved == Traffic(loaded=2.0 + case.samples + 2.0 * case.prior, stored=2.0 + 2.0 * case.prior)
    # A row's gradient of the divergence is read by each program, and by each warp of it, at most once.
    programs, warps = run_programs(case)
    assert run.counts("kl_gradient_ptr", "load").max() <= 32 * warps * programs


def run_programs(case: Case) -> tuple[int, int]:
    """Programs per row, and warps per program, of the backward kernel."""
    launch = backward_call(Inputs.of(case), "sm_90").launch
    return launch.grid[1], launch.num_warps


@pytest.mark.parametrize(("rows", "width"), [(3, 7), (2, 1030)])
def test_normal_writes_each_draw_once_and_reads_its_key_alone(rows: int, width: int) -> None:
    run = normal_call(torch.tensor([1, 2]), 3, 4, rows, width, "sm_90").run("sm_90")
    assert (run.counts("normals_ptr", "store") == 1).all()
    assert run.trace.accesses.keys() == {run.compiled.runtime.index(name) for name in ("normals_ptr", "rng_ptr")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_accesses_of_aligned_tensors_and_rows_have_16_bytes(dtype: torch.dtype, channels_last: bool) -> None:
    case = Case((2, 2 * 16, 4, 8) if channels_last else (2, 2 * 512), dtype, channels_last)
    for call in (forward_call(Inputs.of(case), "sm_90"), backward_call(Inputs.of(case), "sm_90")):
        run = call.run("sm_90")
        for name in run.sizes:
            if name in TENSORS:
                assert run.widths(name, "load") | run.widths(name, "store") == {16}, name


def test_all_bytes_of_a_large_call_are_counted() -> None:
    # 130 rows run in several chunks of programs; the counts must equal the tensors' bytes.
    case = Case((130, 2 * 1024))
    call = forward_call(Inputs.of(case), "sm_90")
    moved, run = traffic(call, case)
    assert moved == Traffic(2.0, 1.0)
    assert np.sum(run.counts("parameters_ptr", "load")) == 130 * 2 * 1024 * 4
