"""Augmentation: the published transformations, keyed by row, twice differentiable, and equal when compiled."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import get_args

import pytest
import torch
from torch import Tensor

from gen_dist.config import Augmentation
from gen_dist.kernels import Key
from gen_dist.objectives.augmentation import DRAWS, add_noise, augment
from gen_dist.randomness import Stream

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RNG = torch.tensor([7, 3])
STREAM = Stream.REAL_AUGMENTATION
ALL: tuple[Augmentation, ...] = get_args(Augmentation)
SETS = [kinds for count in range(1, 4) for kinds in itertools.combinations(ALL, count)]
NOISE = 0.3


def images_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def augmented(images: Tensor, kinds: tuple[Augmentation, ...], first_row: int = 0, rng: Tensor = RNG) -> Tensor:
    return augment(images, kinds, Key(rng, STREAM, first_row))


@pytest.mark.parametrize("shape", [(9, 1, 28, 28), (9, 3, 32, 32), (9, 3, 5, 8)])
@pytest.mark.parametrize("kinds", SETS)
def test_shards_of_rows_equal_the_whole_batch(kinds: tuple[Augmentation, ...], shape: tuple[int, ...]) -> None:
    images = images_of(*shape)
    whole = augmented(images, kinds)
    assert whole.shape == images.shape and whole.dtype == images.dtype
    shards = [augmented(images[first:last], kinds, first) for first, last in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(shards), whole, rtol=0, atol=1e-6)  # a mean may be summed in another order
    assert not torch.equal(whole, images)


def test_nothing_is_done_to_images_for_no_kinds() -> None:
    images = images_of(2, 1, 8, 8)
    assert augmented(images, ()) is images


@pytest.mark.parametrize("change", ["seed", "step", "stream", "row"])
def test_each_part_of_the_key_changes_what_is_done(change: str) -> None:
    images = images_of(4, 3, 16, 16)
    rng = RNG + torch.tensor([change == "seed", change == "step"])
    stream = Stream.FAKE_AUGMENTATION if change == "stream" else STREAM
    other = augment(images, ALL, Key(rng, stream, 4 if change == "row" else 0))
    same = augmented(images, ALL)
    assert all(not torch.equal(one, two) for one, two in zip(other, same, strict=True))


def test_kinds_do_not_depend_on_each_other_or_on_their_order() -> None:
    images = images_of(16, 3, 16, 16)
    everything = augmented(images, ALL)
    one_by_one = images
    for kind in ALL:
        one_by_one = augmented(one_by_one, (kind,))
    torch.testing.assert_close(everything, one_by_one, rtol=0, atol=1e-6)
    assert torch.equal(everything, augmented(images, ALL[::-1]))


def _noisy(images: Tensor, first_row: int = 0, rng: Tensor = RNG, stream: Stream = Stream.REAL_NOISE) -> Tensor:
    return add_noise(images, NOISE, Key(rng, stream, first_row))


def test_noise_is_normal_and_of_the_deviation_that_is_asked_for() -> None:
    images = images_of(200, 3, 16, 16)
    noise = _noisy(images) - images
    assert noise.std() == pytest.approx(NOISE, rel=0.01) and noise.mean() == pytest.approx(0.0, abs=0.01 * NOISE)
    assert (noise.abs() > 3 * NOISE).double().mean() == pytest.approx(2.7e-3, rel=0.15)
    neighbours = torch.corrcoef(torch.stack([noise[:, :, :, :-1].flatten(), noise[:, :, :, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.01
    assert add_noise(images, 0.0, Key(RNG, Stream.REAL_NOISE, 0)) is images


def test_noise_depends_on_the_row_and_each_part_of_the_key() -> None:
    images = images_of(9, 3, 5, 8)
    whole = _noisy(images)
    assert torch.equal(torch.cat([_noisy(images[:4]), _noisy(images[4:5], 4), _noisy(images[5:], 5)]), whole)
    changed = [
        _noisy(images, first_row=1),
        _noisy(images, rng=RNG + torch.tensor([1, 0])),
        _noisy(images, rng=RNG + torch.tensor([0, 1])),
        _noisy(images, stream=Stream.FAKE_NOISE),
    ]
    assert all((other != whole).double().mean() > 0.99 for other in changed)
    (gradient,) = torch.autograd.grad(_noisy(images.requires_grad_()).sum(), images)
    assert torch.equal(gradient, torch.ones_like(images))


def test_colours_are_those_of_the_paper_one_after_the_other() -> None:
    images = images_of(500, 3, 8, 8, dtype=torch.float64)
    changed = augmented(images, ("colour",))
    channels = images.mean(dim=1, keepdim=True)
    overall = images.mean(dim=(1, 2, 3))
    brightness = changed.mean(dim=(1, 2, 3)) - overall
    # Deviations within a pixel give saturation * contrast, those of the pixels' means contrast alone.
    contrast = _ratio(changed.mean(dim=1, keepdim=True), channels)
    saturation = _ratio(changed - changed.mean(dim=1, keepdim=True), images - channels) / contrast
    for draws, low, high in ((brightness, -0.5, 0.5), (saturation, 0.0, 2.0), (contrast, 0.5, 1.5)):
        assert low <= draws.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < draws.max() <= high
        assert draws.mean() == pytest.approx((low + high) / 2, abs=0.06 * (high - low))
        assert draws.std() == pytest.approx((high - low) / 12**0.5, rel=0.08)
    # Brightness, saturation, contrast as published, one after the other.
    brightness, saturation, contrast = (draw[:, None, None, None] for draw in (brightness, saturation, contrast))
    expected = images + brightness
    mean = expected.mean(dim=1, keepdim=True)
    expected = (expected - mean) * saturation + mean
    mean = expected.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(changed, (expected - mean) * contrast + mean)


def _ratio(changed: Tensor, images: Tensor) -> Tensor:
    """Ratio of the deviations of images from their means: [B]."""
    changed, images = (one - one.mean(dim=(1, 2, 3), keepdim=True) for one in (changed, images))
    return (changed * images).sum(dim=(1, 2, 3)) / images.square().sum(dim=(1, 2, 3))


def test_grey_and_colour_images_change_brightness_alike() -> None:
    grey = images_of(20, 1, 8, 8)
    coloured = augmented(grey.expand(-1, 3, -1, -1), ("colour",))
    torch.testing.assert_close(augmented(grey, ("colour",)).expand(-1, 3, -1, -1), coloured)


def test_images_shift_by_up_to_an_eighth_with_grey_borders() -> None:
    height, width = 16, 24
    images = images_of(2000, 2, height, width).abs() + 0.1
    moved = augmented(images, ("translation",))
    shifts = []
    for image, result in zip(images, moved, strict=True):
        inside = result[0] != 0
        rows, columns = inside.any(dim=1).nonzero().flatten(), inside.any(dim=0).nonzero().flatten()
        assert inside.sum() == len(rows) * len(columns)
        # The rest of the image touches the side that it moved to.
        down = int(rows[0]) if rows[0] > 0 else len(rows) - height
        right = int(columns[0]) if columns[0] > 0 else len(columns) - width
        source = image[:, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
        assert torch.equal(result[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], source)
        shifts.append((down, right))
    for axis, furthest in enumerate((2, 3)):
        counts = Counter(shift[axis] for shift in shifts)
        assert set(counts) == set(range(-furthest, furthest + 1))
        assert all(count / 2000 == pytest.approx(1 / (2 * furthest + 1), abs=0.04) for count in counts.values())


@pytest.mark.parametrize("side", [9, 28])
def test_a_square_of_half_the_side_is_cut_out_anywhere(side: int) -> None:
    images = images_of(2000, 3, side, side).abs() + 0.1
    result = augmented(images, ("cutout",))
    cut = (result == 0).any(dim=1)
    assert torch.equal(result, images * ~cut[:, None])
    rows, columns = cut.any(dim=2), cut.any(dim=1)
    assert torch.equal(cut, rows[:, :, None] & columns[:, None, :])
    length = int(side / 2 + 0.5)
    for lines in (rows, columns):
        assert (lines.sum(dim=1) <= length).all() and (lines.int().diff(dim=1) != 0).sum(dim=1).max() <= 2
        whole = (lines.sum(dim=1) == length).float().mean()
        places = side + 1 - length % 2
        assert whole == pytest.approx((side - length + 1) / places, abs=0.04)
        assert lines.sum(dim=1).min() == length - length // 2


@pytest.mark.parametrize("kinds", SETS)
def test_first_and_second_derivatives_are_right(kinds: tuple[Augmentation, ...]) -> None:
    images = images_of(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: augmented(one, kinds), images)
    # Squared, since a linear function has no second derivative.
    assert torch.autograd.gradgradcheck(lambda one: augmented(one.square(), kinds), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_penalties_pass_through_augmentation(channels: int) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.LazyLinear(1)
    )
    images = images_of(4, channels, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(net(augmented(images, ALL)).sum(), images, create_graph=True)
    assert (augmented(images, ("translation", "cutout")) == 0).any()
    gradient.square().sum().backward()
    for weights in list(net.parameters())[:3]:  # the gradient does not depend on the last bias
        assert weights.grad is not None and weights.grad.abs().sum() > 0


def test_compiled_augmentation_is_equal_and_never_recompiles() -> None:
    def both(images: Tensor, rng: Tensor) -> Tensor:
        return add_noise(augment(images, ALL, Key(rng, STREAM, 12)), NOISE, Key(rng, Stream.REAL_NOISE, 12))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    images = images_of(6, 3, 8, 8).requires_grad_()
    for step in range(4):
        rng = torch.tensor([7, step])
        expected = add_noise(augmented(images, ALL, 12, rng), NOISE, Key(rng, Stream.REAL_NOISE, 12))
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            result = compiled(images, rng)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        one, two = (torch.autograd.grad(output.square().sum(), images)[0] for output in (result, expected))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_one_image_takes_as_many_draws_whatever_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    import gen_dist.objectives.augmentation as module

    widths = []

    def counted(key: Key, rows: int, width: int) -> Tensor:
        widths.append(width)
        return torch.zeros(rows, width)

    monkeypatch.setattr(module, "normal", counted)
    for kinds in SETS:
        augmented(images_of(2, 1, 8, 8), kinds)
    assert widths == [DRAWS] * len(SETS)


def test_the_ends_of_the_draws_stay_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CDF of 6.8 rounds to 1 in float32, which without the clamp would be one more than the last integer."""
    import gen_dist.objectives.augmentation as module

    for end in (-6.8, 6.8):

        def extreme(key: Key, rows: int, width: int, end: float = end) -> Tensor:
            return torch.full((rows, width), end)

        monkeypatch.setattr(module, "normal", extreme)
        assert augmented(torch.ones(1, 1, 16, 16), ("translation",)).sum() == 14 * 14
        assert augmented(torch.ones(1, 1, 16, 16), ("cutout",)).sum() == 16 * 16 - 4 * 4
