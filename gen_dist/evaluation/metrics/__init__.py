"""What trained models are judged by: pure functions of features, images and log-weights, none of which knows a model.

Sums over pairs and rows come in parts, for the rows of one process, so that many processes add theirs up exactly.
"""

from gen_dist.evaluation.metrics.appearance import LARGEST_SIDE, laplacian_variances, pair_distance_sum, pixel_points
from gen_dist.evaluation.metrics.frechet import Moments, frechet_distance, moments
from gen_dist.evaluation.metrics.kernel import kernel_sum, self_kernel_sum, squared_mmd
from gen_dist.evaluation.metrics.latents import active_units, bits_per_dimension
from gen_dist.evaluation.metrics.neighbours import NEIGHBOURS, BallCounts, ball_counts, neighbour_radii

__all__ = [
    "LARGEST_SIDE",
    "NEIGHBOURS",
    "BallCounts",
    "Moments",
    "active_units",
    "ball_counts",
    "bits_per_dimension",
    "frechet_distance",
    "kernel_sum",
    "laplacian_variances",
    "moments",
    "neighbour_radii",
    "pair_distance_sum",
    "pixel_points",
    "self_kernel_sum",
    "squared_mmd",
]
