"""Reconstruction error and active units: metrics of the encoder."""

from __future__ import annotations

from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.evaluation.reconstructing import reconstructed

LEAST_ACTIVITY = 0.01


def active_units(posterior_means: Tensor) -> int:
    """Latents whose posterior mean [N, ...] varies by more than 0.01 over the data (Burda et al. 2016, section 5.2)."""
    return int((posterior_means.double().var(dim=0) > LEAST_ACTIVITY).sum())


def measure_error(context: Context) -> dict[str, Value]:
    """Mean squared error of the test images, summed over pixels."""
    return {"reconstruction_error": float(reconstructed(context).errors.mean())}


def measure_active_units(context: Context) -> dict[str, Value]:
    """Active units over the test images."""
    return {"active_units": active_units(reconstructed(context).means)}


register(
    Metric(
        name="reconstruction_error",
        label="reconstruction error",
        group="reconstruction",
        better="less",
        meaning="Squared error of test images decoded from their posterior means.",
        needs=("encoder",),
        measure=measure_error,
        stage="posterior",
    )
)
register(
    Metric(
        name="active_units",
        label="active latents",
        group="latents",
        better="more",
        meaning="Latents whose posterior mean varies over the test images.",
        needs=("encoder", "posterior"),
        measure=measure_active_units,
        stage="posterior",
    )
)
