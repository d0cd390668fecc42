"""A recorder of steps on the CPU, as blind as a CUDA graph: it replays operations on tensors, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gen_dist.kernels import device_noise, noise
from gen_dist.testing.place import current_place
from gen_dist.testing.report import Failure

T = TypeVar("T")


class TapeRecorder:
    """Record operations with their arguments. Numbers are constants of the recording; tensors are the same tensors.

    Recording executes the operations, which a CPU cannot avoid, so the tensors that it writes to are restored
    afterwards. Unlike a graph's, all tensors of a recording stay alive.
    """

    def warm_up(self, work: Callable[[], T]) -> T:
        """See `gen_dist.training.cuda_graphs.Recorder`."""
        return work()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """See `gen_dist.training.cuda_graphs.Recorder`.

        Raises:
            Failure: the host waits for the device.
        """
        tape = _Tape()
        with tape:
            result = work()
        tape.put_back()
        return result, tape.replay


class Operation(NamedTuple):
    """An operation of a step as a recording has it."""

    name: str
    numbers: tuple[Any, ...]
    """Arguments that are no tensors."""
    place: str
    """`file:line` of the part's code that called it."""


class ComparingRecorder(TapeRecorder):
    """A tape that refuses a step whose operations or numbers differ from those of the step before of its kind."""

    def __init__(self) -> None:
        self._warmed: list[list[Operation]] = []

    def warm_up(self, work: Callable[[], T]) -> T:
        """Note the operations of a step that is not recorded."""
        listing = _Listing()
        with listing:
            result = work()
        self._warmed.append(listing.operations)
        return result

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record a step, and compare its operations with those of the steps before it.

        Raises:
            Failure: the host waits for the device, or the step has other operations or numbers.
        """
        tape = _Tape()
        with tape:
            result = work()
        tape.put_back()
        differences = [difference(before, tape.operations) for before in self._warmed]
        found = [one for one in differences if one is not None]
        if found and len(found) == len(differences):
            raise Failure(max(found)[1])
        return result, tape.replay


def difference(before: list[Operation], after: list[Operation]) -> tuple[int, str] | None:
    """Index and description of the first operation that differs; None if `after` begins with `before`."""
    for index, one in enumerate(before):
        other = after[index] if index < len(after) else Operation("nothing", (), one.place)
        if one.name != other.name:
            text = f"{other.place}: a step calls {other.name} where the one before called {one.name}"
            return index, f"{text}; choose with torch.where, not with Python's if"
        if repr(one.numbers) != repr(other.numbers):
            text = (
                f"{other.place}: {one.name} has the Python values {_short(other.numbers)}, {_short(one.numbers)} before"
            )
            return index, f"{text}; what changes from step to step has to come from a tensor such as batch.rng"
    return None


def _short(numbers: tuple[Any, ...]) -> str:
    return ", ".join(str(number) for number in numbers if isinstance(number, int | float))[:80]


class _Listing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def note(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note an operation that the part's own code calls; autograd detaches, copies and adds at will."""
        if func is not torch.ops.aten.detach.default and (place := current_place()):
            numbers = tuple(leaf for leaf in tree_leaves((args, kwargs)) if not isinstance(leaf, Tensor))
            self.operations.append(Operation(str(func), numbers, place))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,
}


class _Tape(_Listing):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()
        self._kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _WAITING:
            raise Failure(f"{current_place() or 'here'}: the host waits for the device, or copies to it: {func}")
        self.note(func, args, kwargs)
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
                if func.namespace == "_c10d_functional":  # read here, before the recorded wait
                    again = [torch.ops._c10d_functional.wait_tensor(value) for value in again]
                for result, value in zip(results, again, strict=bool(results)):
                    result.copy_(value)


@contextlib.contextmanager
def device_noise_on_cpu() -> Iterator[None]:
    """Context manager that draws the noise of GPUs, of which the host reads nothing."""
    before = noise._host_normal, noise._host_binarize
    noise._host_normal, noise._host_binarize = device_noise.device_normal, device_noise.device_binarize
    try:
        yield
    finally:
        noise._host_normal, noise._host_binarize = before
