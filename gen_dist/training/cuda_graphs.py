"""Steps recorded as CUDA graphs and replayed: one launch a step in place of hundreds.

On a GPU, the host takes longer to launch a step of a small network than the device takes to compute it. A graph needs
one launch. It contains memory addresses and constants, so everything that changes from step to step has to be in
tensors that are written before each replay.
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
from gen_dist.errors import ConfigError, is_out_of_memory
from gen_dist.objectives import Batch
from gen_dist.parallel.collectives import collectives_are_recordable
from gen_dist.parallel.processes import Processes

T = TypeVar("T")
Logs = dict[str, Tensor]
Work = Callable[[list[Batch]], Logs]
"""The device's work on the micro-batches of a step."""

WARM_UP_STEPS = 2
"""Steps of each kind before it is recorded: they compile kernels and make state, which cannot be recorded. NCCL
connects the processes at the first."""


class Recorder(Protocol):
    """Recorder of the device's work in a function."""

    def warm_up(self, work: Callable[[], T]) -> T:
        """Call a function as `record` will call it, without recording it."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record a function's work without doing it.

        Returns:
            The tensors that the function returns, and a function that does the work and so fills them.

        Raises:
            RuntimeError: the work cannot be recorded.
        """
        ...


class CudaRecorder:
    """Recorder of CUDA graphs. They share memory, since one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], T]) -> T:
        """Call it on the stream of the recordings: autograd and libraries keep state for each stream."""
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
            # Meanwhile the thread that gathers batches allocates memory, and NCCL's watchdog asks for events. Neither
            # must be an error of this thread.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError:
            # The end of the recording failed as well, so torch stays on its stream, and the generator counts every
            # later draw as part of the recording.
            torch.cuda.set_stream(before)
            generator = torch.cuda.default_generators[self._stream.device.index]
            with contextlib.suppress(RuntimeError):
                generator.graphsafe_set_state(generator.clone_state())
            raise
        return result, graph.replay


def choose_recording(config: TrainConfig, processes: Processes, dtype: torch.dtype) -> RecordedSteps | None:
    """Make the recorder of a run's steps; None if its steps cannot be recorded.

    The host reads scaled gradients, and sends those of several processes unless NCCL does: neither can be part of a
    recording, nor can the threads of shards. NCCL wants a graph of each process or of none, and replays in one order.
    So it is here: the kind of a step, its warm-up and its recording follow from its number alone.
    """
    on_gpu = processes.device.type == "cuda"
    if not (config.cuda_graphs and on_gpu and collectives_are_recordable(processes)):
        return None
    if dtype == torch.float16 or config.shards:
        return None
    return RecordedSteps(functools.partial(CudaRecorder, processes.device))


class RecordedSteps:
    """Steps of a run: the first of each kind run directly, the others from a recording.

    The kind of a step determines its operations. An example is the set of phases that are due.
    """

    def __init__(self, make_recorder: Callable[[], Recorder]) -> None:
        self._make_recorder = make_recorder
        self._recorder = make_recorder()
        self._recorded: dict[Hashable, _Recording] = {}
        self._seen: Counter[Hashable] = Counter()

    def run(self, kind: Hashable, micro_batches: list[Batch], work: Work) -> Logs:
        """Return the logs of `work(micro_batches)`, which has to be the same work for all steps of a kind.

        Raises:
            ConfigError: the work cannot be recorded, e.g. because the host waits for a result within it.
        """
        graph = self._recorded.get(kind)
        if graph is None:
            self._seen[kind] += 1
            if self._seen[kind] <= WARM_UP_STEPS:
                return self._recorder.warm_up(lambda: work(micro_batches))
            graph = self._recorded[kind] = _Recording(self._recorder, micro_batches, work)
        return graph.replay(micro_batches)

    def forget(self) -> None:
        """Discard all recordings, since tensors of the state may have new addresses."""
        self._recorded.clear()
        self._seen.clear()
        self._recorder = self._make_recorder()  # the last recording frees the memory that they share


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
            # An error in the work makes the end of the recording fail, too; the context has the first error.
            first = error.__context__ or error
            if isinstance(first, RuntimeError) and is_out_of_memory(first):
                raise first from None  # with smaller micro-batches it may be recorded
            reason = " ".join(str(first).split("\n")[0].split())
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
    """Logs in one tensor for each shape and dtype, so that few copies save them from the next step's writes."""

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
