"""Images that are kept encoded, and decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.decoding import decode_image
from gen_dist.data.deep_files import Keeping
from gen_dist.data.fitting import Fitting
from gen_dist.data.packing import THREADS
from gen_dist.errors import DataError

_LEAST_PER_TASK = 4
_REDUCED = Keeping()


class EncodedImages(Protocol):
    """Encoded images by their rows, for several threads at once."""

    @property
    def waits_for_servers(self) -> bool:
        """True if images may have to come from other machines."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """Encoded image of a row.

        Raises:
            DataError: it cannot be read.
        """

    def name(self, row: int) -> str:
        """Name of an image in error messages."""

    def instead_of(self, row: int, reason: str) -> Iterator[int]:
        """Rows whose images may stand for a damaged one, a function of the row.

        Raises:
            DataError: damaged images are an error.
        """

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Begin to fetch images that will be read soon."""

    def interrupt(self, ended: bool) -> None:
        """End the waiting of threads for images with an error, or let them wait again."""


class DecodingImages:
    """Images that threads are decoding."""

    def __init__(self, tasks: list[Future[None]], taken: NDArray[np.int64], interrupt: Callable[[bool], None]) -> None:
        """
        Args:
            tasks: work of the threads.
            taken: rows whose images these are, once all tasks are done.
            interrupt: ends the waiting of threads for images.
        """
        self._tasks = tasks
        self._taken = taken
        self._interrupt = interrupt

    def result(self) -> NDArray[np.int64]:
        """Wait for the images, and return the rows whose images they are.

        Raises:
            DataError: images cannot be read or decoded.
        """
        try:
            for task in self._tasks:
                task.result()
        except BaseException:
            self.cancel()
            self._interrupt(True)  # others may wait for a server, and the end of the program for them
            raise
        return self._taken

    def wait(self, seconds: float) -> bool:
        """Return True once all tasks are done or one failed, False after this time."""
        done, waiting = wait(self._tasks, seconds, FIRST_EXCEPTION)
        return not waiting or any(task.exception() for task in done)

    def cancel(self) -> None:
        """Begin no more tasks."""
        for task in self._tasks:
            task.cancel()


class ImagesOnDemand:
    """Images [N, C, H, W], indexed like an array: by a number, a slice or an array of rows. Each result is a copy."""

    def __init__(
        self,
        encoded: EncodedImages,
        fitting: Fitting | None,
        shape: Sequence[int],
        dtype: str = "uint8",
        keeping: Keeping = _REDUCED,
        *,
        reduces_colour: bool = False,
    ) -> None:
        """
        Args:
            encoded: the images.
            fitting: size that they are brought to. None refuses those of another size than that of `shape`.
            shape: (C, H, W) of all images.
            dtype: type of their values.
            keeping: parts of them that decoding keeps.
            reduces_colour: True to make gray of coloured images if `shape` has one channel; they are refused otherwise.
        """
        self.shape: tuple[int, ...] = (len(encoded), *shape)
        self.dtype = np.dtype(dtype)
        self._encoded = encoded
        self._fitting = fitting
        self._keeping = keeping
        self._reduces_colour = reduces_colour
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Values of all images."""
        return self.nbytes // self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all images when they are decoded."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def __getitem__(self, rows: int | slice | NDArray[np.int64]) -> NDArray[Any]:
        """Images [C, H, W] or [n, C, H, W].

        Raises:
            DataError: they cannot be read or decoded.
            IndexError: there are no such rows.
        """
        count = len(self)  # of which no table is made: there may be a billion
        places = np.arange(*rows.indices(count)) if isinstance(rows, slice) else np.asarray(rows)
        places = np.flatnonzero(places) if places.dtype == bool else np.where(places < 0, places + count, places)
        if places.size and not 0 <= places.min() <= places.max() < count:
            raise IndexError(f"rows {places.min()} to {places.max()} of {count:,} images")
        out = np.empty((places.size, *self.shape[1:]), self.dtype)
        self.gather(places.reshape(-1), out)
        return out if places.ndim else out[0]

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any]) -> NDArray[np.int64]:
        """Decode images by several threads.

        Args:
            rows: int64 [n].
            out: [n, C, H, W] of the images' dtype, written to.

        Returns:
            int64 [n], the rows whose images these are: others where an image is damaged.

        Raises:
            DataError: images cannot be read or decoded.
        """
        return self.begin(rows, out).result()

    def begin(self, rows: NDArray[np.int64], out: NDArray[Any]) -> DecodingImages:
        """Begin to decode images by several threads, which first do what was begun before.

        Args:
            rows, out: as for `gather`.
        """
        taken = rows.astype(np.int64)

        def decode(first: int) -> None:
            of_task = slice(first, first + size)
            self._decode_some(rows[of_task], out[of_task], taken[of_task])

        size = self._task_size(len(rows))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="gen_dist-decode")
        tasks = [self._pool.submit(decode, first) for first in range(0, len(rows), size or 1)]
        return DecodingImages(tasks, taken, self.interrupt)

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Begin to fetch images that will be asked for soon."""
        self._encoded.expect(rows)

    @property
    def waits_for_servers(self) -> bool:
        """True if images may have to come from other machines."""
        return self._encoded.waits_for_servers

    def interrupt(self, ended: bool) -> None:
        """End the waiting of threads for images with an error, or let them wait again."""
        self._encoded.interrupt(ended)

    def _task_size(self, count: int) -> int:
        """Images that one task decodes, of a batch of `count`."""
        # Some for each thread, since images differ. The last task of a batch keeps no thread waiting if one follows.
        return max(_LEAST_PER_TASK, -(-count // (4 * THREADS)))

    def _decode_some(self, rows: NDArray[np.int64], out: NDArray[Any], taken: NDArray[np.int64]) -> None:
        """Decode the images of one task into `out`, and write the rows whose images they are into `taken`."""
        for place, row in enumerate(rows.tolist()):
            taken[place] = self._decode(row, out[place])

    def _decode(self, row: int, out: NDArray[Any]) -> int:
        """Write the image of a row, or else that of the first readable row that may stand for it; return which."""
        try:
            self._decode_one(row, out)
            return row
        except UnreadableImage as error:
            for other in self._encoded.instead_of(row, str(error)):
                try:
                    self._decode_one(other, out)
                    return other
                except UnreadableImage:
                    continue
        raise DataError(f"{self._encoded.name(row)} is damaged, and so are all that may stand for it")

    def _decode_one(self, row: int, out: NDArray[Any]) -> None:
        channels, height, width = self.shape[1:]
        wanted = channels if channels in (1, 3) else None
        found = decode_image(self._encoded.read(row), self._fitting, wanted, self._keeping, out)
        if found.pixels.dtype != self.dtype:
            both = f"is {found.pixels.dtype}, and others are {self.dtype}"
            raise DataError(f"{self._encoded.name(row)} {both}; reduce all: --dtype uint8")
        if found.pixels.shape != out.shape:
            shape = f"{found.pixels.shape[2]}x{found.pixels.shape[1]}"
            raise DataError(
                f"{self._encoded.name(row)} is {shape}, and others are {width}x{height}; say which size all get with "
                "--image-size"
            )
        if channels == 1 and not (found.gray or self._reduces_colour):
            raise DataError(
                f"{self._encoded.name(row)} has colours, and the images looked at first are gray; say --channels 1 or 3"
            )
        if found.pixels is not out:
            out[...] = found.pixels
