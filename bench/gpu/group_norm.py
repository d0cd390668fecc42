"""Time and launches of group normalization with SiLU, beside eager PyTorch's and Inductor's.

All take the same maps; outputs and gradients are checked before anything is timed, and the contestants take turns. On a
GPU each pass is a CUDA graph, so its times are the device's.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.gpu.kernels import DTYPES, copy_bandwidth, count_launches, idle_seconds, in_turns, on_stream_of_recordings
from bench.measuring.conditions import conditions
from bench.measuring.out_file import check_out, print_and_write
from gen_dist.cli import run_command
from gen_dist.errors import ConfigError
from gen_dist.kernels import group_norm_silu
from gen_dist.kernels.group_norm_layout import groups_of, tiling_of

Normalization = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps [B, C, H, W], weight [C] and bias [C] to outputs as the maps."""

SHAPES = ((32, 128, 16, 16), (32, 128, 32, 32), (16, 128, 64, 64), (8, 128, 128, 128), (8, 128, 256, 256))
SMALL_SHAPES = ((4, 64, 8, 8), (2, 64, 16, 16))
"""Shapes for CPUs, where this command is a trial of itself."""
GROUPS, EPS = 32, 1e-6
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
COLUMNS = ("maps", "layout", "dtype", "pass", "contestant", "median us", "p20", "p80", "launches", "of copy")


def main(
    device: Literal["auto", "cpu", "cuda"] = "auto", rounds: int = 30, quick: bool = False, out: Path | None = None
) -> None:
    """Print a row for each shape, layout, dtype, pass and contestant, and as the last line all figures in JSON.

    Args:
        device: where to run. auto is the GPU if there is one; a CPU takes small maps.
        rounds: turns of each contestant.
        quick: time the smallest and the largest maps alone, in bf16, in ten turns.
        out: file for the JSON as well.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no GPU here; use --device cpu")
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; it must be at least 1")
    check_out(out)
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    before = conditions()
    torch._functorch.config.donated_buffer = False  # a backward pass is timed many times
    bandwidth, nothing = copy_bandwidth(where), idle_seconds(where)
    print(f"copying moves {bandwidth / 1e9:.1f} GB/s here; `of copy` is the least that this kernel moves / time,")
    print(f"as a share of that; what does next to nothing takes {nothing * 1e6:.1f} us, timed in the same way\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    shapes = SHAPES if where.type == "cuda" else SMALL_SHAPES
    figures = []
    for shape in (shapes[0], shapes[-1]) if quick else shapes:
        for layout in LAYOUTS:
            for dtype in ("bf16",) if quick else DTYPES:
                for figure in measure(shape, layout, dtype, where, 10 if quick else rounds, bandwidth):
                    figures.append(figure)
                    print(row(figure), flush=True)
    gpu = torch.cuda.get_device_name() if where.type == "cuda" else None
    facts = before | {"device": gpu, "cuda": torch.version.cuda, "rounds": rounds, "copy_bytes_a_second": bandwidth}
    print()
    print_and_write(json.dumps({"group_norm": figures, "conditions": facts}), out)


def plain(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The two operations as everyone writes them."""
    return F.silu(F.group_norm(maps, GROUPS, weight, bias, EPS))


def ours(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in one operation."""
    return group_norm_silu(maps, weight, bias, GROUPS, EPS)


def contestants() -> dict[str, Normalization]:
    """Ours and its rivals by name."""
    torch._dynamo.reset()  # earlier shapes count towards its limit, beyond which it runs eagerly
    return {"eager": plain, "Inductor": torch.compile(plain, dynamic=False), "ours": ours}


def least_elements(maps: Tensor) -> dict[str, int]:
    """Maps that the kernels read and write in each pass: once, or what does not fit on the chip twice."""
    whole = tiling_of(groups_of(maps, GROUPS), maps.element_size(), 32).whole
    return {"forward": 2 if whole else 3, "backward": 3 if whole else 5}


def measure(
    shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, rounds: int, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Figures of each pass and contestant on maps of one shape, by the names of COLUMNS."""
    maps = torch.randn(shape, device=device).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    leaves = [maps.requires_grad_()]
    leaves += [
        (offset + 0.1 * torch.randn(shape[1], device=device)).to(maps.dtype).requires_grad_() for offset in (1, 0)
    ]
    gradient = torch.randn_like(maps)
    outputs = {}
    steps = contestants()
    for name, step in steps.items():
        with on_stream_of_recordings(device):  # where backward then runs as well
            outputs[name] = step(*leaves)
        check(name, outputs[name], leaves, gradient)
    forward: dict[str, Callable[[], Any]] = {name: functools.partial(step, *leaves) for name, step in steps.items()}
    backward: dict[str, Callable[[], Any]] = {
        name: functools.partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True)
        for name, output in outputs.items()
    }
    for label, calls in (("forward", forward), ("backward", backward)):
        moved = least_elements(maps)[label] * maps.nbytes
        for name, seconds in in_turns(calls, device, rounds).items():
            low, median, high = (float(each) for each in np.percentile(seconds, (20, 50, 80)))
            launches = count_launches(calls[name], device) if device.type == "cuda" else None
            values = (list(shape), layout, dtype, label, name, median * 1e6, low * 1e6, high * 1e6, launches)
            yield dict(zip(COLUMNS, (*values, moved / median / bandwidth), strict=True))


def row(figure: dict[str, Any]) -> str:
    """A figure in Markdown."""
    shape, *names, median, low, high, launches, share = figure.values()
    cells = (" x ".join(map(str, shape)), *names, f"{median:.1f}", f"{low:.1f}", f"{high:.1f}")
    return f"| {' | '.join(cells)} | {'-' if launches is None else launches} | {share:.0%} |"


def check(name: str, outputs: Tensor, leaves: list[Tensor], gradient: Tensor) -> None:
    """Outputs and gradients equal those of float64."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = plain(wide[0], wide[1], wide[2])
    references = torch.autograd.grad(expected, wide, gradient.double())
    found = torch.autograd.grad(outputs, leaves, gradient, retain_graph=True)
    # Eager PyTorch rounds the normalized maps before SiLU, and Inductor may not.
    bound = 1e-5 if outputs.dtype == torch.float32 else 2e-2
    for what, one, other in zip(
        ("outputs", "gradients of maps", "of weight", "of bias"),
        (outputs, *found),
        (expected, *references),
        strict=True,
    ):
        error = (one.detach().double() - other.detach()).abs().max().item()
        most = bound * max(1.0, other.abs().max().item())
        assert error < most, f"{name}: {what} are wrong by up to {error:.2g}, more than {most:.2g}"


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
