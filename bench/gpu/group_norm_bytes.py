"""Bytes and launches of group normalization with SiLU: of the kernels, and of what eager PyTorch and Inductor run.

Run `python bench/gpu/group_norm_bytes.py` for the table of kernels/README.md. It needs no GPU.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.gpu.group_norm import EPS, GROUPS, LAYOUTS, plain
from bench.gpu.kernels import DTYPES

SHAPES = {"fits": (8, 128, 16, 16), "does not": (1, 128, 128, 128)}
"""Maps whose groups fit on the chip, and larger ones."""

Passes = tuple[list[int], list[int]]
"""Bytes that each launch moves, of the forward and of the backward pass."""


def byte_table() -> str:
    """Bytes an element and launches, forward / backward, of each contestant."""
    names = {"eager, at least": of_operators, "Inductor": of_inductor, "fused": of_kernels}
    lines = [f"| bytes an element (launches), forward / backward | {' | '.join(names)} |", "|---|---|---|---|"]
    for name, maps in cases().items():
        lines.append(f"| {name} | {' | '.join(cell(count(maps), maps) for count in names.values())} |")
    return "\n".join(lines)


def cases() -> dict[str, Tensor]:
    """Maps of each size, layout and dtype."""
    return {
        f"{size}, {layout}, {dtype}": torch.ones(shape, dtype=DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
        for size, shape in SHAPES.items()
        for layout in LAYOUTS
        for dtype in DTYPES
    }


def cell(passes: Passes, maps: Tensor) -> str:
    """Cell of the table. Statistics and parameters are hundredths of a byte an element of these maps."""
    return " / ".join(f"{sum(launches) / maps.numel():.1f} ({len(launches)})" for launches in passes)


def _leaves(maps: Tensor) -> list[Tensor]:
    parameters = [torch.ones(maps.shape[1], dtype=maps.dtype) for _ in range(2)]
    return [leaf.detach().requires_grad_() for leaf in (maps, *parameters)]


def of_operators(maps: Tensor) -> Passes:
    """Bytes of the inputs and outputs of each operator that eager PyTorch runs; each is one launch or more."""
    leaves = _leaves(maps)
    with _Operators() as forward:
        outputs = plain(*leaves)
    gradient = torch.ones_like(maps)
    with _Operators() as backward:
        torch.autograd.grad(outputs, leaves, gradient)
    return forward.moved, backward.moved


class _Operators(TorchDispatchMode):
    """Bytes that each operator reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.moved.append(_bytes_of((args, kwargs, outputs)))
        return outputs


def of_inductor(maps: Tensor) -> Passes:
    """Bytes of the buffers that each loop of Inductor reads and writes, by its own scheduler, on a CPU."""
    passes: list[list[int]] = []
    schedule = GraphLowering._update_scheduler

    def count(graph: GraphLowering) -> None:
        schedule(graph)
        passes.append([node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes])

    leaves = _leaves(maps)
    torch._dynamo.reset()
    with (
        mock.patch.object(GraphLowering, "_update_scheduler", count),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        outputs = torch.compile(plain, dynamic=False)(*leaves)
        torch.autograd.grad(outputs, leaves, torch.ones_like(maps))
    torch._dynamo.reset()
    forward, backward = passes
    return forward, backward


def of_kernels(maps: Tensor) -> Passes:
    """Bytes that the kernels' programs read and write. Maps may be on "meta"."""
    forward, backward = ([sum(moved.values()) for moved in launches] for launches in kernel_traffic(maps, GROUPS))
    return forward, backward


def kernel_traffic(
    maps: Tensor,
    groups: int,
    *,
    residual: Tensor | None = None,
    silu: bool = True,
    parameters: torch.dtype | None = None,
) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """Bytes by argument name of each launch, of the forward and of the backward pass.

    Args:
        maps: [B, C, ...]. Its data are not read.
        groups: number of groups.
        residual: as `maps`, or None.
        silu: SiLU follows.
        parameters: dtype of weight and bias; None is that of the maps.
    """
    from gen_dist.kernels import triton_group_norm, triton_group_norm_backward
    from gen_dist.kernels.triton_noise import Launch

    launches: list[dict[str, int]] = []

    def record(launch: Launch, **pointers: Tensor | None) -> None:
        kernel, spans = launch.kernel.fn.__name__, int(launch.constants.get("SPANS", 1))
        launches.append(
            {
                name: tensor.nbytes * _times_moved(kernel, name, len(maps), spans, silu)
                for name, tensor in pointers.items()
                if tensor is not None
            }
        )

    weight, bias = (maps.new_ones(maps.shape[1], dtype=parameters) for _ in range(2))
    with mock.patch.object(Launch, "__call__", record):
        _, sums, statistics = triton_group_norm.forward(maps, residual, weight, bias, groups, EPS, silu)
        forward, launches = launches, []
        sums = maps if sums is None else sums
        triton_group_norm_backward.backward(maps, residual, sums, weight, bias, statistics, groups, silu)
    return forward, launches


def _times_moved(kernel: str, name: str, images: int, spans: int, silu: bool) -> int:
    """Programs of a launch that read or write the same bytes. All programs of a group read its merged parts."""
    if name == "bias_ptr" and not silu and kernel in ("backward_kernel", "gradient_sums_kernel", "gradients_kernel"):
        return 0  # only the slope of the activation depends on it
    if name in ("weight_ptr", "bias_ptr"):
        return images * spans
    of_groups = {
        ("normalize_kernel", "parts_ptr"),
        ("gradient_sums_kernel", "statistics_ptr"),
        ("gradients_kernel", "statistics_ptr"),
        ("gradients_kernel", "group_parts_ptr"),
    }
    return spans if (kernel, name) in of_groups else 1


def _bytes_of(values: Any) -> int:
    return sum(value.nbytes for value in tree_leaves(values) if isinstance(value, Tensor))


if __name__ == "__main__":
    print(byte_table())
