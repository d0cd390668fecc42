"""KID: the unbiased squared MMD of two sets of features with a cubic kernel (Binkowski et al. 2018, section 3).

It is computed on all pairs, not on random subsets: the estimate is the same each time, and no estimate from these
features has less variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    """KID of the samples' and the test images' features."""
    real, fake = context.real.features, context.sampled.features

    def among_real() -> Tensor:
        return context.summed(self_kernel_sum(real[slice(*context.share(len(real)))], real))

    mine = fake[slice(*context.share(len(fake)))]
    within = context.summed(self_kernel_sum(mine, fake))
    between = context.summed(kernel_sum(mine, real))
    counts = len(real), len(fake)
    return {"kid": squared_mmd(context.reference("kernel_sum", among_real), within, between, counts)}


register(
    Metric(
        name="kid",
        label="KID",
        group="features",
        better="less",
        meaning="Kernel distance of the same features; unlike FID unbiased for few samples.",
        needs=("samples", "features", "test images"),
        counts="samples",
        measure=measure,
        rests_on_features=True,
    )
)
