"""Calls of compiled kernels: a launch with its tensors, compiled for a GPU and run on the CPU."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.kernels.kernel_compiler import REPOSITORY, TARGETS, Compiled, Launch, compile_launch
from tests.kernels.ptx.executor import execute
from tests.kernels.ptx.program import Program, parse
from tests.kernels.ptx.trace import Trace

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Names of dtypes in the names of tests."""


def warp_size_of(target: str) -> int:
    """Threads of a warp on a target."""
    return TARGETS[target][2]


def placed(values: Tensor, dtype: torch.dtype, *, channels_last: bool = False, misaligned: bool = False) -> Tensor:
    """Copy values to a dtype, memory format and alignment; if misaligned, one element off a multiple of 16 bytes."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = last[values.ndim] if channels_last else torch.contiguous_format
    strides = torch.empty(values.shape, memory_format=memory_format, device="meta").stride()
    memory = torch.empty(values.numel() + 1, dtype=dtype)
    return memory.as_strided(values.shape, strides, int(misaligned)).copy_(values)


@dataclass
class Run:
    """A finished run of a kernel.

    Attributes:
        compiled: the kernel.
        trace: its memory accesses.
        sizes: bytes of each tensor by argument name.
    """

    compiled: Compiled
    trace: Trace
    sizes: dict[str, int]

    def counts(self, name: str, kind: Any) -> NDArray[np.int64]:
        """Number of loads or stores of each byte of a tensor."""
        return self.trace.counts(self.compiled.runtime.index(name), kind, self.sizes[name])

    def widths(self, name: str, kind: Any) -> set[int]:
        """Widths of the loads or stores of a tensor, in bytes."""
        return set(self.trace.widths(self.compiled.runtime.index(name), kind))


@dataclass
class Call:
    """A launch with its tensors by argument name; None for those not used."""

    launch: Launch
    inputs: dict[str, Tensor | None]
    outputs: dict[str, Tensor | None]

    def output(self, name: str) -> Tensor:
        """Output of this name, which must be in use."""
        tensor = self.outputs[name]
        assert tensor is not None
        return tensor

    def compile(self, target: str, directory: Path = REPOSITORY) -> Compiled:
        """Compile for a target of `kernel_compiler.TARGETS`; the package `kernels` is in `directory`."""
        return compile_launch(self.launch, {**self.inputs, **self.outputs}, target, directory)

    def run(self, target: str, directory: Path = REPOSITORY, approximation: float = 0.0) -> Run:
        """Compile and run on the CPU, `approximation` as in `execute`.

        Inputs are read-only. Outputs are NaN before the run, and must not depend on undefined registers: if one is
        read, as in half-used packed registers, the kernel runs twice with different poisons.
        """
        compiled = self.compile(target, directory)
        inputs, outputs = _memories(self.inputs), _memories(self.outputs)
        for memory in inputs.values():
            memory.flags.writeable = False
        arguments: dict[str, NDArray[Any] | int] = {**self.launch.integers, **inputs, **outputs}

        def run(poison: int) -> Trace:
            for memory in outputs.values():
                memory.fill(0xFF)
            return execute(
                _program(compiled.assembly),
                self.launch.grid,
                [arguments[name] for name in compiled.runtime],
                shared_bytes=compiled.shared_bytes,
                approximation=approximation,
                poison=poison,
            )

        trace = run(0xDEADBEEFDEADBEEF)
        if trace.undefined:
            first = {name: memory.copy() for name, memory in outputs.items()}
            run(0x4142434445464748)
            for name, memory in outputs.items():
                assert np.array_equal(memory, first[name]), f"{name} depends on undefined {dict(trace.undefined)}"
        return Run(compiled, trace, {name: memory.size for name, memory in {**inputs, **outputs}.items()})


def _memories(tensors: Mapping[str, Tensor | None]) -> dict[str, NDArray[np.uint8]]:
    return {name: memory_of(tensor) for name, tensor in tensors.items() if tensor is not None}


@functools.cache
def _program(assembly: str) -> Program:
    return parse(assembly)


def memory_of(tensor: Tensor) -> NDArray[np.uint8]:
    """Bytes of a dense tensor in memory order; they share its memory."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    memory: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return memory
