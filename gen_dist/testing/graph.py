"""Watchers of a phase's forward pass: where the graph to the trained weights is cut, and which modules were called."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gen_dist.testing.place import current_place, has_its_own_gradient

_OF_SHAPES_ALONE = ("_like", "_as", "new_", "size", "dim", "__len__", "requires_grad", "argmax", "argsort")


class GraphWatch(TorchFunctionMode):
    """Follow the values that depend on trained weights but have lost their gradient, e.g. by `detach` or `no_grad`.

    While only the trained parameters require gradients, a result without gradient of a tensor with one is a cut. All
    that is computed from such a result carries the place of the cut.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cuts: dict[int, frozenset[str]] = {}
        self._kept: list[Tensor] = []  # so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        # Before the call: it may write in place.
        had_gradients = any(tensor.requires_grad for tensor in given)
        inherited = frozenset().union(*(self._cuts.get(id(tensor), frozenset()) for tensor in given))
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if any(part in name for part in _OF_SHAPES_ALONE):
            return result
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        written = given[:1] if name in ("__setitem__",) or (name.endswith("_") and not name.endswith("__")) else []
        for tensor in (*outputs, *written):
            found = inherited
            if had_gradients and tensor.is_floating_point() and not tensor.requires_grad and not has_its_own_gradient():
                found = found | {current_place() or "a place outside of the part's own code"}
            if found:
                self._cuts[id(tensor)] = found
                self._kept.append(tensor)
        return result

    def cuts_before(self, tensor: Tensor) -> list[str]:
        """Places at which values were cut that went into a tensor."""
        return sorted(self._cuts.get(id(tensor), ()))


class ModuleWatch:
    """Note the modules with weights to train that are called and are no part of a phase, with the place of the call."""

    def __init__(self, phase: nn.Module) -> None:
        self._own = set(map(id, phase.modules()))
        self.others: dict[str, str] = {}
        """Names of the classes of foreign modules, by the place of the call. Frozen features are none of them."""

    def __enter__(self) -> ModuleWatch:
        self._handle = register_module_forward_pre_hook(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _note(self, module: nn.Module, _inputs: Any) -> None:
        if id(module) not in self._own and any(weight.requires_grad for weight in module.parameters()):
            self.others.setdefault(current_place() or "a place outside of the part's own code", type(module).__name__)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """All leaves that the graph of a loss leads to."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    waiting = [loss.grad_fn] if loss.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found


def rounding_share(weights: Tensor, gradient: Tensor, rate: float) -> float:
    """Share of an update that is lost to the spacing of the weights' dtype: Adam's first one at a learning rate."""
    wanted = -rate * gradient.double() / (gradient.double().abs() + 1e-8)
    before = weights.detach().double()
    made = (before + wanted).to(weights.dtype).double() - before
    norm = wanted.norm()
    return float((made - wanted).norm() / norm) if norm > 0 else 0.0


def generator_states() -> list[Any]:
    """State of the global generators of torch, numpy and Python."""
    import random

    import numpy as np

    numbers: Any = np.random.get_state(legacy=True)
    return [
        torch.get_rng_state().numpy().tobytes(),
        numbers[1].tobytes() + bytes([numbers[2] % 256]),
        random.getstate(),
    ]
