"""A thread that gathers micro-batches ahead of training, for sets that do not fit in the memory of the device."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from torch import Tensor

_PREFETCHED_MICRO_BATCHES = 4

Place = tuple[int, int]
"""Step, and number of the micro-batch within it."""


class Prefetcher:
    """Thread that gathers a few micro-batches ahead of the last one taken."""

    def __init__(self, gather: Callable[[Place], tuple[Tensor, Tensor]], following: Callable[[Place], Place]) -> None:
        """
        Args:
            gather: returns the images and labels of a micro-batch; called in the thread.
            following: returns the place after this one in training.
        """
        self._gather = gather
        self._following = following
        self._changed = threading.Condition()
        self._ready: collections.deque[tuple[Tensor, Tensor] | Exception] = collections.deque()
        self._closed = False
        # Next places of `take` and of the thread. A change of `_jumps` makes the thread discard what it is gathering.
        self._expected: Place | None = None
        self._next: Place | None = None
        self._jumps = 0
        self._thread = threading.Thread(target=self._run, name="gen_dist-prefetch", daemon=True)
        self._thread.start()

    def take(self, place: Place) -> tuple[Tensor, Tensor]:
        """Return the micro-batch at a place. A jump, i.e. any place but the following one, waits for its gathering.

        Raises:
            RuntimeError: after `close`.
            Exception: the error of gathering this micro-batch.
        """
        with self._changed:
            if place != self._expected:
                self._ready.clear()
                self._next = place
                self._jumps += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._closed)
            if self._closed:
                raise RuntimeError("these batches were closed")
            batch = self._ready.popleft()
            self._expected = self._following(place)
            self._changed.notify_all()
            if isinstance(batch, Exception):
                self._expected = None
                raise batch
            return batch

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_work())
                if self._closed:
                    return
                place, jumps = self._next, self._jumps
                assert place is not None
            batch: tuple[Tensor, Tensor] | Exception
            try:
                batch = self._gather(place)
            except Exception as error:
                # Raised again in `take`; until the next jump there is nothing more to gather.
                batch = error
            with self._changed:
                if jumps == self._jumps:
                    self._ready.append(batch)
                    self._next = None if isinstance(batch, Exception) else self._following(place)
                    self._changed.notify_all()

    def _has_work(self) -> bool:
        return self._next is not None and len(self._ready) < _PREFETCHED_MICRO_BATCHES
