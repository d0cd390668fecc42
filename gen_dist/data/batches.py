"""Choice of the images of a step, as a function of (seed, step), and the batches of one process with them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gen_dist.data.batch_memory import BatchMemory
from gen_dist.data.dataset import Split
from gen_dist.data.on_demand import DecodingImages, ImagesOnDemand
from gen_dist.data.prefetching import MICRO_BATCHES_AHEAD, Gathered, Gathering, Place, Prefetcher
from gen_dist.data.shard_order import ShardOrder
from gen_dist.data.subsets import keyed_permutation
from gen_dist.errors import DataError, number_of
from gen_dist.randomness import Stream

# Images that are fetched ahead of training: some seconds of most networks, and a part of a window of shards.
_IMAGES_EXPECTED = 2048


class TrainBatches:
    """The micro-batches of one rank, as a function of the step.

    The images are held on the device if they fit the budget. Otherwise a thread prefetches micro-batches from
    the map; requesting a step out of order is allowed and only costs the wait for it.

    Raises:
        DataError: the split has fewer images than one global batch.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        global_batch_size: int,
        micro_batches: Sequence[tuple[int, int]],
        device: torch.device,
        resident_budget_bytes: int,
    ) -> None:
        """
        Args:
            split: images and labels.
            seed: key of the order.
            global_batch_size: images per step over all ranks.
            micro_batches: (first row within the global batch, rows) of each micro-batch of this rank.
            device: where batches are wanted.
            resident_budget_bytes: sets of at most this size are held on the device.
        """
        count = len(split.labels)
        if count < global_batch_size:
            raise DataError(
                f"{split.name} has {number_of(count, 'image')}, fewer than the {global_batch_size:,} of a batch; "
                f"use --global-batch-size {count} or less"
            )
        self._count = count
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batches = list(micro_batches)
        self._pinned = device.type == "cuda"
        # `cuda` alone would be device 0 in the prefetching thread.
        bare_cuda = self._pinned and device.index is None
        self._device = torch.device("cuda", torch.cuda.current_device()) if bare_cuda else device
        self._split = split
        self._prefetcher: Prefetcher | None = None
        self._fetched: dict[Place, tuple[Tensor, Tensor]] = {}
        self._orders: dict[int, Tensor] = {}
        self._memory = BatchMemory()
        self._dtype = split.scale.torch_dtype
        self._label_dtype = torch.from_numpy(split.labels[:0]).dtype
        # 8-bit images go to the model as they are.
        self._for_model = _as_they_are if split.scale.is_plain else split.scale.for_model
        self._order = None if split.counts is None else ShardOrder(split.counts, seed)
        self._expected: Place | None = None
        if split.on_demand:
            split.on_demand.interrupt(False)
            # `fetch` takes all of a step at once: those of the next step are decoded while it computes.
            of_step = len(self._micro_batches) if split.on_demand.waits_for_servers else 0
            self._prefetcher = Prefetcher(self._begin, self.following, max(MICRO_BATCHES_AHEAD, of_step))
        elif split.images.nbytes + split.labels.nbytes <= resident_budget_bytes:
            # On the CPU `copy` reads the map into memory once, so that no page fault stalls a step.
            self._images = torch.from_numpy(split.images).to(self._device, copy=True)
            self._gatherable = self._images.view(torch.int16) if split.scale.dtype == "uint16" else self._images
            self._labels = torch.from_numpy(split.labels).to(self._device, copy=True)
        else:
            self._prefetcher = Prefetcher(self._begin, self.following)

    @property
    def resident(self) -> bool:
        """True if the images are held on the device."""
        return self._prefetcher is None

    def micro_batch(self, step: int, index: int) -> tuple[Tensor, Tensor]:
        """Images and labels of one micro-batch, on the device. Labels are as the split has them.

        Images are uint8 [rows, C, H, W], or float32 in 0..255 for values other than 8-bit ones.

        Raises:
            RuntimeError: after `close`.
            Exception: the error of gathering this micro-batch, such as OSError.
        """
        if self._prefetcher is not None:
            found = self._fetched.pop((step, index), None)
            images, labels = self._prefetcher.take((step, index)) if found is None else found
            return self._for_model(self._to_device(images)), self._to_device(labels)
        place = step, index
        indices = self._indices_on_device(place) if self._pinned else torch.from_numpy(self._indices(place))
        # Devices gather few types: unsigned numbers of 16 bits take the way of signed ones.
        gathered = self._gatherable.index_select(0, indices).view(self._images.dtype)
        return self._for_model(gathered), self._labels.index_select(0, indices)

    @property
    def waits_for_servers(self) -> bool:
        """True if images may have to come from other machines."""
        return self._split.on_demand is not None and self._split.on_demand.waits_for_servers

    def fetch(self, step: int, stop: threading.Event) -> None:
        """Wait until the micro-batches of a step of `on_demand` images are there, or the event is set.

        Raises:
            Exception: the error of gathering one.
        """
        assert self._prefetcher is not None
        for index in range(len(self._micro_batches)):
            batch = self._prefetcher.take_unless(stop, (step, index))
            if batch is None:
                return
            self._fetched[step, index] = batch

    def close(self) -> None:
        """Stop the thread. Harmless when there is none or it has stopped."""
        if self._prefetcher is None:
            return
        if self._split.on_demand:  # their server may be gone, and the thread wait for it
            self._split.on_demand.interrupt(True)
        self._prefetcher.close()

    def following(self, place: Place) -> Place:
        """The micro-batch after this one in training."""
        step, index = place
        return (step, index + 1) if index + 1 < len(self._micro_batches) else (step + 1, 0)

    def gather(self, place: Place) -> tuple[Tensor, Tensor]:
        """Values and labels of one micro-batch, pinned for asynchronous copies to CUDA."""
        if self._split.on_demand:
            return self._begin(place).result()
        indices = self._indices(place)
        images, labels = self._empty(len(indices))
        # NumPy gathers in this thread alone and without the GIL; torch would start a second set of OpenMP threads
        # beside the training's. `clip` (no index is out of range) is the mode that writes to `out` without a copy.
        np.take(self._split.images, indices, axis=0, out=images.numpy(), mode="clip")
        np.take(self._split.labels, indices, axis=0, out=labels.numpy(), mode="clip")
        return images, labels

    def _begin(self, place: Place) -> Gathering:
        """Begin to decode a micro-batch, or gather it from the map."""
        on_demand = self._split.on_demand
        if on_demand is None:
            return Gathered(*self.gather(place))
        self._expect(on_demand, place)
        indices = self._indices(place)
        images, labels = self._empty(len(indices))
        return _Decoding(on_demand.begin(indices, images.numpy()), images, labels, self._split.labels)

    def _empty(self, count: int) -> tuple[Tensor, Tensor]:
        """Memory for a micro-batch."""
        shapes = (count, *self._split.images.shape[1:]), (count, *self._split.labels.shape[1:])
        if not self._pinned:
            return self._memory.empty(shapes[0], self._dtype), self._memory.empty(shapes[1], self._label_dtype)
        with torch.cuda.device(self._device):  # without it, pinned memory makes every rank's thread open device 0
            images = torch.empty(shapes[0], dtype=self._dtype, pin_memory=True)
            return images, torch.empty(shapes[1], dtype=self._label_dtype, pin_memory=True)

    def _indices_on_device(self, place: Place) -> Tensor:
        """Indices of a micro-batch, cut from epoch orders on the device: a step copies nothing from the host."""
        step, index = place
        first_row, rows = self._micro_batches[index]
        wanted = spans(self._count, step * self._global_batch_size + first_row, rows)
        parts = [self._order_on_device(epoch)[span] for epoch, span in wanted]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _order_on_device(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            order = torch.tensor(epoch_order(self._count, self._seed, epoch))
            for old in list(self._orders)[:-1]:  # two are kept: a batch may straddle epochs
                del self._orders[old]
            self._orders[epoch] = self._to_device(order.pin_memory() if self._pinned else order)
        return self._orders[epoch]

    def _indices(self, place: Place) -> NDArray[np.int64]:
        step, index = place
        first_row, rows = self._micro_batches[index]
        if self._order is not None:
            return self._order.images(step * self._global_batch_size + first_row, rows)
        return image_indices(self._count, self._seed, step, self._global_batch_size, first_row, rows)

    def _expect(self, images: ImagesOnDemand, place: Place) -> None:
        """Have images of the next micro-batches fetched, each once unless training jumps."""
        rows = self._micro_batches[place[1]][1]
        ahead, end = self._expected, place
        for _ in range(max(1, _IMAGES_EXPECTED // max(rows, 1))):
            end = self.following(end)
        if ahead is None or not place < ahead <= end:
            ahead = place
        while ahead < end:
            images.expect(self._indices(ahead))
            ahead = self.following(ahead)
        self._expected = ahead

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


class _Decoding(NamedTuple):
    """A micro-batch that threads are decoding."""

    images_decoded: DecodingImages
    images: Tensor
    labels: Tensor
    all_labels: NDArray[Any]

    def result(self) -> tuple[Tensor, Tensor]:
        """Images and labels; those of the images that stand for damaged ones."""
        np.take(self.all_labels, self.images_decoded.result(), axis=0, out=self.labels.numpy(), mode="clip")
        return self.images, self.labels

    def wait(self, seconds: float) -> bool:
        """Return True once they are there, or an image failed; False after this time."""
        return self.images_decoded.wait(seconds)

    def cancel(self) -> None:
        """Decode no more of them."""
        self.images_decoded.cancel()


def _as_they_are(images: Tensor) -> Tensor:
    return images


def image_indices(
    count: int, seed: int, step: int, global_batch_size: int, first_row: int, rows: int
) -> NDArray[np.int64]:
    """Positions in the split of the images in rows first_row .. first_row + rows - 1 of the global batch of `step`.

    All batches of a run, laid end to end, are one permutation of the `count` images after another, each epoch with its
    own. So no image is repeated or dropped within an epoch, and a batch may straddle two epochs.

    Returns:
        int64 [rows], each in 0 .. count - 1.
    """
    parts = [
        epoch_order(count, seed, epoch)[span]
        for epoch, span in spans(count, step * global_batch_size + first_row, rows)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def spans(count: int, first: int, rows: int) -> list[tuple[int, slice]]:
    """Epochs of `rows` images from position `first` of a run, each with a slice of the epoch's order."""
    found = []
    end = first + rows
    while first < end:
        epoch, start = divmod(first, count)
        stop = min(start + end - first, count)
        found.append((epoch, slice(start, stop)))
        first += stop - start
    return found


@functools.lru_cache(maxsize=2)  # a batch that straddles two epochs needs both
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Positions in the split of the images of an epoch, in their order: int64 [count], not to be written to."""
    return keyed_permutation(count, seed, Stream.ORDER, epoch)
