"""The keyed order of images, and the batches gathered in it."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gen_dist.config import DataConfig
from gen_dist.data import Split, TrainBatches, image_indices, open_dataset
from gen_dist.data.prefetching import Gathered, Prefetcher
from gen_dist.data.subsets import held_out_order


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    packing = DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache")), synthetic_images=100, image_size=8)
    return open_dataset("synthetic", "unused", packing).train


def batches(split: Split, budget: int, micro_batches: list[tuple[int, int]]) -> TrainBatches:
    return TrainBatches(
        split,
        seed=5,
        global_batch_size=32,
        micro_batches=micro_batches,
        device=torch.device("cpu"),
        resident_budget_bytes=budget,
    )


@pytest.mark.parametrize(("count", "global_batch_size", "ranks"), [(100, 10, 1), (100, 32, 4), (97, 24, 2), (7, 7, 7)])
def test_every_epoch_has_every_image_once_over_all_ranks(count: int, global_batch_size: int, ranks: int) -> None:
    rows = global_batch_size // ranks
    steps = 3 * count // global_batch_size + 1
    stream = np.concatenate(
        [
            image_indices(count, 1, step, global_batch_size, rank * rows, rows)
            for step in range(steps)
            for rank in range(ranks)
        ]
    )
    epochs = [stream[first : first + count] for first in range(0, 3 * count, count)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(count))
    if count > 10:
        assert not np.array_equal(epochs[0], epochs[1])


def test_order_of_a_batch_does_not_depend_on_how_ranks_share_it() -> None:
    whole = image_indices(50, 9, 7, 24, 0, 24)
    for ranks in (2, 3, 4, 24):
        rows = 24 // ranks
        shared = [image_indices(50, 9, 7, 24, rank * rows, rows) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(shared), whole)


def test_order_is_a_function_of_the_seed() -> None:
    assert not np.array_equal(image_indices(50, 0, 0, 24, 0, 24), image_indices(50, 1, 0, 24, 0, 24))
    assert image_indices(50, 2**63 - 1, 10**9, 24, 0, 24).shape == (24,)


def test_order_is_the_one_that_earlier_versions_had() -> None:
    # These figures are part of the definition of a run. If they change, no old run can be resumed or replayed.
    assert image_indices(10, 3, 0, 10, 0, 10).tolist() == ORDER_OF_SEED_3[:10]
    assert image_indices(10, 3, 1, 10, 0, 10).tolist() == ORDER_OF_SEED_3[10:]
    assert held_out_order(8).tolist() == HELD_OUT_ORDER_OF_8


@pytest.mark.parametrize("budget", [2**30, 0], ids=["resident", "mapped"])
def test_batches_are_the_images_of_the_order(split: Split, budget: int) -> None:
    gathered = batches(split, budget, [(8, 5), (13, 3)])
    assert gathered.resident == (budget > 0)
    for step, index in itertools.product(range(8), range(2)):
        images, labels = gathered.micro_batch(step, index)
        first_row, rows = [(8, 5), (13, 3)][index]
        wanted = image_indices(100, 5, step, 32, first_row, rows)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), split.images[wanted])
        assert np.array_equal(labels.numpy(), split.labels[wanted])
    gathered.close()


def test_indices_cut_on_the_device_are_those_of_the_order(split: Split) -> None:
    """Indices cut on the device, as on a GPU; some batches straddle two epochs, or lie in an earlier one."""
    resident = batches(split, 2**30, [(8, 5), (13, 3)])
    for place in ((0, 0), (2, 1), (3, 0), (3, 1), (24, 1), (6, 0), (2, 1)):
        assert np.array_equal(resident._indices_on_device(place).numpy(), resident._indices(place))
    whole = batches(split, 2**30, [(0, 100)])
    assert np.array_equal(whole._indices_on_device((1, 0)).numpy(), whole._indices((1, 0)))


def test_mapped_batches_follow_a_jump_in_step(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = TrainBatches.gather

    def gather_slowly(mapped: TrainBatches, place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.005)  # so that a jump finds the thread gathering a micro-batch that is no longer wanted
        return gather(mapped, place)

    monkeypatch.setattr(TrainBatches, "gather", gather_slowly)
    mapped, resident = batches(split, 0, [(0, 4), (4, 4)]), batches(split, 2**30, [(0, 4), (4, 4)])
    places = [(0, 0), (0, 1), (1, 0), (40, 1), (41, 0), (41, 1), (3, 0), (3, 0), (3, 1), (0, 0), (2, 1), (3, 0)]
    for place in places:
        for ours, theirs in zip(mapped.micro_batch(*place), resident.micro_batch(*place), strict=True):
            assert torch.equal(ours, theirs), place
    mapped.close()


def test_a_batch_that_was_handed_out_is_not_overwritten(split: Split) -> None:
    mapped = batches(split, 0, [(0, 32)])
    first, _ = mapped.micro_batch(0, 0)
    copy = first.clone()
    for step in range(1, 12):
        mapped.micro_batch(step, 0)
    assert torch.equal(first, copy)
    mapped.close()


def test_errors_of_the_prefetcher_reach_the_caller(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = TrainBatches.gather

    def fail_at_step_3(mapped: TrainBatches, place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        if place == (3, 0):
            raise OSError("the disk is gone")
        return gather(mapped, place)

    monkeypatch.setattr(TrainBatches, "gather", fail_at_step_3)
    mapped = batches(split, 0, [(0, 4)])
    for step in range(3):
        mapped.micro_batch(step, 0)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            mapped.micro_batch(3, 0)
    mapped.micro_batch(4, 0)
    mapped.close()


def test_close_stops_the_thread_and_later_calls_say_so(split: Split) -> None:
    before = set(threading.enumerate())  # those of earlier tests may end meanwhile
    mapped = batches(split, 0, [(0, 4)])
    mapped.micro_batch(0, 0)
    (ours,) = set(threading.enumerate()) - before
    mapped.close()
    mapped.close()
    assert not ours.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        mapped.micro_batch(1, 0)


def test_the_thread_runs_ahead_but_not_without_bound(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    gather = TrainBatches.gather

    def record(mapped: TrainBatches, place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        gathered.append(place)
        return gather(mapped, place)

    monkeypatch.setattr(TrainBatches, "gather", record)
    mapped = batches(split, 0, [(0, 4)])
    mapped.micro_batch(0, 0)
    deadline = time.monotonic() + 60
    while len(gathered) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 4 <= len(gathered) <= 6
    mapped.close()


def test_the_thread_runs_ahead_by_a_step_that_is_taken_at_once() -> None:
    begun: list[tuple[int, int]] = []

    def begin(place: tuple[int, int]) -> Gathered:
        begun.append(place)
        return Gathered(torch.zeros(1), torch.zeros(1))

    prefetcher = Prefetcher(begin, lambda place: (place[0], place[1] + 1), ahead=9)
    prefetcher.take((0, 0))
    deadline = time.monotonic() + 60
    while len(begun) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    prefetcher.close()
    assert len(begun) == 10


def test_mapped_images_become_tensors_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = open_dataset("synthetic", tmp_path, DataConfig(cache_dir=str(tmp_path), synthetic_images=64))
        batches(dataset.train, 0, [(0, 4)]).close()


ORDER_OF_SEED_3 = [6, 1, 8, 5, 2, 7, 9, 4, 3, 0, 4, 1, 0, 5, 8, 2, 3, 7, 9, 6]
HELD_OUT_ORDER_OF_8 = [5, 3, 7, 2, 4, 1, 0, 6]
