"""The device's work of a step recorded as a CUDA graph and replayed: one launch a step in place of hundreds.

On a GPU a step of the nets here takes the host longer to launch than the device to compute. A graph is launched as one
thing. It holds memory addresses and numbers: whatever changes from step to step has to stand in tensors that are
written before each replay.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.objectives import Batch
from gen_dist.parallel.processes import Processes

T = TypeVar("T")
Logs = dict[str, Tensor]
Work = Callable[[list[Batch]], Logs]
"""What the device does of micro-batches."""

WARM_UP_STEPS = 2
"""Steps of each kind before it is recorded: they compile kernels and make state, which no recording can hold."""


class Recorder(Protocol):
    """Records what a function has a device do."""

    def warm_up(self, work: Callable[[], T]) -> T:
        """Call a function that is to be recorded later, where it will be."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record a function's work without doing it: the tensors it returns, and what does it and so fills them.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records as CUDA graphs, whose memory they share: of them, one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], T]) -> T:
        """On the stream of the recordings: autograd and libraries keep things for each stream."""
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            result = work()
        before.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """See Recorder."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # The thread that gathers batches allocates memory meanwhile, which is no error of this one.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError:
            # Ending the recording failed as well, so that torch stays on its stream, and its generator takes every draw
            # from now on for one of the recording.
            torch.cuda.set_stream(before)
            generator = torch.cuda.default_generators[self._stream.device.index]
            with contextlib.suppress(RuntimeError):
                generator.graphsafe_set_state(generator.clone_state())
            raise
        return result, graph.replay


def choose_recording(config: TrainConfig, processes: Processes, dtype: torch.dtype) -> RecordedSteps | None:
    """Recordings of a run's steps; None if its steps cannot be recorded.

    The host looks at scaled gradients, and gradients of several processes travel: neither can be part of a recording.
    """
    on_one_gpu = processes.device.type == "cuda" and processes.world_size == 1
    if not config.cuda_graphs or not on_one_gpu or dtype == torch.float16:
        return None
    return RecordedSteps(functools.partial(CudaRecorder, processes.device))


class RecordedSteps:
    """Runs the work of steps: the first of each kind as it is, the others from a recording.

    A kind of step is whatever decides which operations there are, such as the phases that are due.
    """

    def __init__(self, make_recorder: Callable[[], Recorder]) -> None:
        self._make_recorder = make_recorder
        self._recorder = make_recorder()
        self._recorded: dict[Hashable, _Recording] = {}
        self._seen: Counter[Hashable] = Counter()

    def run(self, kind: Hashable, micro_batches: list[Batch], work: Work) -> Logs:
        """The logs of `work(micro_batches)`, which has to be the same work for all steps of a kind.

        Raises:
            ConfigError: the work cannot be recorded, as where the host waits for a result in the midst of it.
        """
        graph = self._recorded.get(kind)
        if graph is None:
            self._seen[kind] += 1
            if self._seen[kind] <= WARM_UP_STEPS:
                return self._recorder.warm_up(lambda: work(micro_batches))
            graph = self._recorded[kind] = _Recording(self._recorder, micro_batches, work)
        return graph.replay(micro_batches)

    def forget(self) -> None:
        """Record anew: tensors of the state may have other addresses from now on."""
        self._recorded.clear()
        self._seen.clear()
        self._recorder = self._make_recorder()  # memory that recordings shared goes with the last of them


class _Recording:
    """A recording, the micro-batches that it reads and the logs that it writes."""

    def __init__(self, recorder: Recorder, micro_batches: Sequence[Batch], work: Work) -> None:
        self._micro_batches = [
            batch._replace(images=batch.images.clone(), labels=batch.labels.clone()) for batch in micro_batches
        ]
        try:
            self._logs, self._replay = recorder.record(lambda: _StackedLogs(work(list(self._micro_batches))))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # What the work did stands behind the end of the recording, which fails for it.
            reason = " ".join(str(error.__context__ or error).split("\n")[0].split())
            raise ConfigError(
                f"a step of this objective cannot be recorded as a CUDA graph: {reason}; use --no-cuda-graphs"
            ) from error

    def replay(self, micro_batches: Sequence[Batch]) -> Logs:
        for own, batch in zip(self._micro_batches, micro_batches, strict=True):
            own.images.copy_(batch.images)
            own.labels.copy_(batch.labels)
        self._replay()
        return self._logs.copied()


class _StackedLogs:
    """Logs in one tensor for each shape, so that few copies keep them from what the next step writes."""

    def __init__(self, logs: Logs) -> None:
        alike: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
        for name, value in logs.items():
            alike.setdefault((value.shape, value.dtype), []).append(name)
        self._order = list(logs)
        self._names = list(itertools.chain.from_iterable(alike.values()))
        self._stacks = [torch.stack([logs[name] for name in names]) for names in alike.values()]

    def copied(self) -> Logs:
        values = itertools.chain.from_iterable(stack.clone().unbind() for stack in self._stacks)
        copies = dict(zip(self._names, values, strict=True))
        return {name: copies[name] for name in self._order}
