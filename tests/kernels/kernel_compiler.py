"""Ahead-of-time compilation of Triton kernels without a GPU, in a process of its own.

Triton decides when it is imported whether kernels are compiled or interpreted, and tests do both, so a child process
without TRITON_INTERPRET compiles. It forks for each request, which imports the kernels' modules from the repository or
from a directory of changed copies. Nothing is compiled twice in one session of tests.
"""

import atexit
import base64
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Back end, architecture and threads of a warp, in Triton's names."""

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


class Launch(Protocol):
    """Attributes of `kernels.triton_noise.Launch`."""

    @property
    def kernel(self) -> Any: ...
    @property
    def grid(self) -> tuple[int, ...]: ...
    @property
    def integers(self) -> dict[str, int]: ...
    @property
    def constants(self) -> dict[str, int | float | bool]: ...
    @property
    def num_warps(self) -> int: ...


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        assembly: PTX, or AMD's assembly.
        binary: the cubin; empty for AMD.
        shared_bytes: shared memory of a program.
        runtime: names of the arguments that the compiled kernel takes, in order.
    """

    assembly: str
    binary: bytes
    shared_bytes: int
    runtime: tuple[str, ...]


def compile_launch(
    launch: Launch, pointers: Mapping[str, Tensor | None], target: str, directory: Path = REPOSITORY
) -> Compiled:
    """Compile the kernel of a launch as the launch itself would.

    Args:
        launch: kernel, constants, warps and integers.
        pointers: tensors by argument name, or None; the code depends on their dtype and alignment.
        target: a name of TARGETS.
        directory: parent of the package `gen_dist` whose kernels are compiled.

    Raises:
        RuntimeError: with the compiler's message.
    """
    function = launch.kernel.fn
    signature = {name: "constexpr" for name in launch.constants} | {
        name: "i32" if -(2**31) <= value < 2**31 else "i64" for name, value in launch.integers.items()
    }
    constants: dict[str, Any] = dict(launch.constants)
    aligned = []
    for name, tensor in pointers.items():
        signature[name] = "constexpr" if tensor is None else POINTERS[tensor.dtype]
        if tensor is None:
            constants[name] = None
        elif tensor.data_ptr() % 16 == 0:
            aligned.append(name)
    request = {
        "directory": str(directory),
        "module": function.__module__,
        "function": function.__name__,
        "signature": signature,
        "constants": constants,
        "aligned": sorted(aligned),
        "num_warps": launch.num_warps,
        "target": TARGETS[target],
    }
    return _compiled(json.dumps(request, sort_keys=True))


@functools.cache
def _compiled(request: str) -> Compiled:
    answer = _compiler().ask(request)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    answer["binary"] = base64.b64decode(answer["binary"])
    answer["runtime"] = tuple(answer["runtime"])
    return Compiled(**answer)


class _Compiler:
    """The child process. Triton's cache is that of the tests' session, so that each kernel is compiled once."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = os.environ["GEN_DIST_COMPILED_KERNELS"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.kernel_compiler"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: str) -> dict[str, Any]:
        """Send a request of one line, and return the answer of one line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the compiling process ended with {self.process.wait()}")
        result: dict[str, Any] = json.loads(answer)
        return result

    def close(self) -> None:
        """End the child."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def _compiler() -> _Compiler:
    compiler = _Compiler()
    atexit.register(compiler.close)
    return compiler


def main() -> None:
    """Run the child: read requests from standard input, write answers to standard output."""
    from triton.runtime.cache import triton_key

    triton_key()  # before the forks, since each would hash the whole of Triton, for longer than it compiles
    gc.freeze()

    for request in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(json.loads(request))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            print(json.dumps({"error": f"the compiler ended with status {status}"}), flush=True)


def _answer(request: dict[str, Any]) -> None:
    try:
        answer = _compile(request)
    except Exception:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), flush=True)


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sys.path.insert(0, request["directory"])
    kernel = getattr(importlib.import_module(request["module"]), request["function"])
    names = kernel.arg_names
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature={name: request["signature"][name] for name in names},
            constexprs=request["constants"],
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in request["aligned"]},
        ),
        target=GPUTarget(*request["target"]),
        options={"num_warps": request["num_warps"]},
    )
    return {
        "assembly": compiled.asm["ptx" if request["target"][0] == "cuda" else "amdgcn"],
        "binary": base64.b64encode(compiled.asm.get("cubin", b"")).decode(),
        "shared_bytes": compiled.metadata.shared,
        "runtime": [name for name in names if request["signature"][name] != "constexpr"],
    }


if __name__ == "__main__":
    main()
