"""A watch of the operations that a computation calls."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperationWatch(TorchDispatchMode):
    """Base of dispatch modes that see operations, and let compiled functions run as they are written meanwhile.

    torch's own modes ask its compiler to leave their code alone, and import it for that: a second of each run that
    compiles nothing. Nothing is compiled here, so that the compiler need not know.
    """

    _stance: Any = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # asked by torch when a mode's class is made
        return False

    def __enter__(self) -> Any:
        if "torch._dynamo" in sys.modules:  # without it, no function is compiled
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._stance is not None:
            self._stance.__exit__(kind, error, trace)
            self._stance = None
