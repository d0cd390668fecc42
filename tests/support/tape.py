"""A recorder of steps on the CPU, as blind as a CUDA graph: it replays operations on tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gen_dist.kernels import device_noise, noise

T = TypeVar("T")


class TapeRecorder:
    """Record operations with their arguments. Numbers are constants of the recording; tensors are the same tensors.

    Recording executes the operations, which a CPU cannot avoid, so the tensors that it writes to are restored
    afterwards. Unlike a graph's, all tensors of a recording stay alive.
    """

    def warm_up(self, work: Callable[[], T]) -> T:
        return work()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        tape = _Tape()
        with tape:
            result = work()
        tape.put_back()
        return result, tape.replay


_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,
}


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()
        self._kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        assert func not in _WAITING, f"the host waits for the device, or copies to it: {func}"
        # The schema of batch normalization does not mention the statistics that it updates.
        if func._schema.is_mutable or "batch_norm" in func.__name__:
            for tensor in given:
                self._remember(tensor)
        outputs = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        fresh = [tensor for tensor in results if tensor.untyped_storage().data_ptr() not in storages]
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in fresh}
        self._kept += results
        # Detached: the tape has the operations of autograd themselves.
        arguments = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        self._calls.append((func, *arguments, [tensor.detach() for tensor in results] if fresh else []))
        return outputs

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self._made and storage not in self._before:
            whole = tensor.detach().new_empty(0).set_(tensor.detach().untyped_storage())
            self._before[storage] = whole, whole.clone()

    def put_back(self) -> None:
        for tensor, value in self._before.values():
            tensor.copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self._calls:
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for result, value in zip(results, again, strict=bool(results)):
                    result.copy_(value)


def device_noise_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the noise of GPUs, of which the host reads nothing."""
    monkeypatch.setattr(noise, "_host_normal", device_noise.device_normal)
    monkeypatch.setattr(noise, "_host_binarize", device_noise.device_binarize)
