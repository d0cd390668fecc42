"""Latents for pictures: equal steps of probability, walks along principal directions and great circles."""

from __future__ import annotations

import numpy as np
import pytest

from gen_dist.inference import latent_walks
from tests.support.digits import codes, digits


def test_manifold_latents_take_equal_steps_of_probability():
    latents = latent_walks.manifold_latents(5, 4)
    assert latents.shape == (20, 2) and latents.dtype == np.float32
    grid = latents.reshape(4, 5, 2)
    assert (np.diff(grid[:, :, 0], axis=1) > 0).all() and (np.diff(grid[:, :, 1], axis=0) < 0).all()
    np.testing.assert_allclose(grid[0, :, 0], [-1.2815516, -0.5244005, 0, 0.5244005, 1.2815516], atol=1e-6)
    np.testing.assert_allclose(grid[:, 0, 1], [1.1503494, 0.3186394, -0.3186394, -1.1503494], atol=1e-6)


def test_traversals_follow_the_directions_of_largest_variance():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    deviations = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    means = rng.normal(size=(20_000, 6)) * deviations @ rotation + np.arange(6)
    latents, shares = latent_walks.principal_traversals(means, rows=3, columns=5, extent=2.0)
    assert latents.shape == (15, 6) and latents.dtype == np.float32
    walks = latents.reshape(3, 5, 6)
    np.testing.assert_allclose(walks[:, 2], np.tile(means.mean(axis=0), (3, 1)), atol=1e-4)
    np.testing.assert_allclose(shares, deviations[:3] ** 2 / (deviations**2).sum(), rtol=0.03)
    ends = walks[:, -1] - walks[:, 0]
    np.testing.assert_allclose(np.linalg.norm(ends, axis=1), 4 * deviations[:3], rtol=0.03)
    along = np.abs((ends / np.linalg.norm(ends, axis=1, keepdims=True) * rotation[:3]).sum(axis=1))
    np.testing.assert_allclose(along, 1, atol=0.01)


def test_the_largest_component_of_a_direction_is_positive():
    means = codes(digits()[0], 8) @ np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    walks = latent_walks.principal_traversals(means, 8, 3)[0].reshape(8, 3, 8)
    ends = walks[:, 2] - walks[:, 0]
    assert (ends[np.arange(8), np.abs(ends).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("count", [1, 2])
def test_traversals_of_few_latents_and_few_images_are_finite(count):
    latents, shares = latent_walks.principal_traversals(np.ones((count, 2), np.float32), rows=10, columns=3)
    assert latents.shape == (6, 2) and shares.shape == (2,)
    assert np.isfinite(latents).all() and np.isfinite(shares).all()


def test_a_great_circle_has_equal_angles_on_the_sphere():
    rng = np.random.default_rng(0)
    starts, ends = rng.normal(size=(2, 6, 50))
    starts, ends = (5 * one / np.linalg.norm(one, axis=1, keepdims=True) for one in (starts, ends))
    latents = latent_walks.great_circles(starts, ends, 11)
    assert latents.shape == (66, 50) and latents.dtype == np.float32
    walks = latents.reshape(6, 11, 50).astype(np.float64)
    np.testing.assert_allclose(walks[:, 0], starts, atol=1e-6)
    np.testing.assert_allclose(walks[:, -1], ends, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(walks, axis=2), 5, rtol=1e-6)
    steps = np.arccos((walks[:, 1:] * walks[:, :-1]).sum(axis=2) / 25)
    np.testing.assert_allclose(steps, np.tile(steps[:, :1], (1, 10)), rtol=1e-4)
    whole = np.arccos((starts * ends).sum(axis=1) / 25)
    np.testing.assert_allclose(steps.sum(axis=1), whole, rtol=1e-5)


def test_between_latents_of_unequal_length_lengths_lie_between():
    latents = latent_walks.great_circles(np.array([[3.0, 0.0]]), np.array([[0.0, 1.0]]), 5)
    lengths = np.linalg.norm(latents, axis=1)
    assert lengths[0] == 3 and lengths[-1] == 1 and (np.diff(lengths) < 0).all()


@pytest.mark.parametrize(
    ("start", "end"), [([2.0], [-1.0]), ([2.0], [3.0]), ([0.0, 0.0], [1.0, 1.0]), ([1.0, 2.0], [-1.0, -2.0])]
)
def test_latents_on_a_line_with_the_origin_are_walked_straight(start, end, recwarn):
    latents = latent_walks.great_circles(np.array([start]), np.array([end]), 5)
    np.testing.assert_allclose(latents, np.linspace(start, end, 5), atol=1e-6)
    assert not recwarn.list
