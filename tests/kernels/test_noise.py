"""Keyed randomness: known answers, independence of how rows are grouped, and the distributions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from gen_dist.kernels import Key, binarize, normal
from gen_dist.kernels.device_noise import (
    device_box_muller,
    device_normal,
    device_threshold,
    device_words,
    philox_4x32_10,
)
from gen_dist.kernels.noise import (
    TIE_BYTES,
    binarize_operator,
    host_box_muller,
    host_normal,
    host_threshold,
    host_words,
    normal_operator,
)
from tests.kernels.philox_answers import PHILOX_4X32_10_ANSWERS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RNG = torch.tensor([7, 3])


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_4X32_10_ANSWERS)
def test_philox_4x32_10_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    words = philox_4x32_10(
        tuple(torch.tensor([word]) for word in counter),  # type: ignore[arg-type]
        tuple(torch.tensor([word]) for word in key),  # type: ignore[arg-type]
    )
    assert tuple(int(word) for word in words) == answer


def test_host_words_are_philox_4x64_10_at_their_counter() -> None:
    """Row 5 with 6 words has blocks 10 and 11 of its key; NumPy increments the counter before a draw."""
    generator = np.random.Philox(key=[7, 2], counter=[10, 0, 3, 0])
    np.testing.assert_array_equal(host_words(7, 2, 3, 5, 1, 6)[0], generator.random_raw(8)[:6])


@pytest.mark.parametrize("words", [1, 3, 4, 5, 392])
@pytest.mark.parametrize("draw", ["host", "device"])
def test_words_of_a_row_do_not_depend_on_the_rows_beside_it(draw: str, words: int) -> None:
    def rows(first: int, count: int) -> np.ndarray:
        if draw == "host":
            return host_words(7, 2, 3, first, count, words)
        return device_words(RNG, 2, first, count, words).numpy()

    whole = rows(0, 9)
    np.testing.assert_array_equal(np.concatenate([rows(0, 4), rows(4, 1), rows(5, 4)]), whole)
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize("change", ["seed", "stream", "step"])
@pytest.mark.parametrize("draw", ["host", "device"])
def test_another_seed_stream_or_step_gives_unrelated_words(draw: str, change: str) -> None:
    def words(key: dict[str, int]) -> np.ndarray:
        if draw == "host":
            return host_words(key["seed"], key["stream"], key["step"], 0, 64, 64)
        return device_words(torch.tensor([key["seed"], key["step"]]), key["stream"], 0, 64, 64).numpy()

    key = {"seed": 1, "stream": 1, "step": 1}
    assert not np.isin(words(key), words(key | {change: 2})).any()


def test_a_seed_beyond_32_bits_counts_in_full() -> None:
    low, high = torch.tensor([5, 0]), torch.tensor([5 + (1 << 40), 0])
    assert not torch.equal(device_words(low, 0, 0, 4, 4), device_words(high, 0, 0, 4, 4))
    assert not torch.equal(normal(Key(low, 0, 0), 4, 4), normal(Key(high, 0, 0), 4, 4))


@pytest.mark.parametrize("width", [1, 2, 7, 20])
def test_normal_shards_equal_the_whole(width: int) -> None:
    whole = normal(Key(RNG, 2, 0), 10, width)
    assert whole.shape == (10, width)
    assert torch.equal(torch.cat([normal(Key(RNG, 2, 0), 3, width), normal(Key(RNG, 2, 3), 7, width)]), whole)


def test_normal_of_no_rows_is_empty() -> None:
    assert normal(Key(RNG, 2, 0), 0, 20).shape == (0, 20)


@pytest.mark.parametrize("definition", ["host", "device"])
def test_normal_draws_pass_a_kolmogorov_smirnov_test(definition: str) -> None:
    draws = normal(Key(RNG, 2, 0), 2000, 100) if definition == "host" else device_normal(RNG, 2, 0, 2000, 100)
    values = draws.flatten().double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(values)) < 0.05
    # The two of a pair share their radius, but must be uncorrelated.
    cosines, sines = (draws[:, :50], draws[:, 50:]) if definition == "host" else (draws[:, ::2], draws[:, 1::2])
    assert abs(np.corrcoef(cosines.flatten(), sines.flatten())[0, 1]) < 0.01


def test_every_word_gives_a_finite_normal() -> None:
    """Extreme words, for which the argument of a float32 logarithm could be 0."""
    extremes = [0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 129, 2**32 - 1]
    words = np.array([(a, b) for a in extremes for b in extremes], dtype=np.uint32)
    host = host_box_muller(words.T.reshape(1, 2, -1))
    device = device_box_muller(torch.from_numpy(words.astype(np.int64))).numpy()
    for draws in (host, device):
        assert np.isfinite(draws).all()
        assert np.abs(draws).max() <= math.sqrt(66 * math.log(2)) + 1e-5


def test_host_and_device_box_muller_agree_on_the_same_words() -> None:
    words = device_words(RNG, 2, 0, 50, 20).view(50, 2, 10)
    host = host_box_muller(words.numpy().astype(np.uint32)).reshape(50, 2, 10)
    device = device_box_muller(words.transpose(1, 2)).transpose(1, 2).numpy()
    np.testing.assert_allclose(device, host, rtol=0, atol=5e-6)


def test_binarize_draws_each_pixel_with_its_intensity() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(4000, 1)
    drawn = binarize(images, Key(RNG, 3, 0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    expected = torch.arange(256) / 255
    deviation = (drawn.mean(0) - expected) / (expected * (1 - expected) / 4000).sqrt().clamp(min=1e-9)
    assert deviation[1:-1].abs().max() < 4.5
    assert drawn[:, 0].sum() == 0


def test_thresholds_have_equal_probability_at_every_intensity() -> None:
    """All 65,536 pairs of bytes are counted against all intensities, without sampling."""
    high, low = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    noise = np.concatenate([high.reshape(-1, 1), low.reshape(-1, 1).repeat(TIE_BYTES, axis=1)], axis=1)
    numbers = torch.arange(65536)[:, None]
    for intensity in range(256):
        images = np.full((65536, 1), intensity, dtype=np.uint8)
        on_host = int(host_threshold(images, noise).sum())
        on_device = int(device_threshold(torch.from_numpy(images), numbers).sum())
        assert abs(on_host - 65536 * intensity / 255) <= 1.01
        assert abs(on_device - 65536 * intensity / 255) <= 1.01
        if intensity in (0, 255):
            assert on_host == on_device == 65536 * (intensity == 255)


def test_binarize_shards_equal_the_whole_and_keep_the_shape() -> None:
    images = torch.randint(0, 256, (9, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = binarize(images, Key(RNG, 3, 4))
    assert whole.shape == images.shape
    assert torch.equal(torch.cat([binarize(images[:2], Key(RNG, 3, 4)), binarize(images[2:], Key(RNG, 3, 6))]), whole)


@pytest.mark.parametrize(("rows", "width"), [(3, 5), (1, 1), (8, 16)])
def test_draws_of_each_step_begin_on_a_cache_line(rows: int, width: int) -> None:
    """Products of small matrices round by their place in memory: a resumed run draws other steps together."""
    draws = [normal(Key(torch.tensor([11, step]), 3, 0), rows, width) for step in range(40)]
    assert {draw.data_ptr() % 64 for draw in draws} == {0}
    assert all(draw.is_contiguous() for draw in draws)


def test_lookahead_changes_no_draw_in_any_order_of_steps() -> None:
    for step in [0, 1, 2, 3, 2, 9, 10, 11, 12, 5, 30, 31, 40, 8, 9, 10]:
        for stream, rows, width in [(2, 6, 7), (5, 3, 4)]:
            draw = normal(Key(torch.tensor([7, step]), stream, 4), rows, width)
            np.testing.assert_array_equal(
                draw.numpy(), host_normal(7, stream, range(step, step + 1), 4, rows, width)[0]
            )


@pytest.mark.parametrize("operator", ["normal", "binarize"])
def test_operators_pass_opcheck(operator: str) -> None:
    if operator == "normal":
        torch.library.opcheck(normal_operator, (RNG, 2, 0, 5, 7))
    else:
        torch.library.opcheck(binarize_operator, (torch.randint(0, 256, (5, 7), dtype=torch.uint8), RNG, 3, 0))


def test_a_compiled_region_draws_anew_for_a_new_step_tensor() -> None:
    compiled = torch.compile(lambda rng: normal(Key(rng, 2, 0), 4, 6) * 2.0, fullgraph=True)
    rng = torch.tensor([7, 0])
    draws = []
    for step in range(3):
        rng[1] = step
        draws.append(compiled(rng))
        assert torch.equal(draws[-1], normal(Key(rng, 2, 0), 4, 6) * 2.0)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
