"""The codebook of vector quantization against the equations, and the draws of dead codes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from gen_dist.config import LatentAutoencoderConfig
from gen_dist.kernels.noise import host_normal
from gen_dist.objectives import Batch
from gen_dist.objectives.bottlenecks.vq import CODES, ENCODED, VectorQuantizer
from gen_dist.randomness import Stream

CODEBOOK, CHANNELS, SIDE, ROWS = 6, 3, 4, 5
SEED, STEP = 7, 3

T = TypeVar("T")


def _quantizer(**changes: object) -> VectorQuantizer:
    torch.manual_seed(0)
    config = LatentAutoencoderConfig(bottleneck="vq", codebook_size=CODEBOOK, **changes)  # type: ignore[arg-type]
    quantizer = VectorQuantizer(config, (CHANNELS, SIDE, SIDE))
    quantizer.codebook.data.normal_()
    quantizer.usage.fill_(1 / CODEBOOK)
    if quantizer.moves:
        quantizer.sums.copy_(quantizer.codebook / CODEBOOK)
    return quantizer


def _encoded(step: int) -> Tensor:
    return torch.randn(ROWS, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(step))


def _step(quantizer: VectorQuantizer, step: int, parts: Sequence[int] = (ROWS,)) -> None:
    """Encode and update, with a batch cut into micro-batches of these sizes."""
    batches, carried, first = [], [], 0
    for part, encoded in zip(parts, _encoded(step).split(list(parts)), strict=True):
        images, labels = torch.zeros(part, 1, 1, 1, dtype=torch.uint8), torch.zeros(part, dtype=torch.int64)
        batch = Batch(images, labels, torch.tensor([SEED, step]), first)
        batches.append(batch)
        carried.append(quantizer(encoded, batch.key(Stream.LATENTS)).carried)
        first += part
    with torch.no_grad():
        quantizer.update(batches, carried, lambda statistic, items: statistic(items))


def test_codes_are_the_nearest() -> None:
    quantizer = _quantizer()
    codes = quantizer.codes(_encoded(0)).numpy()
    vectors = _encoded(0).double().movedim(1, -1).numpy()
    distances = ((vectors[..., None, :] - quantizer.codebook.double().numpy()) ** 2).sum(-1)
    assert np.array_equal(codes, distances.argmin(-1))
    assert torch.equal(quantizer.decodable(_encoded(0)), quantizer.latents_of(torch.from_numpy(codes)))
    assert torch.equal(quantizer.decodable(quantizer.decodable(_encoded(0))), quantizer.decodable(_encoded(0)))


def test_a_large_table_is_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = _quantizer(), _quantizer()
    _step(whole, 1)
    monkeypatch.setattr("gen_dist.objectives.bottlenecks.vq._LARGEST_TABLE", 3 * CODEBOOK)
    _step(cut, 1)
    assert torch.equal(whole.codes(_encoded(2)), cut.codes(_encoded(2)))
    torch.testing.assert_close(whole.codebook, cut.codebook)


def test_the_codebook_moves_to_the_averages_of_its_vectors() -> None:
    """van den Oord et al. 2017, appendix A.1, with counts and sums divided by the number of vectors."""
    quantizer = _quantizer(codebook_decay=0.8, code_restart=0.0)
    codebook = quantizer.codebook.double().numpy()
    counts, sums = np.full(CODEBOOK, 1 / CODEBOOK), codebook / CODEBOOK
    for step in range(5):
        vectors = _encoded(step).double().movedim(1, -1).reshape(-1, CHANNELS).numpy()
        codes = ((vectors[:, None] - codebook) ** 2).sum(-1).argmin(1)
        taken = np.eye(CODEBOOK)[codes]
        counts = 0.8 * counts + 0.2 * taken.sum(0) / len(vectors)
        sums = 0.8 * sums + 0.2 * taken.T @ vectors / len(vectors)
        codebook = sums / counts[:, None]
        _step(quantizer, step)
    np.testing.assert_allclose(quantizer.codebook.numpy(), codebook, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(quantizer.usage.numpy(), counts, rtol=1e-5)


@pytest.mark.parametrize("update", ["moving_average", "gradient"])
def test_dead_codes_become_keyed_vectors_of_the_batch(update: str) -> None:
    quantizer = _quantizer(codebook_update=update, code_restart=0.1)
    quantizer.codebook.data[[1, 4]] += 100.0  # nothing is near them
    quantizer.usage[[1, 4]] = 0.0
    before = quantizer.codebook.detach().clone()
    _step(quantizer, STEP)
    uniform = torch.special.ndtr(
        torch.from_numpy(host_normal(SEED, Stream.CODES, range(STEP, STEP + 1), 0, CODEBOOK, 1)[0]).double()
    )
    vectors = _encoded(STEP).movedim(1, -1).reshape(-1, CHANNELS)
    chosen = vectors[(uniform[:, 0] * len(vectors)).long()]
    torch.testing.assert_close(quantizer.codebook.detach()[[1, 4]], chosen[[1, 4]])
    assert torch.allclose(quantizer.usage[[1, 4]], torch.full((2,), 1 / CODEBOOK))
    others = [0, 2, 3, 5]
    assert torch.equal(quantizer.codebook.detach()[others], before[others]) == (update == "gradient")


@pytest.mark.parametrize("update", ["moving_average", "gradient"])
def test_micro_batches_have_the_codebook_of_the_batch(update: str) -> None:
    whole, parts = (_quantizer(codebook_update=update, code_restart=0.5, codebook_decay=0.5) for _ in range(2))
    for step in range(8):
        _step(whole, step)
        _step(parts, step, parts=(2, 1, 2))
        torch.testing.assert_close(whole.codebook, parts.codebook, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.usage, parts.usage)


@pytest.mark.parametrize("update", ["moving_average", "gradient"])
def test_the_statistics_are_those_of_all_processes(update: str) -> None:
    """Two processes with the same vectors have one's codebook, with uneven shares, while codes die and are drawn."""
    settings = {"codebook_update": update, "code_restart": 0.8, "codebook_decay": 0.5}
    whole, ranks = _quantizer(**settings), [_quantizer(**settings) for _ in range(2)]
    redrawn = 0
    for step in range(30):
        before = whole.usage.clone()
        _step(whole, step)
        _step_of_ranks(ranks, step, first_rows=2)
        redrawn += int(((whole.usage == 1 / CODEBOOK) & (before != 1 / CODEBOOK)).sum())
        for rank in ranks:
            torch.testing.assert_close(rank.codebook, whole.codebook, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rank.usage, whole.usage, rtol=1e-5, atol=1e-7)
        assert torch.equal(ranks[0].codebook, ranks[1].codebook)
    assert redrawn > 5


