"""KID: the unbiased squared MMD of two sets of features with a cubic kernel (Binkowski et al. 2018, section 3).

It is computed on all pairs, not on random subsets: the estimate is the same each time, and no estimate from these
features has less variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.evaluation import bootstrap
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register

ROWS_PER_CHUNK = 500


def kernel_sum(rows: Tensor, others: Tensor) -> Tensor:
    """Sum of k(x, y) = (x . y / F + 1)^3 over all pairs of rows [M, F] and others [N, F]: float64 []."""
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    wide = others.double().T.contiguous()
    for chunk in rows.double().split(ROWS_PER_CHUNK):
        total += _kernel(chunk @ wide, rows.shape[1]).sum()
    return total


def self_kernel_sum(rows: Tensor, points: Tensor) -> Tensor:
    """The same over all pairs of two different points [N, F], of which `rows` [M, F] are the first ones of pairs."""
    return kernel_sum(rows, points) - _kernel(rows.double().square().sum(dim=1), rows.shape[1]).sum()


def drawn_kernel_sums(rows: Tensor, others: Tensor, row_counts: Tensor, other_counts: Tensor) -> Tensor:
    """`kernel_sum` of drawn sets, float64 [sets]: of rows [M, F] and others [N, F], each there as often as `row_counts`
    [sets, M] and `other_counts` [sets, N] say."""
    total = torch.zeros(len(row_counts), dtype=torch.float64, device=rows.device)
    wide, columns = others.double().T.contiguous(), other_counts.T.contiguous()
    for chunk, counts in zip(rows.double().split(ROWS_PER_CHUNK), row_counts.split(ROWS_PER_CHUNK, dim=1), strict=True):
        total += ((_kernel(chunk @ wide, rows.shape[1]) @ columns) * counts.T).sum(dim=0)
    return total


def squared_mmd(first: Tensor, second: Tensor, between: Tensor, counts: tuple[int, int]) -> float:
    """Squared maximum mean discrepancy, unbiased, so that it may be below 0 (Gretton et al. 2012, eq. 3).

    Args:
        first, second: sums of the kernel over pairs of different points within each set.
        between: sum over all pairs of a point of the first and one of the second.
        counts: points of each, at least 2.
    """
    m, n = counts
    return float(first / (m * (m - 1)) + second / (n * (n - 1)) - 2.0 * between / (m * n))


def _kernel(products: Tensor, features: int) -> Tensor:
    base = products.mul_(1.0 / features).add_(1.0)
    return base.square().mul_(base)  # `** 3` calls pow for each pair


def measure(context: Context) -> dict[str, Value]:
    """KID of the features of the samples and of the images that they are compared with."""
    real, fake = context.compared_features, context.sampled.features

    def among_real() -> Tensor:
        return context.summed(self_kernel_sum(real[slice(*context.share(len(real)))], real))

    mine = fake[slice(*context.share(len(fake)))]
    within = context.summed(self_kernel_sum(mine, fake))
    between = context.summed(kernel_sum(mine, real))
    counts = len(real), len(fake)
    found = squared_mmd(context.compared_reference("kernel_sum", among_real), within, between, counts)
    if context.with_intervals:
        context.intervals["kid"] = bootstrap.interval(found, _drawn_distances(context, real, fake))
    return {"kid": found}


def _drawn_distances(context: Context, real: Tensor, fake: Tensor) -> Tensor:
    """Squared MMD of drawn sets, float64 [sets]. An image that is drawn twice makes no pair with itself."""
    drawn_real, drawn_fake = (
        bootstrap.drawn_counts(len(features), 0, bootstrap.REPLICATES, which).to(features.device)
        for which, features in enumerate((real, fake))
    )

    def within(features: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over pairs of different images, and the numbers of pairs."""
        mine = slice(*context.share(len(features)))
        own = _kernel(features[mine].double().square().sum(dim=1), features.shape[1])
        sums = drawn_kernel_sums(features[mine], features, drawn[:, mine], drawn) - drawn[:, mine].square() @ own
        return context.summed(sums), len(features) ** 2 - drawn.square().sum(dim=1)

    def among_real() -> Tensor:
        return within(real, drawn_real)[0]

    pairs_real = len(real) ** 2 - drawn_real.square().sum(dim=1)
    of_real = context.compared_reference(f"kernel sums of {bootstrap.REPLICATES} drawn sets", among_real)
    of_fake, pairs_fake = within(fake, drawn_fake)
    mine = slice(*context.share(len(fake)))
    between = context.summed(drawn_kernel_sums(fake[mine], real, drawn_fake[:, mine], drawn_real))
    return of_real / pairs_real + of_fake / pairs_fake - 2.0 * between / (len(real) * len(fake))


register(
    Metric(
        name="kid",
        label="KID",
        group="features",
        better="less",
        meaning="Kernel distance of the same features; unlike FID unbiased for few samples.",
        needs=("samples", "features", "reference images"),
        counts="samples",
        named_after="other features",
        of_reference=True,
        measure=measure,
        rests_on_features=True,
    )
)
