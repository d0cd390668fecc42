"""Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020): two sets in each other's balls.

The ball of a point is open; its radius is the distance to the k-th nearest other point of its own set. So two equal
sets have density 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.parallel.collectives import rows_of_all

NEIGHBOURS = 5
"""k of all four metrics, as in Naeem et al."""
ROWS_PER_CHUNK = 500


class BallCounts(NamedTuple):
    """Counts of points in balls, for some of the real points. Counts of all of them are their sums."""

    around_fakes: Tensor
    """int64 [N]: balls of real points that each of the N fakes lies in."""
    covered: Tensor
    """int64 []: real points whose ball has a fake in it."""
    recalled: Tensor
    """int64 []: real points that lie in a fake's ball."""

    def metrics(self, real_points: int, neighbours: int = NEIGHBOURS) -> dict[str, float]:
        """The four metrics from the counts of all real points. All but density are in 0..1."""
        fakes = len(self.around_fakes)
        return {
            "precision": int((self.around_fakes > 0).sum()) / fakes,
            "recall": int(self.recalled) / real_points,
            "density": int(self.around_fakes.sum()) / (neighbours * fakes),
            "coverage": int(self.covered) / real_points,
        }


def neighbour_radii(points: Tensor, first: int, last: int, neighbours: int = NEIGHBOURS) -> Tensor:
    """Squared distance of points[first:last] to their k-th nearest other point of all [N, F]: float64 [last - first].

    N is at least k + 1.
    """
    parts = []
    for start in range(first, last, ROWS_PER_CHUNK):
        end = min(start + ROWS_PER_CHUNK, last)
        distances = _squared_distances(points[start:end], points)
        places = torch.arange(end - start, device=points.device)
        distances[places, places + start] = torch.inf  # a point is no neighbour of itself, though its copies are
        parts.append(distances.topk(neighbours, dim=1, largest=False).values[:, -1])
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=points.device)


def ball_counts(real: Tensor, real_radii: Tensor, fakes: Tensor, fake_radii: Tensor) -> BallCounts:
    """Counts of some real points [M, F] and all fakes [N, F], with their `neighbour_radii` [M] and [N]."""
    around_fakes = torch.zeros(len(fakes), dtype=torch.int64, device=fakes.device)
    covered, recalled = (torch.zeros((), dtype=torch.int64, device=fakes.device) for _ in range(2))
    for chunk, radii in zip(real.split(ROWS_PER_CHUNK), real_radii.split(ROWS_PER_CHUNK), strict=True):
        distances = _squared_distances(chunk, fakes)
        inside = distances < radii[:, None]
        around_fakes += inside.sum(dim=0)
        covered += inside.any(dim=1).sum()
        recalled += (distances < fake_radii).any(dim=1).sum()
    return BallCounts(around_fakes, covered, recalled)


def _squared_distances(rows: Tensor, points: Tensor) -> Tensor:
    """float64 [M, N]: in float32 the difference of large norms would leave little of small distances."""
    rows, points = rows.double(), points.double()
    squares = rows.square().sum(dim=1)[:, None] + points.square().sum(dim=1)
    return torch.addmm(squares, rows, points.T, alpha=-2.0).clamp_(min=0.0)


def four_metrics(context: Context) -> dict[str, float]:
    """Precision, recall, density and coverage of the samples and of the images that they are compared with."""

    def compute() -> dict[str, float]:
        real, fakes = context.compared_features, context.sampled.features

        def radii_of_all(points: Tensor) -> Tensor:
            return rows_of_all(neighbour_radii(points, *context.share(len(points))), context.processes)

        real_radii = context.compared_reference(f"radii of neighbour {NEIGHBOURS}", lambda: radii_of_all(real))
        mine = slice(*context.share(len(real)))
        counts = ball_counts(real[mine], real_radii[mine], fakes, radii_of_all(fakes))
        return BallCounts(*(context.summed(count) for count in counts)).metrics(len(real))

    return context.once("four metrics of neighbours", compute)


def _register(name: str, meaning: str) -> None:
    def measure(context: Context) -> dict[str, Value]:
        return {name: four_metrics(context)[name]}

    register(
        Metric(
            name=name,
            label=name,
            group="features",
            better="more",
            meaning=meaning,
            needs=("samples", "features", "reference images"),
            counts="samples",
            named_after="other features",
            of_reference=True,
            measure=measure,
            stage="neighbours",
            rests_on_features=True,
        )
    )


_register("precision", "Share of the samples that lie among real images: fidelity.")
_register("recall", "Share of the real images that lie among samples: variety.")
_register("density", "How many real images' neighbourhoods a sample lies in, over what is expected.")
_register("coverage", "Share of the real images with a sample in their neighbourhood.")
