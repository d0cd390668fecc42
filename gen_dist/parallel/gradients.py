"""Averaging of gradients over all processes, and the choice of the weights that each process updates.

Each phase has one `Reduction`. The base class is that of a single process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.parallel.shared_weights import SharedWeights, flat_floats, views_of

State = dict[str, Tensor]
"""State of an optimizer for one parameter, by name."""


class Reduction:
    """Gradients of a single process, which are those of the run."""

    needs_all = False
    """True if each process has to have a gradient of every parameter: the weights of the processes would part where
    one has none, or memory of an earlier step would be averaged."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """`parameters` are what the phase trains."""
        self.parameters = list(parameters)
        self.updated: list[nn.Parameter] = self.parameters
        """Parameters that this process's optimizer updates."""

    def last_backward(self) -> contextlib.AbstractContextManager[object]:
        """Context manager for the last backward pass of a turn, in which gradients may already be sent."""
        return contextlib.nullcontext()

    def average(self) -> None:
        """Average the gradients of `updated` over all processes, after the last backward pass."""

    def norm(self) -> Tensor:
        """L2 norm of the averaged gradients of all parameters, float32 [], the same in every process."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def publish(self) -> None:
        """Make this process's updates visible to all processes, after the optimizer's step."""

    def full_state(self, states: Mapping[Tensor, Mapping[str, Tensor | None]]) -> list[tuple[int, str, Tensor]]:
        """Collect optimizer state of all parameters as (index of the parameter, name, value). A collective call.

        Other processes than the main one may get none of it.

        Args:
            states: state that this process's optimizer has for `updated`.
        """
        return [
            (index, name, value)
            for index, parameter in enumerate(self.parameters)
            for name, value in states.get(parameter, {}).items()
            if value is not None
        ]

    def own_state(self, states: dict[int, State]) -> dict[int, State]:
        """Select the optimizer state of `updated` by index, from that of all parameters by index."""
        return states


class FlatReduction(Reduction):
    """Gradients in flat buckets. One all-reduce sums a bucket, as soon as backward has computed all of its gradients.

    Buckets take the parameters from the last to the first, about the order in which backward computes the gradients.
    They are filled and sent in this order in every process and at every step. An order that the first backward pass
    teaches would change the order of sums in mid-run, and a resumed run would have other bits.

    The collectives are functional ones, and the host waits for none of them on a GPU, so a turn can be recorded. NCCL
    has a stream of its own, which waits for the bucket; `average` has the current stream wait for NCCL's.
    """

    needs_all = True

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int | None) -> None:
        """Make the buckets.

        Args:
            parameters: parameters that the phase trains, equal in all processes.
            bucket_bytes: size at which a bucket is full. None makes one bucket of each dtype, which `average` sends:
                threads that send take cores from those that compute, so overlap saves no time on CPUs.
        """
        super().__init__(parameters)
        group = dist.group.WORLD
        assert group is not None
        self._group_name = group.group_name
        self._buckets = [self._make_bucket(one) for one in in_buckets(self.parameters[::-1], bucket_bytes)]
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._sent = 0
        self._sends_early = False
        if bucket_bytes is not None:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._computed)

    @contextlib.contextmanager
    def last_backward(self) -> Iterator[None]:
        """See Reduction."""
        for bucket in self._buckets:
            bucket.awaited = len(bucket.parameters)
        self._sends_early = True
        try:
            yield
        finally:
            self._sends_early = False

    def average(self) -> None:
        """See Reduction. The gradients are views of the buckets."""
        while self._sent < len(self._buckets):
            self._send_next()
        self._sent = 0
        self._take_sums()

    def _make_bucket(self, parameters: Sequence[nn.Parameter]) -> Bucket:
        return Bucket(parameters)

    def _computed(self, parameter: Tensor) -> None:
        """Hook of backward: the gradient of a parameter is complete. Send the buckets whose turn it is."""
        if self._sends_early:  # not before the last micro-batch, nor in the turn of another phase with this weight
            self._bucket_of[parameter].awaited -= 1  # type: ignore[index]
            while self._sent < len(self._buckets) and self._buckets[self._sent].awaited == 0:
                self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._sent]
        bucket.fill()
        self._send(bucket)
        self._sent += 1

    def _send(self, bucket: Bucket) -> None:
        torch.ops._c10d_functional.all_reduce_(bucket.gradients, "sum", self._group_name)

    def _take_sums(self) -> None:
        """Wait for the sums of all buckets, and make them means."""
        sums = [torch.ops._c10d_functional.wait_tensor(bucket.gradients) for bucket in self._buckets]
        torch._foreach_mul_(sums, 1.0 / dist.get_world_size())


class Bucket:
    """Flat memory for the gradients of some parameters of one dtype."""

    def __init__(self, parameters: Sequence[nn.Parameter], more: int = 0) -> None:
        """`more` is the number of values behind the gradients."""
        self.parameters = list(parameters)
        first, count = parameters[0], flat_floats(parameters)
        self.flat = torch.zeros(count + more, dtype=first.dtype, device=first.device)
        self.gradients = self.flat[:count]
        self.views = views_of(self.flat, parameters)
        """Places of the parameters' gradients in `flat`, in their shapes."""
        self.awaited = 0
        """Number of gradients that the current backward pass has not computed yet."""

    def fill(self) -> None:
        """Copy the gradients into the bucket; `grad` becomes a view of it."""
        torch._foreach_copy_(self.views, [one.grad for one in self.parameters if one.grad is not None])
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view


def in_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int | None) -> list[list[nn.Parameter]]:
    """Cut parameters into buckets of one dtype each, in their order. A bucket is full once it has so many bytes."""
    full: list[list[nn.Parameter]] = []
    filling: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        bucket = filling.setdefault(parameter.dtype, [])
        bucket.append(parameter)
        if bucket_bytes is not None and sum(one.nbytes for one in bucket) >= bucket_bytes:
            full.append(filling.pop(parameter.dtype))
    return full + list(filling.values())


class SharedReduction(Reduction):
    """Weights and gradients in shared memory of one host. Each process updates a part of the weights."""

    needs_all = True

    def __init__(self, parameters: Sequence[nn.Parameter], shared: SharedWeights) -> None:
        super().__init__(parameters)
        self._shared = shared
        self.updated = list(shared.pieces)

    def average(self) -> None:
        """See Reduction."""
        self._shared.average_gradients()

    def norm(self) -> Tensor:
        """See Reduction."""
        return self._shared.gradient_norm()

    def publish(self) -> None:
        """See Reduction."""
        self._shared.barrier.wait()  # no process reads weights before all parts are updated

    def full_state(self, states: Mapping[Tensor, Mapping[str, Tensor | None]]) -> list[tuple[int, str, Tensor]]:
        """See Reduction."""
        return self._shared.state_of_all(states)

    def own_state(self, states: dict[int, State]) -> dict[int, State]:
        """See Reduction."""
        return self._shared.state_of_pieces(states) if states else {}
