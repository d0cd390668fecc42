"""Each metric equals an independent implementation, and its parts over several processes add up to the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import polynomial_kernel
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd
from torch_fidelity.metric_prc import calculate_precision_recall_full

from gen_dist.evaluation.metrics import appearance, frechet, kernel, latents, likelihood, neighbours
from tests.support.digits import codes, digits

REAL, FAKE = 400, 300
CUTS = (0, 137, 300)
"""Place at which two processes with unequal shares divide the fakes."""


def _features() -> tuple[Tensor, Tensor]:
    """Codes of real digits, and of other digits made lighter: float32 [400, 32] and [300, 32]."""
    images = digits()[0].copy()
    images[REAL : REAL + FAKE] = (images[REAL : REAL + FAKE] * 0.8).astype(np.uint8)
    found = torch.from_numpy(codes(images, 32))
    return found[:REAL], found[REAL : REAL + FAKE]


def _numpy(features: Tensor) -> NDArray[np.float64]:
    return features.double().numpy()


def _squared_mmd(real: Tensor, fake: Tensor) -> float:
    within = kernel.self_kernel_sum(real, real), kernel.self_kernel_sum(fake, fake)
    return kernel.squared_mmd(*within, kernel.kernel_sum(real, fake), (len(real), len(fake)))


def test_the_frechet_distance_equals_torch_fidelitys() -> None:
    real, fake = _features()
    found = frechet.frechet_distance(frechet.moments(real), frechet.moments(fake))
    (m1, s1), (m2, s2) = ((f.mean(axis=0), np.cov(f, rowvar=False)) for f in (_numpy(real), _numpy(fake)))
    root = scipy.linalg.sqrtm(s1 @ s2).real
    assert found == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root), rel=1e-6)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(features.double()) for features in (real, fake)), verbose=False
    )
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_the_frechet_distance_equals_its_closed_form() -> None:
    one = frechet.Moments(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double())
    two = frechet.Moments(torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 25.0])).double())
    assert frechet.frechet_distance(one, two) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)


def test_the_frechet_distance_of_few_images_is_real() -> None:
    few = torch.from_numpy(digits()[0][:50].reshape(50, -1) / 255.0)
    assert frechet.frechet_distance(frechet.moments(few), frechet.moments(few)) == pytest.approx(0, abs=1e-6)
    other = torch.from_numpy(digits()[0][50:100].reshape(50, -1) / 255.0)
    (m1, s1), (m2, s2) = frechet.moments(few), frechet.moments(other)
    # The trace of the root is the sum of the singular values of the product of the centred images.
    centred = [(images - images.mean(dim=0)) / 7.0 for images in (few, other)]
    expected = (m1 - m2).square().sum() + s1.trace() + s2.trace()
    expected -= 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    found = frechet.frechet_distance(frechet.moments(few), frechet.moments(other))
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_the_kernel_distance_equals_torch_fidelitys() -> None:
    real, fake = _features()
    xx, yy, xy = (
        polynomial_kernel(_numpy(a), _numpy(b), degree=3, gamma=1 / 32, coef0=1)
        for a, b in ((real, real), (fake, fake), (real, fake))
    )
    m, n = REAL, FAKE
    expected = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
    assert _squared_mmd(real, fake) == pytest.approx(expected - 2 * xy.mean(), rel=1e-6)
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    theirs = kernel_mmd(_numpy(real[:FAKE]), _numpy(fake), kid_kernel_poly_coef0=1, **kernel)
    assert _squared_mmd(real[:FAKE], fake) == pytest.approx(theirs, rel=1e-6)


def test_the_kernel_distance_to_itself_is_0_on_average() -> None:
    parts = torch.from_numpy(codes(digits()[0], 32)).split(100)
    found = np.array([_squared_mmd(a, b) for a, b in itertools.combinations(parts, 2)])
    assert found.min() < 0 < found.max()
    assert abs(found.mean()) < 0.4 * found.std()


def test_precision_recall_density_coverage_equal_the_papers() -> None:
    real, fake = _features()
    k = neighbours.NEIGHBOURS
    radii = neighbours.neighbour_radii(real, 0, REAL), neighbours.neighbour_radii(fake, 0, FAKE)
    found = neighbours.ball_counts(real, radii[0], fake, radii[1]).metrics(REAL)
    within_real, within_fake = (np.sort(pairwise_distances(_numpy(f)), axis=1)[:, k] for f in (real, fake))
    between = pairwise_distances(_numpy(real), _numpy(fake))
    in_real_balls = between < within_real[:, None]
    assert found == pytest.approx(
        {
            "precision": in_real_balls.any(axis=0).mean(),
            "recall": (between < within_fake).any(axis=1).mean(),
            "density": in_real_balls.sum(axis=0).mean() / k,
            "coverage": (between.min(axis=1) < within_real).mean(),
        },
        rel=1e-12,
    )
    theirs = calculate_precision_recall_full(fake.double(), real.double(), neighborhood=k)
    assert (found["precision"], found["recall"]) == pytest.approx(theirs, rel=1e-6)
    assert 0.2 < found["precision"] < 1 and 0.2 < found["recall"] < 1


def test_equal_sets_have_density_1_and_all_else_1() -> None:
    real, _ = _features()
    radii = neighbours.neighbour_radii(real, 0, REAL)
    found = neighbours.ball_counts(real, radii, real, radii).metrics(REAL)
    assert found == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}


def test_collapsed_samples_are_precise_and_recall_nothing() -> None:
    real, _ = _features()
    fakes = real[:1].repeat(50, 1)
    radii = neighbours.neighbour_radii(real, 0, REAL), neighbours.neighbour_radii(fakes, 0, 50)
    found = neighbours.ball_counts(real, radii[0], fakes, radii[1]).metrics(REAL)
    assert found["precision"] == 1
    assert found["recall"] == 0
    assert found["coverage"] < 0.1


def test_parts_of_uneven_shares_add_up_to_the_whole() -> None:
    real, fake = _features()
    shares = list(itertools.pairwise(CUTS))
    whole = kernel.self_kernel_sum(fake, fake)
    parts = torch.stack([kernel.self_kernel_sum(fake[a:b], fake) for a, b in shares]).sum()
    assert float(parts) == pytest.approx(float(whole), rel=1e-12)
    radii = torch.cat([neighbours.neighbour_radii(fake, a, b) for a, b in shares])
    torch.testing.assert_close(radii, neighbours.neighbour_radii(fake, 0, FAKE), rtol=1e-12, atol=0)
    real_radii = neighbours.neighbour_radii(real, 0, REAL)
    counts = [neighbours.ball_counts(real[a:b], real_radii[a:b], fake, radii) for a, b in ((0, 1), (1, 1), (1, REAL))]
    together = neighbours.BallCounts(*(torch.stack(values).sum(dim=0) for values in zip(*counts, strict=True)))
    assert together.metrics(REAL) == neighbours.ball_counts(real, real_radii, fake, radii).metrics(REAL)
    sums = [float(appearance.pair_distance_sum(fake, a, b)) for a, b in shares]
    assert sum(sums) == pytest.approx(float(appearance.pair_distance_sum(fake, 0, FAKE)), rel=1e-12)


def test_sharpness_is_scipys_laplacian_variance() -> None:
    images = digits()[0][:20]
    colour = np.concatenate([images, images[:, :, ::-1], images // 2], axis=1)
    found = appearance.laplacian_variances(torch.from_numpy(colour)).numpy()
    expected = [scipy.ndimage.laplace(image.mean(axis=0) / 255)[1:-1, 1:-1].var() for image in colour]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    blurred = scipy.ndimage.uniform_filter(images, size=(1, 1, 3, 3))
    of_both = [appearance.laplacian_variances(torch.from_numpy(some)).mean() for some in (blurred, images)]
    assert of_both[0] < 0.3 * of_both[1]


def test_the_sum_of_distances_is_scipys() -> None:
    _, fake = _features()
    assert float(appearance.pair_distance_sum(fake, 0, FAKE)) == pytest.approx(2 * pdist(_numpy(fake)).sum(), rel=1e-6)


def test_active_units_are_those_whose_mean_varies() -> None:
    means = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.2, 0.05, 0.0])
    assert latents.active_units(means + 5.0) == 2


def test_one_bit_a_pixel_is_one_bit_a_pixel() -> None:
    assert likelihood.bits_per_dimension(784 * np.log(2), (1, 28, 28)) == pytest.approx(1, rel=1e-12)
