"""FID: the Frechet distance of two sets of features, each taken as normally distributed (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist.evaluation import bootstrap
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.parallel.collectives import rows_of_all


class Moments(NamedTuple):
    """Moments of a set of features, in float64: small distances would drown in the rounding of float32 sums."""

    mean: Tensor
    """[F]."""
    covariance: Tensor
    """[F, F], unbiased: divided by one less than the number of features."""


def moments(features: Tensor) -> Moments:
    """Moments of features [N, F], N >= 2."""
    wide = features.double()
    mean = wide.mean(dim=0)
    centred = wide - mean
    return Moments(mean, centred.T @ centred / (len(wide) - 1))


def drawn_moments(features: Tensor, counts: Tensor) -> Moments:
    """Moments of features [N, F] of which each is there `counts` [N] times, N together."""
    wide = features.double()
    mean = counts @ wide / len(wide)
    centred = (wide - mean) * counts.sqrt()[:, None]
    return Moments(mean, centred.T @ centred / (len(wide) - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson & Landau 1982).

    (S1 S2)^(1/2) has the trace of (R S2 R)^(1/2) with R = S1^(1/2), which is symmetric: two symmetric eigenvalue
    problems in float64 are exact and real where the square root of S1 S2 is neither, as with fewer images than
    features. The distance of two sets of one distribution is above 0, by more the fewer they are: compare figures of
    equal numbers alone.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    # Rounding leaves eigenvalues of about -1e-16 where covariances are singular.
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0.0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum()
    distance = distance + first.covariance.trace() + second.covariance.trace() - 2.0 * cross
    return max(0.0, float(distance))


def measure(context: Context) -> dict[str, Value]:
    """FID of the features of the samples and of the images that they are compared with."""
    real, fake = context.compared_features, context.sampled.features
    found = frechet_distance(moments(real), moments(fake))
    if context.with_intervals:
        context.intervals["fid"] = bootstrap.interval(found, _drawn_distances(context, real, fake), least=0.0)
    return {"fid": found}


def _drawn_distances(context: Context, real: Tensor, fake: Tensor) -> Tensor:
    """Distances of drawn sets, float64 [sets]. Each process computes its share of them."""
    sets = bootstrap.REPLICATES if real.shape[1] <= bootstrap.WIDE else bootstrap.REPLICATES_OF_WIDE_FEATURES
    first, last = context.share(sets)
    found = []
    for one in context.in_logs(range(first, last), "interval of the Frechet distance", "set"):
        drawn = [
            drawn_moments(features, bootstrap.drawn_counts(len(features), one, one + 1, which)[0].to(features.device))
            for which, features in enumerate((real, fake))
        ]
        found.append(frechet_distance(*drawn))
    return rows_of_all(torch.tensor(found, dtype=torch.float64, device=real.device), context.processes)


register(
    Metric(
        name="fid",
        label="FID",
        group="features",
        better="less",
        meaning="Fréchet distance of the features of samples and of real images.",
        needs=("samples", "features", "reference images"),
        counts="samples",
        named_after="other features",
        of_reference=True,
        measure=measure,
        rests_on_features=True,
    )
)
