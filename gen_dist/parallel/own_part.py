"""This process's part of some weights: the others have the rest (Rajbhandari et al. 2020, ZeRO, stage 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.parallel.barrier import LINE_FLOATS
from gen_dist.parallel.collectives import gathered, sum_over_processes
from gen_dist.parallel.shared_weights import flat_floats, is_count, is_dense, views_of


class Piece(NamedTuple):
    """Values `start` to `stop` of a tensor, in the order of its memory."""

    tensor: int
    """Index of the tensor."""
    start: int
    stop: int
    place: int
    """Where it begins in the chunk."""


class Chunks:
    """Flat memory of some tensors of one dtype, cut into equal chunks, one for each process.

        tensor 0 | tensor 1 | ... | padding

    Tensors and chunks begin on cache lines, and so does each piece in its tensor. Kernels that take a few values at
    once then take the same ones together as in the whole tensor, and give them the same bits.
    """

    def __init__(self, tensors: Sequence[Tensor], rank: int, world_size: int) -> None:
        """Cut dense tensors."""
        self._layouts = [torch.empty_like(one, device="meta") for one in tensors]
        self._options: dict[str, Any] = {"dtype": tensors[0].dtype, "device": tensors[0].device}
        count = flat_floats(tensors)
        size = -(-count // (LINE_FLOATS * world_size)) * LINE_FLOATS
        self.padding = size * world_size - count
        """Number of values behind the tensors."""
        self.own = slice(rank * size, (rank + 1) * size)
        """This process's chunk."""
        self.pieces: list[Piece] = []
        """Pieces of the tensors in it."""
        first = 0
        for index, tensor in enumerate(tensors):
            start, stop = max(0, self.own.start - first), min(tensor.numel(), self.own.stop - first)
            if start < stop:
                self.pieces.append(Piece(index, start, stop, max(0, first - self.own.start)))
            first += flat_floats([tensor])

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of this process's pieces of tensors of these layouts, each flat, without gradients."""
        return [_in_memory_order(tensors[one.tensor])[one.start : one.stop] for one in self.pieces]

    def gathered(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors, views of new memory, from the pieces of all processes. A collective call."""
        chunk = torch.zeros(self.own.stop - self.own.start, **self._options)
        if pieces:
            ends = [(one.place, one.place + one.stop - one.start) for one in self.pieces]
            torch._foreach_copy_([chunk[start:stop] for start, stop in ends], list(pieces))
        return views_of(gathered(chunk), self._layouts)


class OwnPart:
    """Pieces of the weights of a phase that this process updates, by buckets of gradients."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], rank: int, world_size: int) -> None:
        """`groups` are the parameters of each bucket, of one dtype."""
        self._is_main = rank == 0
        self._groups: list[list[Tensor]] = [list(group) for group in groups]
        make_dense(one for group in self._groups for one in group)
        self.chunks = [Chunks(group, rank, world_size) for group in self._groups]
        self._pieces = [
            [nn.Parameter(piece) for piece in chunks.of(group)]
            for chunks, group in zip(self.chunks, self._groups, strict=True)
        ]
        device = self._groups[0][0].device
        # A small phase may have fewer cache lines than there are processes, and an optimizer wants a parameter.
        self.updated = [piece for pieces in self._pieces for piece in pieces] or [
            nn.Parameter(torch.empty(0, device=device))
        ]
        """The pieces, flat, in the memory of the weights."""

    def take_gradients(self) -> None:
        """Let the pieces have the gradients of their weights."""
        for group, chunks, pieces in zip(self._groups, self.chunks, self._pieces, strict=True):
            for piece, place in zip(pieces, chunks.pieces, strict=True):
                gradient = group[place.tensor].grad
                piece.grad = None if gradient is None else _in_memory_order(gradient)[place.start : place.stop]

    def publish(self) -> None:
        """Give all processes the updated weights, and remove the gradients. A collective call."""
        for group, chunks, pieces in zip(self._groups, self.chunks, self._pieces, strict=True):
            with torch.no_grad():
                torch._foreach_copy_(group, chunks.gathered([piece.detach() for piece in pieces]))
            for parameter in group:
                parameter.grad = None

    def full_state(
        self, states: Mapping[Tensor, Mapping[str, Tensor | None]], index_of: Mapping[Tensor, int]
    ) -> list[tuple[int, str, Tensor]]:
        """Optimizer state of all weights, from that of the pieces, in the main process alone. A collective call.

        Args:
            states: this process's state by piece. A piece without gradients has none yet.
            index_of: index of each weight.

        Returns:
            Index of the weight, name and value on the CPU; in other processes an empty list.
        """
        found: list[tuple[int, str, Tensor]] = []
        own = {id(piece): dict(states.get(piece, {})) for pieces in self._pieces for piece in pieces}
        for name, dtype in _names_of_all(own.values()).items():
            for group, chunks, pieces in zip(self._groups, self.chunks, self._pieces, strict=True):
                values = [own[id(piece)].get(name) for piece in pieces]
                # The process with the first piece of a weight tells whether the weight has this state.
                placed = zip(chunks.pieces, values, strict=True)
                first = {place.tensor: value for place, value in placed if not place.start}
                known = _number_of_all(group, {index: 1.0 for index, value in first.items() if value is not None})
                if dtype is None:
                    both = zip(pieces, values, strict=True)
                    filled = [torch.zeros_like(piece.detach()) if value is None else value for piece, value in both]
                    whole = chunks.gathered(filled)
                else:
                    counts = {index: float(value) for index, value in first.items() if value is not None}
                    whole = [number.to(dtype) for number in _number_of_all(group, counts).unbind()]
                if self._is_main:
                    found += [
                        (index_of[parameter], name, value.to("cpu", copy=True))
                        for parameter, value, has in zip(group, whole, known.tolist(), strict=True)
                        if has
                    ]
        return sorted(found, key=lambda entry: entry[0])

    def own_state(
        self, states: Mapping[int, Mapping[str, Tensor]], index_of: Mapping[Tensor, int]
    ) -> dict[int, dict[str, Tensor]]:
        """Optimizer state of the pieces by their index, out of that of all weights by theirs."""
        mine: dict[int, dict[str, Tensor]] = {}
        groups = zip(self._groups, self.chunks, strict=True)
        places = [(group[place.tensor], place) for group, chunks in groups for place in chunks.pieces]
        for number, (parameter, place) in enumerate(places):
            for name, value in states.get(index_of[parameter], {}).items():
                if not is_count(name, value, parameter):
                    laid_out = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
                    value = _in_memory_order(laid_out)[place.start : place.stop].clone()
                mine.setdefault(number, {})[name] = value
        return mine


def make_dense(parameters: Iterable[Tensor]) -> None:
    """Lay out parameters anew whose values are not in one row of memory in an order that `Chunks` knows."""
    for parameter in parameters:
        if not is_dense(parameter):
            parameter.data = parameter.data.contiguous()


def _in_memory_order(tensor: Tensor) -> Tensor:
    """View of a dense tensor as a flat one, without gradients."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _names_of_all(states: Iterable[Mapping[str, Tensor | None]]) -> dict[str, torch.dtype | None]:
    """Names of the state in any process, with the dtype of counts; None for what each value has. A collective call."""
    own = {
        name: str(value.dtype).removeprefix("torch.") if value.ndim == 0 else None
        for state in states
        for name, value in state.items()
        if value is not None
    }
    of_all: list[dict[str, str | None]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    merged = {name: dtype for of_one in of_all for name, dtype in of_one.items()}
    return {name: None if dtype is None else getattr(torch, dtype) for name, dtype in merged.items()}


def _number_of_all(group: Sequence[Tensor], numbers: Mapping[int, float]) -> Tensor:
    """One number for each tensor, float64, each of which one process has; 0 if none has it. A collective call."""
    values = torch.zeros(len(group), dtype=torch.float64)
    for index, number in numbers.items():
        values[index] = number
    return sum_over_processes(values.to(group[0].device)).cpu()
