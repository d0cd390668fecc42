"""Checks of samples tell a collapsed generator from a healthy one, on real digits."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, Split, open_dataset
from gen_dist.evaluation import sample_checks
from gen_dist.evaluation.metrics import appearance
from gen_dist.evaluation.sample_checks import SampleChecks
from gen_dist.inference.model import GenerativeModel
from gen_dist.objectives import build_objective
from tests.support.runs import small_config, small_dataset

CLASS_CHECKS = {f"samples/{name}" for name in ("class_shares", "classes_found", "class_variation", "sure_ratio")}
DIVERSITY_CHECKS = {"samples/diversity", "samples/diversity_ratio"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    cache = str(tmp_path_factory.mktemp("cache"))
    return open_dataset("mnist5k", ".", DataConfig(cache_dir=cache), lambda _line: None)


class Generator:
    """A model whose samples are these images, so that the right result of a check is known."""

    def __init__(self, images: Callable[[int, Tensor | None], np.ndarray], conditional: bool = False) -> None:
        self._images = images
        self.conditional = conditional
        self.device = torch.device("cpu")
        self.objective = self
        self.generates = True

    def prior_latents(self, count: int) -> Tensor:
        return torch.zeros(count, 1)

    def scaled_images(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._images(len(latents), labels)))


def measure(dataset: Dataset, images: Callable[[int, Tensor | None], np.ndarray], **options: Any) -> dict[str, Any]:
    return dict(SampleChecks(Generator(images, **options), dataset).measure())  # type: ignore[arg-type]


def some(images: np.ndarray, count: int) -> np.ndarray:
    return images[np.random.default_rng(0).choice(len(images), count, replace=len(images) < count)]


def test_real_images_pass_every_check(digits: Dataset) -> None:
    checks = measure(digits, lambda count, _: some(digits.test.images, count))
    assert checks.keys() == CLASS_CHECKS | DIVERSITY_CHECKS
    assert checks["samples/diversity"] == pytest.approx(0.36, abs=0.02)
    assert checks["samples/diversity_ratio"] == pytest.approx(1.0, abs=0.03)
    assert checks["samples/classes_found"] == 10
    assert checks["samples/sure_ratio"] == pytest.approx(1.0, abs=0.08)
    assert checks["samples/class_variation"] < 0.1
    shares = checks["samples/class_shares"]
    assert len(shares) == 10 and sum(shares) == pytest.approx(1.0) and all(0.05 < share < 0.17 for share in shares)


def _noise(digits: Dataset, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *digits.image_shape), dtype=np.uint8)


def _halves(digits: Dataset, count: int) -> np.ndarray:
    """The upper half of one digit on the lower half of another."""
    images = some(digits.test.images, count).copy()
    images[:, :, 14:] = np.roll(images[:, :, 14:], 1, axis=0)
    return images


def _scrambled(digits: Dataset, count: int) -> np.ndarray:
    """Digits whose pixels are in another order."""
    order = np.random.default_rng(1).permutation(28 * 28)
    return some(digits.test.images, count).reshape(count, -1)[:, order].reshape(count, *digits.image_shape)


def _blots(digits: Dataset, count: int) -> np.ndarray:
    """Means of 20 digits each."""
    return np.stack([some(digits.test.images[place:], 20).mean(axis=0).astype(np.uint8) for place in range(count)])


@pytest.mark.parametrize(("made", "most"), [(_noise, 0.01), (_scrambled, 0.2), (_halves, 0.45), (_blots, 0.2)])
def test_squiggles_have_no_sure_class(digits: Dataset, made: Callable[[Dataset, int], np.ndarray], most: float) -> None:
    assert measure(digits, lambda count, _: made(digits, count))["samples/sure_ratio"] < most


def test_one_image_again_and_again_is_collapse(digits: Dataset) -> None:
    four = digits.train.images[digits.train.labels == 4][:1]
    checks = measure(digits, lambda count, _: four.repeat(count, axis=0))
    assert checks["samples/diversity"] < 1e-6 and checks["samples/diversity_ratio"] < 1e-6
    assert checks["samples/classes_found"] == 1 and checks["samples/class_shares"][4] == 1.0
    assert checks["samples/class_variation"] == pytest.approx(0.9, abs=0.05)


def test_nearly_equal_images_differ_by_as_much_as_they_do(digits: Dataset) -> None:
    four = digits.train.images[digits.train.labels == 4][:1]

    def noisy(count: int, _: Tensor | None) -> np.ndarray:
        # Each pixel of a blank part has one of two levels, so half of the pixels differ by 1 of 255.
        noise = np.random.default_rng(0).integers(0, 2, (count, *four.shape[1:]), dtype=np.uint8)
        return np.clip(four, 0, 254) + noise

    assert measure(digits, noisy)["samples/diversity"] == pytest.approx(0.5**0.5 / 255, rel=1e-3)


def test_missing_classes_are_counted_though_samples_differ(digits: Dataset) -> None:
    few = digits.test.images[np.isin(digits.test.labels, (0, 1, 7))]
    checks = measure(digits, lambda count, _: some(few, count))
    assert checks["samples/diversity_ratio"] > 0.8
    assert checks["samples/classes_found"] == 3
    assert checks["samples/class_variation"] == pytest.approx(0.7, abs=0.08)


def test_a_class_without_test_images_counts_if_generated(digits: Dataset) -> None:
    two = np.isin(digits.test.labels, (0, 1))
    test = replace(digits.test, images=digits.test.images[two], labels=digits.test.labels[two])
    split = replace(digits, test=test)
    zeros = digits.test.images[digits.test.labels == 0]
    assert measure(split, lambda count, _: some(zeros, count))["samples/classes_found"] == 1


def test_a_mean_image_is_of_little_diversity(digits: Dataset) -> None:
    mean = digits.train.images.mean(axis=0).astype(np.uint8)

    def pale(count: int, _: Tensor | None) -> np.ndarray:
        return (0.9 * mean + 0.1 * some(digits.test.images, count)).astype(np.uint8)

    assert measure(digits, pale)["samples/diversity_ratio"] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("obeys", [True, False])
def test_conditional_samples_have_the_class_shares_of_the_data(digits: Dataset, obeys: bool) -> None:
    asked = []

    def images(count: int, labels: Tensor | None) -> np.ndarray:
        assert labels is not None and len(labels) == count
        asked.append(labels.numpy())
        if not obeys:
            return some(digits.test.images, count)
        rng = np.random.default_rng(0)
        return digits.test.images[[rng.choice(np.flatnonzero(digits.test.labels == label)) for label in labels.numpy()]]

    checks = measure(digits, images, conditional=True)
    assert checks.keys() == CLASS_CHECKS | DIVERSITY_CHECKS | {"samples/label_accuracy"}
    known = np.bincount(digits.train.labels) / len(digits.train.labels)
    np.testing.assert_allclose(np.bincount(asked[0]) / len(asked[0]), known, atol=0.01)
    if obeys:
        assert checks["samples/label_accuracy"] == pytest.approx(0.936, abs=0.03)  # as documented for test images
    else:
        assert checks["samples/label_accuracy"] == pytest.approx(0.1, abs=0.05)


def test_the_class_of_a_sample_is_that_of_most_neighbours(digits: Dataset) -> None:
    def split(levels: list[int], labels: list[int]) -> Split:
        images = np.array(levels, np.uint8)[:, None, None, None].repeat(4, axis=2).repeat(4, axis=3)
        return Split("a split", images, np.array(labels))

    # The five levels nearest to 100 are 101, 97, 104, 95, 106, of classes 0, 1, 1, 0, 2; 130 is not among them.
    train = split([101, 97, 104, 95, 106, 130, 131, 132], [0, 1, 1, 0, 2, 2, 2, 2])
    dataset = Dataset(train, split([100, 131], [0, 2]), ("zero", "one", "two"), "")
    at_100 = measure(dataset, lambda count, _: split([100] * count, [0] * count).images)
    assert at_100["samples/class_shares"] == [1.0, 0.0, 0.0]
    at_131 = measure(dataset, lambda count, _: split([131] * count, [0] * count).images)
    assert at_131["samples/class_shares"] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("classes", [1, 101])
def test_only_diversity_is_measured_without_few_classes(digits: Dataset, classes: int) -> None:
    names = tuple(map(str, range(classes)))
    train, test = (replace(split, labels=split.labels % classes) for split in (digits.train, digits.test))
    dataset = replace(digits, train=train, test=test, class_names=names)
    assert measure(dataset, lambda count, _: some(digits.test.images, count)).keys() == DIVERSITY_CHECKS


def test_test_images_that_are_all_the_same_give_no_ratio(digits: Dataset) -> None:
    test = replace(digits.test, images=digits.test.images[:1].repeat(5, axis=0), labels=digits.test.labels[:5])
    checks = measure(replace(digits, test=test), lambda count, _: some(digits.train.images, count))
    assert checks.keys() == CLASS_CHECKS | {"samples/diversity"}


def test_large_images_are_compared_at_a_side_of_32(digits: Dataset) -> None:
    def enlarged(split: Split) -> Split:
        return replace(split, images=np.pad(split.images, ((0, 0), (0, 0), (2, 2), (2, 2))).repeat(3, 2).repeat(3, 3))

    small = some(digits.test.images, 500)
    large = replace(digits, train=enlarged(digits.train), test=enlarged(digits.test))
    found = measure(large, lambda count, _: np.pad(small, ((0, 0), (0, 0), (2, 2), (2, 2))).repeat(3, 2).repeat(3, 3))
    expected = measure(digits, lambda count, _: small)
    assert found["samples/class_shares"] == expected["samples/class_shares"]
    assert found["samples/diversity"] == pytest.approx(expected["samples/diversity"] * 28 / 32, rel=1e-5)


def test_large_images_are_float32_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (20, 3, 70, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, pooled, sizes = appearance.pixel_points(images), functional.adaptive_avg_pool2d, []

    def pool(maps: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
        sizes.append(len(maps))
        return pooled(maps, sides)

    monkeypatch.setattr(appearance, "NUMBERS_PER_PART", 6 * 3 * 70 * 50)
    monkeypatch.setattr(functional, "adaptive_avg_pool2d", pool)
    assert torch.equal(appearance.pixel_points(images), whole)
    assert sizes == [6, 6, 6, 2]


def test_few_images_of_the_data_are_copied_at_once(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    places, row = np.arange(0, 4000, 5), 28 * 28
    whole = appearance.pixel_points(torch.from_numpy(digits.train.images[places]))
    monkeypatch.setattr(sample_checks, "NUMBERS_PER_PART", 90 * row)
    checks = SampleChecks(Generator(lambda *_: digits.test.images), digits)  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        points = checks._points_of(digits.train, places, appearance.pixel_points)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(points, whole)
    assert 90 * row <= most < 270 * row


def vae(dataset: Dataset, objective: str = "vae") -> GenerativeModel:
    config = small_config(objective)
    torch.manual_seed(0)
    built = build_objective(config, dataset.image_shape, len(dataset.class_names)).eval()
    return GenerativeModel(built, config, dataset.image_shape, dataset.class_names)


def test_checks_of_a_model_repeat_and_leave_its_mode(digits: Dataset) -> None:
    model = vae(digits)
    model.objective.train()
    checks = SampleChecks(model, digits)
    torch.manual_seed(0)
    first = checks.measure()
    torch.manual_seed(1)
    assert checks.measure() == first == SampleChecks(model, digits).measure()
    assert model.objective.training
    assert dict[str, Any](first)["samples/diversity_ratio"] < 0.5  # untrained: hardly any latent has an effect


def test_a_model_that_does_not_generate_has_no_checks() -> None:
    dataset = small_dataset(small_config("autoencoder"))
    assert SampleChecks(vae(dataset, "autoencoder"), dataset).measure() == {}
