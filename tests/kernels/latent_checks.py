"""Checks of the compiled latent kernels against float64."""

from pathlib import Path

import torch

from tests.kernels.accuracy import assert_close
from tests.kernels.kernel_compiler import REPOSITORY
from tests.kernels.latent_calls import Inputs, backward_call, forward_call
from tests.kernels.latent_reference import Reference

LATENTS_ERROR = 2e-6
GRADIENT_ERROR = 1e-6
KL_ERROR = 1e-6
"""Tolerances. Results are sums of terms, each with a few float32 roundings of 2^-24 = 6e-8, and errors are measured in
units of the sum of the terms' sizes (`Reference`): where terms cancel, no float32 arithmetic is nearer to the result.

- float32: 2e-6 absolute for latents of ordinary size, 1e-6 of the terms for gradients.
- bfloat16, float16: 1 unit in the last place of the float64 result rounded once; where terms cancel, the tolerance of
  float32.
- KL: 1e-6 of itself; where posteriors are so near their prior that its terms cancel, 4e-7 of the terms.

These must hold with the largest error that NVIDIA documents for approximate instructions (2^x, square root): 2^-22.5
for each 2^x. A variance in units of the prior's has three of them, so the KL has 1e-6 of its terms.
"""


def check_forward(
    inputs: Inputs, expected: Reference, target: str, directory: Path = REPOSITORY, approximation: float = 0.0
) -> None:
    """Check the forward kernel against float64."""
    call = forward_call(inputs, target)
    call.run(target, directory, approximation)
    latents, kl_nats = call.output("latents_ptr"), call.output("kl_ptr").sum(1)
    # Absolute for latents of ordinary size, relative for those with posterior wider than 1.
    assert_close(latents, expected.latents, expected.latents_scale.clamp(min=1.0), LATENTS_ERROR)
    kl_scale = expected.kl_scale if approximation else torch.maximum(expected.kl_nats, 0.4 * expected.kl_scale)
    assert_close(kl_nats, expected.kl_nats, kl_scale, KL_ERROR)


def check_backward(
    inputs: Inputs,
    expected: Reference,
    target: str,
    directory: Path = REPOSITORY,
    approximation: float = 0.0,
    **of: bool,
) -> None:
    """Check the backward kernel against differentiation in float64; `of` as in `backward_call`."""
    call = backward_call(inputs, target, **of)
    call.run(target, directory, approximation)
    gradient = call.output("parameters_gradient_ptr")
    assert_close(gradient, expected.parameters, expected.parameters_scale, GRADIENT_ERROR)
    assert (call.outputs["prior_gradient_ptr"] is None) == (expected.prior is None)
    if expected.prior is not None and expected.prior_scale is not None:
        assert_close(call.output("prior_gradient_ptr"), expected.prior, expected.prior_scale, GRADIENT_ERROR)
