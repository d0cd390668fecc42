"""A thread that begins to gather micro-batches ahead of training, for sets that do not fit in the device's memory."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

MICRO_BATCHES_AHEAD = 4
_SECONDS_BETWEEN_LOOKS = 0.5

Place = tuple[int, int]
"""Step, and number of the micro-batch within it."""


class Gathering(Protocol):
    """A micro-batch that is being gathered, by this thread or others."""

    def result(self) -> tuple[Tensor, Tensor]:
        """Images and labels, as soon as they are there.

        Raises:
            Exception: the error of gathering them.
        """

    def wait(self, seconds: float) -> bool:
        """Return True once `result` need not wait, or False after this time."""

    def cancel(self) -> None:
        """Do no more work for them: nobody will ask for the result."""


class Gathered(NamedTuple):
    """A micro-batch that is there."""

    images: Tensor
    labels: Tensor

    def result(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return self

    def wait(self, seconds: float) -> bool:
        """True."""
        return True

    def cancel(self) -> None:
        """Nothing is left to do."""


class Prefetcher:
    """Thread that gathers a few micro-batches ahead of the last one taken."""

    def __init__(
        self, begin: Callable[[Place], Gathering], following: Callable[[Place], Place], ahead: int = MICRO_BATCHES_AHEAD
    ) -> None:
        """
        Args:
            begin: starts to gather a micro-batch, or gathers it; called in the thread. Several are under way at a time,
                so that threads which decode need not wait for the last image of one before they begin the next.
            following: returns the place after this one in training.
            ahead: micro-batches that are gathered ahead.
        """
        self._begin = begin
        self._following = following
        self._ahead = ahead
        self._changed = threading.Condition()
        self._ready: collections.deque[Gathering | Exception] = collections.deque()
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
        batch = self.take_unless(threading.Event(), place)
        assert batch is not None
        return batch

    def take_unless(self, stop: threading.Event, place: Place) -> tuple[Tensor, Tensor] | None:
        """As `take`; None if the event is set before the micro-batch is there."""
        with self._changed:
            if place != self._expected:
                self._discard()
                self._next = place
                self._jumps += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._closed)
            if self._closed:
                raise RuntimeError("these batches were closed")
            batch = self._ready.popleft()
            self._expected = self._following(place)
            self._changed.notify_all()
        try:
            if isinstance(batch, Exception):
                raise batch
            while not batch.wait(_SECONDS_BETWEEN_LOOKS):
                if stop.is_set():
                    batch.cancel()
                    self._expected = None
                    return None
            return batch.result()
        except Exception:
            self._expected = None  # the same place again is another try
            raise

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        with self._changed:
            self._closed = True
            self._discard()
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
            batch: Gathering | Exception
            try:
                batch = self._begin(place)
            except Exception as error:
                # Raised again in `take`; until the next jump there is nothing more to gather.
                batch = error
            with self._changed:
                if jumps == self._jumps:
                    self._ready.append(batch)
                    self._next = None if isinstance(batch, Exception) else self._following(place)
                    self._changed.notify_all()
                elif not isinstance(batch, Exception):
                    batch.cancel()

    def _discard(self) -> None:
        """Forget what was gathered. Called with the lock."""
        for batch in self._ready:
            if not isinstance(batch, Exception):
                batch.cancel()
        self._ready.clear()

    def _has_work(self) -> bool:
        return self._next is not None and len(self._ready) < self._ahead
