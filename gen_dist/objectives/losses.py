"""Likelihoods, bounds and adversarial losses: pure functions, one value per image, or per patch that is scored.

Likelihoods and bounds are sums over pixels and latents, in nats; their `dtype` is that of the sum. Use float64 where
differences of large sums are exponentiated, as in importance weights: a float32 sum of 500 nats has a rounding error of
3e-5, which becomes the relative error of every weight and gradient.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from gen_dist.config import GanLoss

LOG_2PI = math.log(2.0 * math.pi)
_LOG_2 = math.log(2.0)


def bernoulli_nll(logits: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-log p(x given z) of independent Bernoulli pixels (Kingma & Welling 2014, appendix C.1).

    With real-valued targets it is the usual cross-entropy, which is not a likelihood: compare such values only with
    each other.

    Args:
        logits: [B, ...], before the sigmoid.
        targets: [B, ...], 0..1.

    Returns:
        [B], nats per image.
    """
    loss: Tensor = _CrossEntropy.apply(logits.float(), targets)
    return loss.flatten(1).sum(1, dtype=dtype)


class _CrossEntropy(torch.autograd.Function):
    """Binary cross-entropy of each pixel: relu(l) - l t - log sigmoid(|l|), with the gradient sigmoid(l) - t.

    Equal to torch's binary_cross_entropy_with_logits up to rounding, at a third of its cost on CPUs, where log1p takes
    fifteen times as long as a logarithm and a sigmoid. Targets get no gradient.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        # No in-place operations here: with them, torch.compile of 2.11 returns wrong gradients without a warning.
        if torch.compiler.is_compiling():
            return torch.addcmul(logits.relu(), logits, targets, value=-1.0) - logits.abs().sigmoid().log()
        log_sigmoid = logits.abs().sigmoid_().log_()
        return torch.addcmul(logits.relu(), logits, targets, value=-1.0).sub_(log_sigmoid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return (logits.sigmoid() - targets) * gradient, None
        return logits.sigmoid().sub_(targets).mul_(gradient), None


def log_likelihoods_of_binary_image(logits: Tensor, target: Tensor) -> Tensor:
    """log p(x given z) of independent Bernoulli pixels: one binary image, many latents, no gradients.

    The negative of `bernoulli_nll` up to rounding, at a third of its cost. A pixel's -softplus((1 - 2 x) l) has no
    difference of large numbers, and up to 16 pixels share one logarithm: that of the product of their sigmoid(|l|),
    each in 0.5..1.

    Args:
        logits: float32 [K, ...], before the sigmoid.
        target: [...], each 0 or 1.

    Returns:
        float64 [K], nats; the sums over pixels are float32.
    """
    signed = logits.flatten(1) * (1.0 - 2.0 * target.flatten())
    linear = signed.clamp(min=0.0).sum(dim=1)
    factors = signed.abs_().sigmoid_()
    for _ in range(4):
        half, rest = divmod(factors.shape[1], 2)
        if rest:
            break
        factors = factors[:, :half] * factors[:, half:]
    return factors.log_().sum(dim=1).double() - linear.double()


def gaussian_nll(means: Tensor, targets: Tensor, log_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-log p(x given z) of pixels with one standard deviation (Kingma & Welling 2014, appendix C.2).

    Args:
        means: [B, ...].
        targets: [B, ...], 0..1.
        log_scale: [], logarithm of the standard deviation in pixel units.

    Returns:
        [B], nats per image; the value of a density, so it may be negative where the scale is small.
    """
    error = (means.float() - targets) * torch.exp(-log_scale)
    return (0.5 * error * error + log_scale + 0.5 * LOG_2PI).flatten(1).sum(1, dtype=dtype)


