"""Latents to decode into pictures: a grid over the prior, walks along principal directions, great circles."""

from __future__ import annotations

import statistics

import numpy as np
from numpy.typing import NDArray

MOST_DIRECTIONS = 1024
"""Most values of one image's latents whose covariance is computed."""


def manifold_latents(columns: int, rows: int) -> NDArray[np.float32]:
    """Two latents on a grid of equal steps in prior probability (Kingma & Welling 2014, appendix A).

    Returns:
        float32 [rows * columns, 2], row by row from the top left. The first latent grows to the right, the second one
        upwards. Each is the inverse normal CDF of the centres of equal parts of (0, 1).
    """
    normal = statistics.NormalDist()
    across = [normal.inv_cdf((i + 0.5) / columns) for i in range(columns)]
    upwards = [normal.inv_cdf((i + 0.5) / rows) for i in range(rows)]
    return np.array([(x, y) for y in reversed(upwards) for x in across], dtype=np.float32)


def principal_traversals(
    posterior_means: NDArray[np.floating], rows: int, columns: int, extent: float = 2.5
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Straight walks through the mean of the aggregate posterior along its principal directions.

    Args:
        posterior_means: [N, D], N >= 1. A single point has no direction: all walks stay there.
        rows: number of directions, at most D. Those of largest variance come first.
        columns: latents of one walk.
        extent: distance of both ends from the mean, in standard deviations along the direction.

    Returns:
        latents: float32 [rows * columns, D], row by row from -extent to +extent. The sign of a direction makes its
            largest component positive.
        shares: float64 [rows], share of the variance in each direction, 0..1.
    """
    mean, directions, deviations, shares = principal_directions(posterior_means)
    rows = min(rows, len(directions))
    walk = np.linspace(-extent, extent, columns)
    offsets = walk[None, :, None] * (deviations[:rows, None] * directions[:rows])[:, None, :]
    latents = (mean + offsets).reshape(rows * columns, -1).astype(np.float32)
    return latents, shares[:rows]


def great_circles(starts: NDArray[np.floating], ends: NDArray[np.floating], columns: int) -> NDArray[np.float32]:
    """Walks from each start to its end by spherical interpolation (White 2016).

    Latents of a standard normal prior lie near a sphere. A straight walk would cross its inside, which has none.

    Args:
        starts: [rows, *shape], latents of any shape.
        ends: [rows, *shape].
        columns: latents of one walk with both of its ends, at least 2.

    Returns:
        float32 [rows * columns, *shape], walk by walk. A walk is straight if start, end and origin lie on one line,
        because then no great circle is the shortest.
    """
    fractions = np.broadcast_to(np.linspace(0.0, 1.0, columns), (len(starts), columns))
    rows, *shape = starts.shape
    walks = on_great_circles(starts.reshape(rows, -1), ends.reshape(rows, -1), fractions)
    return walks.reshape(rows * columns, *shape)


def on_great_circles(
    starts: NDArray[np.floating], ends: NDArray[np.floating], fractions: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Points of the walks of `great_circles` between vectors [rows, D], at fractions [rows, columns] of the way.

    Returns:
        float32 [rows * columns, D], walk by walk.
    """
    starts, ends = starts.astype(np.float64), ends.astype(np.float64)
    norms = np.linalg.norm(starts, axis=1) * np.linalg.norm(ends, axis=1)
    cosines = (starts * ends).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    angles = np.arccos(np.clip(cosines, -1.0, 1.0))[:, None]
    on_a_line = (np.sin(angles) < 1e-6) | (norms[:, None] == 0)
    sines = np.where(on_a_line, 1.0, np.sin(angles))
    start_weights = np.where(on_a_line, 1.0 - fractions, np.sin((1.0 - fractions) * angles) / sines)
    end_weights = np.where(on_a_line, fractions, np.sin(fractions * angles) / sines)
    walks = start_weights[:, :, None] * starts[:, None, :] + end_weights[:, :, None] * ends[:, None, :]
    return walks.reshape(fractions.size, -1).astype(np.float32)


def principal_directions(
    points: NDArray[np.floating],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Principal components of points [N, D]: mean [D], directions [K, D] in rows, standard deviations [K] and shares of
    the variance [K], the largest first. K is D, and at most N beyond MOST_DIRECTIONS."""
    if points.ndim != 2 or points.size == 0:
        raise ValueError(f"expected [N, D] with N >= 1, got {list(points.shape)}")
    points = points.astype(np.float64)
    mean = points.mean(axis=0)
    centred = points - mean
    if points.shape[1] <= MOST_DIRECTIONS:
        _, variances, directions = np.linalg.svd(centred.T @ centred / max(len(points) - 1, 1), hermitian=True)
    else:  # latents with places: their covariance would be larger than the points
        _, deviations, directions = np.linalg.svd(centred, full_matrices=False)
        variances = deviations**2 / max(len(points) - 1, 1)
    largest = np.argmax(np.abs(directions), axis=1)
    directions *= np.where(directions[np.arange(len(directions)), largest] < 0, -1.0, 1.0)[:, None]
    total = variances.sum()
    shares = variances / total if total > 0 else np.zeros_like(variances)
    return mean, directions, np.sqrt(variances), shares
