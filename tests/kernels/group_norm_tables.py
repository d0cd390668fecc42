"""Tables of what the compiled group normalization kernels do, from kernels that are compiled and executed for them.

Run `python -m tests.kernels.group_norm_tables errors`, or `bytes`, `budgets` or `mutations`, each of which takes a few
minutes on a CPU. The tests beside hold all bounds; this shows the figures.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu import group_norm, group_norm_bytes
from gen_dist.kernels.group_norm_layout import groups_of, tiling_of
from tests.kernels.accuracy import errors_in_scale, ulps_apart
from tests.kernels.calls import NAMES, Run
from tests.kernels.group_norm_calls import Case, Inputs, backward_calls, forward_calls, run_passes
from tests.kernels.group_norm_reference import ERROR, Reference
from tests.kernels.kernel_compiler import TARGETS
from tests.kernels.machine_code import Usage, usage_of
from tests.kernels.mutants import is_noticed, mutant

CUDA = tuple(target for target in TARGETS if target.startswith("sm_"))
DTYPES = tuple(NAMES)
CASES = (Case((2, 24, 9, 7), 4), Case((1, 12, 70, 70), 3))
"""Groups that fit on the chip, and groups of several programs."""
SHAPES = {"fits": (2, 128, 16, 16), "does not fit": (1, 128, 128, 128)}
"""Aligned maps of 32 groups, whose accesses can all be wide."""


def errors() -> Iterator[str]:
    """Largest errors of results by architecture and dtype, over sizes, layouts and errors of approximate instructions.

    Half precision in units in the last place of the rounded float64 result, but for results whose terms cancel to the
    tolerance of float32; float32, as the gradients of parameters are, in millionths of the terms' sizes.
    """
    yield (
        "| architecture | dtype | unit | outputs | gradient of maps | of weight, 1e-6 | of bias, 1e-6 |\n|" + "---|" * 7
    )
    for target, dtype in product(CUDA, DTYPES):
        largest: dict[str, float] = {}
        for case, channels_last, approximation in product(CASES, (False, True), (0.0, -1.0, 1.0)):
            inputs = Inputs.of(replace(case, dtype=dtype, channels_last=channels_last, residual=channels_last))
            tensors, expected = run_passes(inputs, target, approximation=approximation).tensors, Reference(inputs)
            for name, result in expected.results.items():
                error = largest_error(tensors[name], result, expected.scales[name])
                largest[name] = max(largest.get(name, 0.0), error)
        unit = "1e-6" if dtype == torch.float32 else "ulp"
        cells = [f"{largest[f'{name}_ptr']:.2g}" for name in ("outputs", "maps_gradient")]
        cells += [f"{largest[f'{name}_gradient_ptr']:.2g}" for name in ("weight", "bias")]
        yield f"| {target} | {NAMES[dtype]} | {unit} | {' | '.join(cells)} |"


def largest_error(values: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Largest error in the unit of `errors`."""
    relative = errors_in_scale(values, expected, scale)
    if values.dtype == torch.float32:
        return float(relative.max()) * 1e6
    ulps = ulps_apart(values, expected)[relative > ERROR]
    return float(ulps.max()) if ulps.numel() else 0.0


def traffic() -> Iterator[str]:
    """Bytes an element at the sizes of bench/gpu/group_norm.py, of executed programs: one image, a tile's groups."""
    yield (
        "| maps | layout | dtype | launches | bytes an element, forward / backward | all maps, by arithmetic |\n|"
        + "---|" * 6
    )
    for shape, layout, dtype in product(group_norm.SHAPES, group_norm.LAYOUTS, (torch.float32, torch.bfloat16)):
        maps = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=group_norm.LAYOUTS[layout])
        groups = tiling_of(groups_of(maps, group_norm.GROUPS), maps.element_size(), 32).groups
        channels = groups * shape[1] // group_norm.GROUPS
        case = Case((1, channels, *shape[2:]), groups, dtype, layout == "channels_last", parameters=dtype)
        passes = run_passes(Inputs.of(case), "sm_90")
        counted = [sum(launches) / maps.numel() for launches in group_norm_bytes.of_kernels(maps)]
        traced = [sum(map(bytes_moved, runs)) / case.elements for runs in (passes.forward, passes.backward)]
        launches = f"{len(passes.forward)} / {len(passes.backward)}"
        sizes = [" / ".join(f"{each:.2f}" for each in both) for both in (traced, counted)]
        yield f"| {' x '.join(map(str, shape))} | {layout} | {NAMES[dtype]} | {launches} | {' | '.join(sizes)} |"


