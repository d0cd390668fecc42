"""A generator that returns training images is told from one that draws new images of the same kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import betabinom
from torch import Tensor

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.features import feature_network
from gen_dist.evaluation.metrics import memorization
from gen_dist.evaluation.metrics.memorization import Verdict, chance_of_as_many, nearest, share_interval, verdict
from gen_dist.evaluation.record import read_evaluation
from gen_dist.inference.export import export
from gen_dist.records.run_paths import RunPaths
from gen_dist.reports import write_report
from gen_dist.reports.run_record import read_run
from gen_dist.training.run import train
from tests.support.digits import digits
from tests.support.runs import small_config

TRIES, TRAINING, HELD_OUT, SAMPLES = 20, 500, 250, 200


@pytest.fixture(scope="module")
def features() -> dict[str, Tensor]:
    """Features of a thousand digits, as they are and changed: float32 [1000, 64] each."""
    images = torch.from_numpy(digits()[0])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    changed = {
        "same": images,
        "noisy": (images + 10.0 * noise).clamp(0, 255).round().to(torch.uint8),
        "mirrored": images.flip(-1),
    }
    network = feature_network("digits", torch.device("cpu"))
    return {name: network.of_images(some)[0] for name, some in changed.items()}


def _verdicts(features: dict[str, Tensor], seed: int) -> dict[str, Verdict]:
    """Verdicts on generators whose samples are training images, as they are or changed, and on held-out images."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(1000))
    training = features["same"][order[:TRAINING]]
    held_out = nearest(features["same"][order[TRAINING : TRAINING + HELD_OUT]], training).nearness
    samples = {
        "held out": features["same"][order[TRAINING + HELD_OUT :][:SAMPLES]],
        "copies": features["same"][order[:SAMPLES]],
        "noisy": features["noisy"][order[:SAMPLES]],
        "a tenth": features["same"][order[TRAINING - SAMPLES // 10 :][:SAMPLES]],
    }
    samples["a tenth"][SAMPLES // 10 :] = features["same"][order[TRAINING + HELD_OUT :][: SAMPLES - SAMPLES // 10]]
    return {name: verdict(nearest(some, training).nearness, held_out) for name, some in samples.items()}


def test_copies_are_called_so_and_held_out_images_never(features: dict[str, Tensor]) -> None:
    for seed in range(TRIES):
        found = _verdicts(features, seed)
        assert {name: one.copies for name, one in found.items()} == {
            "held out": False,
            "copies": True,
            "noisy": True,
            "a tenth": True,
        }, seed
        assert found["copies"].share == 1.0
        assert found["held out"].share < 0.05


def test_nearness_equals_its_definition(features: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorization, "_NUMBERS_PER_PART", 7 * 64 * 9)  # nine rows at once
    points, others = features["same"][:40], features["same"][40:300]
    found = nearest(points, others, 7)
    distances = cdist(points.double().numpy(), others.double().numpy())
    ordered = np.sort(distances, axis=1)[:, :7]
    np.testing.assert_allclose(found.nearness, ordered[:, 0] / ordered.mean(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found.places, distances.argmin(axis=1))


def test_nearness_has_no_unit_and_no_origin(features: dict[str, Tensor]) -> None:
    points, others = features["same"][:20], features["same"][40:140]
    found = nearest(points, others).nearness
    torch.testing.assert_close(nearest(3 * points + 100, 3 * others + 100).nearness, found, rtol=1e-3, atol=1e-4)


def test_equal_training_images_are_copied_too(features: dict[str, Tensor]) -> None:
    """The second-nearest image is no measure where an image stands in the data several times."""
    doubled = features["same"][40:300].repeat(3, 1)
    assert float(nearest(doubled[:20], doubled).nearness.max()) < 1e-3
    assert float(nearest(doubled[:20], doubled[:1].repeat(60, 1)).nearness[0]) == 0.0  # all equal: no number


def test_the_chance_is_that_of_drawn_ranks() -> None:
    """How many of n new images are below the r-th of m held-out ones, against draws."""
    held_out, samples = torch.arange(1.0, 201.0).double(), torch.arange(100.0).double() * 10 + 0.5
    found = verdict(samples, held_out)
    assert int(found.near.sum()) == 1 and found.expected == 2 / 201  # 0.5 alone is below the second
    draws = np.random.default_rng(0).random((4000, 300))
    below = (draws[:, 200:] < np.sort(draws[:, :200])[:, 1:2]).sum(axis=1)
    assert float((below >= 1).mean()) == pytest.approx(found.chance, abs=0.03)
    assert betabinom.sf(4, 100, 2, 199) == pytest.approx(float((below >= 5).mean()), abs=0.02)
    for near, drawn, rank, count in [(0, 100, 2, 200), (5, 100, 2, 200), (500, 500, 10, 1000), (90, 2000, 20, 2000)]:
        expected = betabinom.sf(near - 1, drawn, rank, count + 1 - rank)
        assert chance_of_as_many(near, drawn, rank, count) == pytest.approx(
            expected, rel=1e-6, abs=1e-10
        )  # of 1 - a sum


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_the_interval_of_a_share_holds_it_19_of_20_times(share: float) -> None:
    draws = np.random.default_rng(0).binomial(500, share, 400) / 500
    covered = [low <= share <= high for low, high in (share_interval(one, 500) for one in draws)]
    assert np.mean(covered) > 0.9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    train(small_config("gan", steps=2, data="mnist5k", run_dir=str(path)), say=_silent)
    return path


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    """Evaluations whose samples are training images, of which the second half is mirrored."""
    dataset = open_dataset("mnist5k", "data", DataConfig(), _silent)

    def samples(_context: Context, first: int, last: int) -> Tensor:
        images = torch.from_numpy(dataset.train.images[17 + first : 17 + last])
        return images if first < 250 else images.flip(-1)

    monkeypatch.setattr(Context, "_samples", samples)
    yield dataset


def test_a_copying_generator_is_told_everywhere(run: Path, copying: Dataset) -> None:
    found = evaluate(run, ["memorization"], samples=500, announce=_silent)
    assert found.metrics["memorization"] == 1.0
    assert found.metrics["memorization_data"] == pytest.approx(0.01, abs=1e-3)
    (low, high) = found.intervals["memorization"]
    assert 0.99 < low < high == 1.0
    told = found.warnings["memorization"]
    assert "copies training images: 100.0% of 500 samples" in told and "50.0% as mirror images" in told
    assert any(line.startswith("warning: memorization: it copies") for line in found.lines())
    assert read_evaluation(run) == found
    assert RunPaths(run).nearest_pairs.exists()
    write_report(run / "report.html", [read_run(run)], [None])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "It copies training images: 100.0% of 500 samples" in page and "95 % interval: " in page
    assert "samples beside their nearest training images" in page
    card = (export(run, "safetensors", announce=_silent) / "README.md").read_text()
    assert "it copies training images" in card


def test_a_noise_generator_copies_nothing(run: Path) -> None:
    found = evaluate(run, ["memorization"], samples=300, announce=_silent)
    assert found.warnings == {} and not [line for line in found.lines() if "warning" in line]
    assert isinstance(found.metrics["memorization"], float) and found.metrics["memorization"] < 0.02


def test_test_images_from_the_training_set_are_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunPaths(run).evaluation.unlink(missing_ok=True)
    monkeypatch.setattr(memorization, "EQUAL", 2.0)  # as if all were
    found = evaluate(run, ["memorization"], samples=300, announce=_silent)
    assert found.unavailable["memorization"] == "all but 0 of the test images are training images, too"


def test_few_of_many_training_images_are_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gen_dist.evaluation.context.TRAINING_IMAGES", 300)
    lines: list[str] = []
    evaluate(run, ["memorization"], samples=300, announce=lines.append)
    assert any("300 of 4,000 training images" in line for line in lines)


def _silent(_line: str) -> None:
    pass
