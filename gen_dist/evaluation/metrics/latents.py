"""Reconstruction error and active units: metrics of the encoder."""

from __future__ import annotations

from torch import Tensor

from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metric import Metric, Value, register
from gen_dist.objectives.phase import unit_interval

LEAST_ACTIVITY = 0.01


def active_units(posterior_means: Tensor) -> int:
    """Latents whose posterior mean [N, ...] varies by more than 0.01 over the data (Burda et al. 2016, section 5.2)."""
    return int((posterior_means.double().var(dim=0) > LEAST_ACTIVITY).sum())


def _means_and_errors(context: Context) -> tuple[Tensor, Tensor]:
    """Posterior means [N, *latent_shape] and squared errors float64 [N] of the test images, once for both metrics."""
    objective = context.objective

    def compute(first: int, last: int) -> tuple[Tensor, ...]:
        images = context.test_batch(first, last).images
        means, _ = objective.encode(images)
        reconstructed = objective.pixels(objective.decode(means)).double()
        return means, (reconstructed - unit_interval(images)).square().flatten(1).sum(dim=1)

    def measure() -> tuple[Tensor, Tensor]:
        means, errors = context.rows(len(context.dataset.test.images), "posterior", compute)
        return means, errors

    return context.once("means and errors", measure)


def measure_error(context: Context) -> dict[str, Value]:
    """Mean squared error of the test images, summed over pixels."""
    return {"reconstruction_error": float(_means_and_errors(context)[1].mean())}


def measure_active_units(context: Context) -> dict[str, Value]:
    """Active units over the test images."""
    return {"active_units": active_units(_means_and_errors(context)[0])}


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