def laplace_nll(means: Tensor, targets: Tensor, log_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-log p(x given z) of pixels with a Laplace density of one scale b: |x - mean| / b + log(2 b).

    Args:
        means: [B, ...].
        targets: [B, ...], 0..1.
        log_scale: [], logarithm of b in pixel units.

    Returns:
        [B], nats per image; the value of a density, so it may be negative where the scale is small.
    """
    error = (means.float() - targets).abs() * torch.exp(-log_scale)
    return (error + log_scale + _LOG_2).flatten(1).sum(1, dtype=dtype)


def discretized_logistic_nll(
    means: Tensor, targets: Tensor, log_scale: Tensor, step: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """-log P(x given z) of whole numbers: a logistic distribution integrated over the bin of each (Kingma et al. 2016;
    Salimans et al. 2017, eq. 2).

    The bins of the least and the greatest value, 0 and 1, reach to infinity. With sigmoid S and ends a > b of a bin,
    S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)), which has no difference of nearly equal numbers.

    Args:
        means: [B, ...].
        targets: [B, ...], 0..1, multiples of the step.
        log_scale: [], logarithm of the logistic's scale in pixel units.
        step: distance of two neighbouring values in pixel units, 1 / 255 for 8-bit images, [] or [C, 1, 1].

    Returns:
        [B], nats per image, at least 0: divided by log 2 and the number of pixels and channels, the bits per dimension
        of the papers, which are of 8-bit images.
    """
    inverse = torch.exp(-log_scale)
    half = 0.5 * step
    centred = targets - means.float()
    upper, lower = (centred + half) * inverse, (centred - half) * inverse
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    inside = below + above + torch.log(-torch.expm1(-step * inverse))
    nll = -torch.where(targets < half, below, torch.where(targets > 1.0 - half, above, inside))
    return nll.flatten(1).sum(1, dtype=dtype)


def squared_error(means: Tensor, targets: Tensor) -> Tensor:
    """Sum over pixels of (mean - target)^2: float32 [B]."""
    error = means.float() - targets
    return (error * error).flatten(1).sum(1)


def absolute_error(means: Tensor, targets: Tensor) -> Tensor:
    """Sum over pixels of |mean - target|: float32 [B]."""
    return (means.float() - targets).abs().flatten(1).sum(1)


def standard_normal_log_density(values: Tensor) -> Tensor:
    """log N(values; 0, I) in nats: values [B, ...] -> [B]."""
    return -0.5 * (values * values + LOG_2PI).flatten(1).sum(1)


def normal_log_density(values: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(values; mean, exp(logvar)) in nats: each [B, ...] -> [B]."""
    error = values - mean
    return -0.5 * (error * error * torch.exp(-logvar) + logvar + LOG_2PI).flatten(1).sum(1)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Log of the mean importance weight, L_K of Burda et al. 2016, eq. 8.

    Args:
        log_weights: [B, K], log p(x, z_k) - log q(z_k given x).

    Returns:
        [B], nats; a lower bound of log p(x) that grows with K.
    """
    return torch.logsumexp(log_weights, dim=1) - math.log(log_weights.shape[1])


def real_loss(loss: GanLoss, scores: Tensor) -> Tensor:
    """Discriminator loss on real images: scores [B] of images, or [B, h, w] of patches -> the same shape.

    `non_saturating`: -log D(x), Goodfellow et al. 2014, eq. 1. `least_squares`: Mao et al. 2017, eq. 2 with a = 0 and
    b = c = 1. `hinge`: Lim & Ye 2017, eq. 4. `wasserstein`: Arjovsky et al. 2017, eq. 2.
    """
    match loss:
        case "non_saturating":
            return F.softplus(-scores)
        case "least_squares":
            return 0.5 * (scores - 1.0).square()
        case "hinge":
            return F.relu(1.0 - scores)
        case "wasserstein":
            return -scores


def fake_loss(loss: GanLoss, scores: Tensor) -> Tensor:
    """Discriminator loss on generated images, shapes and equations as in `real_loss`."""
    match loss:
        case "non_saturating":
            return F.softplus(scores)
        case "least_squares":
            return 0.5 * scores.square()
        case "hinge":
            return F.relu(1.0 + scores)
        case "wasserstein":
            return scores


def generator_loss(loss: GanLoss, scores: Tensor) -> Tensor:
    """Generator loss of the scores of its images, shapes as in `real_loss`.

    `non_saturating`: -log D(G(z)), Goodfellow et al. 2014, section 3. `least_squares`: Mao et al. 2017, eq. 2.
    """
    match loss:
        case "non_saturating" | "least_squares":
            return real_loss(loss, scores)
        case "hinge" | "wasserstein":
            return -scores


def relativistic_loss(winning_scores: Tensor, losing_scores: Tensor) -> Tensor:
    """-log sigmoid(winning score - losing score) of each pair, of images [B] or of patches [B, h, w].

    Real images are the winners in the discriminator's loss, generated ones in the generator's (Huang et al. 2024, eq.
    2, with f(t) = -log(1 + exp(-t)) as in section 2).
    """
    return F.softplus(losing_scores - winning_scores)


def one_centred_penalty(slopes: Tensor) -> Tensor:
    """(|slope| - 1)^2 of each image (Gulrajani et al. 2017, eq. 3): gradients of scores in images [B, ...] -> [B]."""
    # A norm has no gradient at 0: a critic with zero slope would turn all weights into NaN.
    norms = (slopes.float().flatten(1).square().sum(1) + 1e-12).sqrt()
    return (norms - 1.0).square()


def zero_centred_penalty(slopes: Tensor) -> Tensor:
    """|slope|^2 of each image, R1 or R2 (Mescheder et al. 2018, eq. 9): gradients of scores [B, ...] -> [B]."""
    return slopes.float().flatten(1).square().sum(1)