def bytes_moved(run: Run) -> int:
    """Bytes that the programs of a launch read and write, each counted once a program."""
    arguments = [run.compiled.runtime.index(name) for name in run.sizes]
    return sum(run.trace.bytes_of_programs(each, kind) for each in arguments for kind in ("load", "store"))


def budgets() -> Iterator[str]:
    """Registers, memory of its own and instructions of each kernel, the most over dtypes and layouts."""
    columns = ("architecture", "kernel", "registers", "stack", "shared bytes", "atomics", "loads: all, narrow")
    yield f"| {' | '.join((*columns, 'stores: all, narrow'))} |\n|" + "---|" * 8
    for target in TARGETS:
        most: dict[str, list[int]] = {}
        for shape, dtype, channels_last in product(SHAPES.values(), DTYPES, (False, True)):
            inputs = Inputs.of(Case(shape, 32, dtype, channels_last, residual=True))
            statistics = torch.empty(shape[0], 32, 3)
            for call in (*forward_calls(inputs, target), *backward_calls(inputs, inputs.maps, statistics, target)):
                usage, name = usage_of(call, target), call.launch.kernel.fn.__name__
                figures = [usage.registers, usage.stack, call.compile(target).shared_bytes, *accesses(usage, target)]
                most[name] = [max(pair) for pair in zip(figures, most.get(name, figures), strict=True)]
        for name, (registers, stack, shared, atomics, *counts) in most.items():
            loads, narrow_loads, stores, narrow_stores = counts
            cells = (target, f"`{name}`", registers, stack, shared, atomics)
            yield f"| {' | '.join(map(str, cells))} | {loads}, {narrow_loads} | {stores}, {narrow_stores} |"


def accesses(usage: Usage, target: str) -> list[int]:
    """Atomic instructions, loads, those of less than 16 bytes, stores, and those of less than 16 bytes."""
    cuda = target.startswith("sm_")
    wide = (".128", ".256") if cuda else ("dwordx4",)
    found = [sum(n for name, n in usage.operations.items() if "ATOM" in name.upper() or name.startswith("RED"))]
    for kinds in (("LDG", "global_load", "buffer_load"), ("STG", "global_store", "buffer_store")):
        names = {name: n for name, n in usage.operations.items() if name.startswith(kinds)}
        found += [sum(names.values()), sum(n for name, n in names.items() if not name.endswith(wide))]
    return found


def mutations() -> Iterator[str]:
    """Each change to the kernels' source, and whether a check notices it."""
    from tests.kernels import test_group_norm_mutations as tests

    yield "| file | source | change | noticed by |\n|---|---|---|---|"
    every = [*tests.QUICK_MUTATIONS, *tests.MUTATIONS]
    noticed = 0
    with tests.small_tiles():
        for file, source, change, check in every:
            with tempfile.TemporaryDirectory() as directory:
                found = is_noticed(tests.CHECKS, check, mutant(Path(directory), file, source, change))
            noticed += found
            yield f"| `{file}` | `{source}` | `{change}` | {check if found else '**nothing**'} |"
    yield f"\n{noticed} of {len(every)} are noticed."


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "errors": errors,
    "bytes": traffic,
    "budgets": budgets,
    "mutations": mutations,
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TABLES:
        sys.exit(f"name one table: {', '.join(TABLES)}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("GEN_DIST_COMPILED_KERNELS", cache)
        for line in TABLES[sys.argv[1]]():
            print(line, flush=True)