def _step_of_ranks(ranks: list[VectorQuantizer], step: int, first_rows: int) -> None:
    """Update quantizers in a thread each: the first takes the first rows of the batch, the second the others."""
    barrier, shares = threading.Barrier(len(ranks), timeout=60), [Tensor()] * len(ranks)

    def update(number: int) -> None:
        first, last = ((0, first_rows), (first_rows, ROWS))[number]
        images, labels = torch.zeros(last - first, 1, 1, 1), torch.zeros(last - first, dtype=torch.int64)
        batch = Batch(images, labels, torch.tensor([SEED, step]), first)

        def summed(statistic: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
            shares[number] = statistic(items)
            barrier.wait()
            total = shares[0] + shares[1]
            barrier.wait()
            return total

        with torch.no_grad():
            coded = ranks[number](_encoded(step)[first:last], batch.key(Stream.LATENTS))
            ranks[number].update([batch], [coded.carried], summed)

    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(update, range(len(ranks))))


def test_gradients_pass_straight_through() -> None:
    quantizer = _quantizer()
    encoded = _encoded(0).requires_grad_()
    batch = Batch(torch.zeros(ROWS, 1, 1, 1), torch.zeros(ROWS), torch.tensor([SEED, STEP]), 0)
    coded = quantizer(encoded, batch.key(Stream.LATENTS))
    weights = torch.randn(coded.latents.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((coded.latents * weights).sum(), encoded)
    assert torch.equal(found, weights)
    assert torch.equal(coded.latents, quantizer.latents_of(quantizer.codes(encoded.detach())))
    assert set(coded.carried) == {ENCODED, CODES}
