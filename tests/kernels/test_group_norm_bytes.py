"""Memory traffic of the group normalization kernels, counted per access while the compiled programs run.

Maps and their gradients move once where a group fits on the chip, and are read twice where it does not. A byte that one
thread or warp of a program has read counts once for that program. All else (statistics, weights, biases and parts of
sums) is counted to the byte as well.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from bench.gpu import group_norm
from tests.kernels.calls import Run
from tests.kernels.group_norm_calls import QUICK_CASES, Case, Inputs, run_passes

LARGE = ("maps_ptr", "residual_ptr", "sums_ptr", "outputs_ptr")
LARGE_GRADIENTS = ("outputs_gradient_ptr", "sums_gradient_ptr", "maps_gradient_ptr")
WIDE_CASES = [
    Case((2, 32, 4, 8), 2, torch.bfloat16),
    Case((2, 32, 4, 8), 2, torch.float32, channels_last=True, residual=True),
    Case((1, 16, 40, 40), 1, torch.bfloat16, channels_last=True),
]
"""Aligned cases whose rows, or channels of a pixel, are multiples of 16 bytes."""


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
    inputs = Inputs.of(case)
    passes = run_passes(inputs, "sm_90")
    fits = len(passes.forward) == 1
    # Without a residual: maps and outputs; maps, gradient of the outputs and gradient of the maps.
    forward, backward = (2, 3) if fits else (3, 5)
    # With one: residual and sums as well; and the gradient of the sums.
    assert elements_moved(passes.forward, case) == forward + 2 * case.residual
    assert elements_moved(passes.backward, case) == backward + case.residual
    # The benchmark counts on the same.
    monkeypatch.setattr(group_norm, "GROUPS", case.groups)
    assert group_norm.least_elements(inputs.maps) == {"forward": forward, "backward": backward}


def small_bytes(run: Run) -> dict[str, int]:
    """Bytes of statistics, parameters and parts that the programs of a launch move, each counted once a program."""
    moved: dict[str, int] = {}
    for name in {*run.sizes} - {*LARGE, *LARGE_GRADIENTS}:
        argument = run.compiled.runtime.index(name)
        moved[name] = sum(run.trace.bytes_of_programs(argument, kind) for kind in ("load", "store"))
    return moved


def expected_bytes(case: Case, spans: int) -> list[dict[str, int]]:
    """Those bytes of the launches of both passes, by arithmetic.

    Args:
        case: the case, with weights and biases in float32.
        spans: programs along the pixels of a group; 1 where it fits.
    """
    images, channels = case.shape[:2]
    statistics, parameters = images * case.groups * 3 * 4, images * channels * 4
    read = {"weight_ptr": parameters * spans, "bias_ptr": parameters * spans}
    # Only the slope of the activation depends on the bias.
    read_again = read if case.silu else read | {"bias_ptr": 0}
    of_parameters = {"weight_gradient_ptr": channels * 4, "bias_gradient_ptr": channels * 4}
    if spans == 1:
        return [
            {**read, "statistics_ptr": statistics},
            {**read_again, "statistics_ptr": statistics, "parts_ptr": 2 * parameters},
            {"parts_ptr": 2 * parameters, **of_parameters},
        ]
    # Every program of a group reads the parts of all; the gradients of the parameters need each part once more.
    return [
        {"parts_ptr": statistics * spans},
        {**read, "parts_ptr": statistics * spans**2, "statistics_ptr": statistics},
        {**read_again, "statistics_ptr": statistics * spans, "parts_ptr": 2 * parameters * spans},
        {
            **read_again,
            "statistics_ptr": statistics * spans,
            "parts_ptr": 2 * parameters * spans * (spans + 1),
            **of_parameters,
        },
    ]


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_statistics_and_parameters_move_as_often_as_counted(case: Case) -> None:
    passes = run_passes(Inputs.of(case), "sm_90")
    runs = [*passes.forward, *passes.backward]
    spans = int(passes.tensors["parts_ptr"].shape[1])
    assert [small_bytes(run) for run in runs] == expected_bytes(case, spans)


@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_accesses_of_aligned_maps_have_16_bytes(case: Case) -> None:
    passes = run_passes(Inputs.of(case), "sm_90")
    for run in (*passes.forward, *passes.backward):
        for name in {*run.sizes} & {*LARGE, *LARGE_GRADIENTS}:
            assert run.widths(name, "load") | run.widths(name, "store") == {16}, name


def test_a_misaligned_tensor_is_accessed_by_elements() -> None:
    (case,) = (case for case in QUICK_CASES if case.misaligned)
    run = run_passes(Inputs.of(case), "sm_90").forward[0]
    assert run.widths("maps_ptr", "load") == {case.dtype.itemsize}
