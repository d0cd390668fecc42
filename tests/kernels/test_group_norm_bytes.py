"""Memory traffic of the group normalization kernels, counted per access while the compiled programs run.

Maps and their gradients move once where a group fits on the chip, and are read twice where it does not. A byte that one
thread or warp of a program has read counts once for that program. All else (statistics, weights, biases and parts of
sums) is counted to the byte as well.
"""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from bench.gpu import group_norm, group_norm_bytes
from tests.kernels.calls import Run
from tests.kernels.group_norm_calls import QUICK_CASES, Case, Inputs, Passes, run_passes

LARGE = ("maps_ptr", "residual_ptr", "sums_ptr", "outputs_ptr")
LARGE_GRADIENTS = ("outputs_gradient_ptr", "sums_gradient_ptr", "maps_gradient_ptr")
WIDE_CASES = [
    Case((2, 32, 4, 8), 2, torch.bfloat16),
    Case((2, 32, 4, 8), 2, torch.float32, channels_last=True, residual=True),
    Case((1, 16, 40, 40), 1, torch.bfloat16, channels_last=True),
]
"""Aligned cases whose rows, or channels of a pixel, are multiples of 16 bytes."""


@functools.cache
def passes_of(case: Case) -> tuple[Inputs, Passes]:
    """Inputs of a case, and its launches as they ran."""
    inputs = Inputs.of(case)
    return inputs, run_passes(inputs, "sm_90")


def elements_moved(runs: list[Run], case: Case) -> float:
    """Maps moved by the launches of a pass; each byte of one is accessed equally often, and by one thread a launch."""
    total = 0
    for run in runs:
        for name in {*run.sizes} & {*LARGE, *LARGE_GRADIENTS}:
            loads, stores = run.counts(name, "load"), run.counts(name, "store")
            assert loads.min() == loads.max() and stores.min() == stores.max(), name
            assert loads.max() + stores.max() == 1, name
            total += int(loads.sum() + stores.sum())
    return total / (case.elements * case.dtype.itemsize)


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_maps_move_once_where_they_fit_and_twice_elsewhere(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, passes = passes_of(case)
    fits = len(passes.forward) == 1
    # Without a residual: maps and outputs; maps, gradient of the outputs and gradient of the maps.
    forward, backward = (2, 3) if fits else (3, 5)
    # With one: residual and sums as well; and the gradient of the sums.
    assert elements_moved(passes.forward, case) == forward + 2 * case.residual
    assert elements_moved(passes.backward, case) == backward + case.residual
    # The benchmark counts on the same.
    monkeypatch.setattr(group_norm, "GROUPS", case.groups)
    assert group_norm.least_elements(inputs.maps) == {"forward": forward, "backward": backward}


def bytes_moved(run: Run) -> dict[str, int]:
    """Bytes of each tensor that the programs of a launch move, each counted once a program."""
    return {
        name: sum(run.trace.bytes_of_programs(run.compiled.runtime.index(name), kind) for kind in ("load", "store"))
        for name in run.sizes
    }


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_all_bytes_are_those_that_the_guide_counts(case: Case) -> None:
    inputs, passes = passes_of(case)
    counted = group_norm_bytes.kernel_traffic(
        inputs.maps, case.groups, residual=inputs.residual, silu=case.silu, parameters=case.parameters
    )
    for runs, launches in zip((passes.forward, passes.backward), counted, strict=True):
        assert [bytes_moved(run) for run in runs] == launches


FLOORS = {"forward": (2, 3), "backward": (3, 5)}
"""Maps that each pass has to move, where a group fits and where it does not."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", group_norm.LAYOUTS)
@pytest.mark.parametrize("shape", group_norm.SHAPES, ids=str)
def test_statistics_and_parameters_are_a_small_share(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    maps = torch.empty(shape, device="meta", dtype=dtype).contiguous(memory_format=group_norm.LAYOUTS[layout])
    passes = group_norm_bytes.of_kernels(maps)
    for (name, floors), launches in zip(FLOORS.items(), passes, strict=True):
        streamed = len(passes[0]) == 2
        moved = sum(launches) / maps.nbytes
        assert floors[streamed] < moved < (1.05 if streamed else 1.02) * floors[streamed], name


@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_accesses_of_aligned_maps_have_16_bytes(case: Case) -> None:
    _, passes = passes_of(case)
    for run in (*passes.forward, *passes.backward):
        for name in {*run.sizes} & {*LARGE, *LARGE_GRADIENTS}:
            assert run.widths(name, "load") | run.widths(name, "store") == {16}, name


def test_a_misaligned_tensor_is_accessed_by_elements() -> None:
    (case,) = (case for case in QUICK_CASES if case.misaligned)
    run = passes_of(case)[1].forward[0]
    assert run.widths("maps_ptr", "load") == {case.dtype.itemsize}
