"""Weight of an adversarial term that gives two terms equal gradients at the decoder's end (Esser et al. 2021, eq. 7).

With W the weight of the decoder's last convolution, the weight is |d error / d W| / (|d adversary / d W| + 1e-4). Both
terms are functions of the decoded images x' alone, so one backward pass through the decoder is enough:

- each term's gradient in x', its slopes, is computed on a leaf with the values of x';
- W's two gradients are a convolution's weight gradients, of the maps before it and of the slopes;
- with the slopes as constants, sum(x' * (slopes of the error + weight * slopes of the adversary)) has the gradient of
  the weighted sum of the two terms in all weights of encoder and decoder.

W's gradients are sums over the images of all micro-batches and processes, before their norms. The host reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_dist.errors import ConfigError
from gen_dist.networks import Decoder

FLOOR = 1e-4
"""Added to the norm of the adversary's gradient, as in the code of Esser et al. 2021."""


class Slopes(NamedTuple):
    """A term of some images, without a graph."""

    total: Tensor
    """Sum over the images, []."""
    slopes: Tensor
    """Gradient of the sum in the images, float32 [B, C, H, W]."""
    logs: dict[str, Tensor]
    """One value for each image, [B]."""


def last_convolution(decoder: nn.Module) -> nn.Conv2d:
    """The convolution from a decoder's `features` to its images.

    Raises:
        ConfigError: the decoder does not end so.
    """
    last = getattr(decoder, "last_convolution", None)
    if not isinstance(last, nn.Conv2d):
        raise ConfigError(
            f"adaptive_weight needs a decoder that ends with a convolution, and {type(decoder).__name__} does not say "
            "that it does; use --no-adaptive-weight, or --decoder autoencoder-kl"
        )
    return last


def features_and_images(decoder: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, F, H, W] before the last convolution, and the decoded images float32 [B, C, H, W]."""
    assert isinstance(decoder, Decoder)
    features = decoder.features(latents)
    return features, last_convolution(decoder)(features).float()


def slopes_of(term: Callable[[Tensor], tuple[Tensor, Mapping[str, Tensor]]], images: Tensor) -> Slopes:
    """Gradient of a term in images. Weights get no gradients.

    Args:
        term: from images to one value for each, [B], and its logs.
        images: float32 [B, C, H, W].
    """
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        values, logs = term(leaf)
        total = values.sum()
    with torch.autocast(images.device.type, enabled=False):  # like `backward`, which runs outside autocast
        (slopes,) = torch.autograd.grad(total, leaf)
    return Slopes(total.detach(), slopes, {name: value.detach() for name, value in logs.items()})


def weight_gradients(features: Tensor, last: nn.Conv2d, slopes: Sequence[Tensor]) -> Tensor:
    """Gradients in the last convolution's weight: one row for each of the slopes, float32 [terms, weights]."""
    features = features.detach()
    if features.dtype == torch.float16:  # sums over all places would overflow
        features = features.float()
    stacked = torch.cat(list(slopes), dim=1).to(features.dtype)
    # One convolution for all terms: the outputs of each are channels of it.
    weight = last.weight.detach().to(features.dtype).repeat(len(slopes), 1, 1, 1)
    with torch.autocast(features.device.type, enabled=False):
        gradient = torch.ops.aten.convolution_backward(
            stacked,
            features,
            weight,
            None,
            last.stride,
            last.padding,
            last.dilation,
            False,
            [0, 0],
            1,
            [False, True, False],
        )[1]
    return gradient.float().reshape(len(slopes), -1)


def balance(gradients: Tensor, limit: float) -> Tensor:
    """Weight float32 [] of the second term from both gradients, [2, weights], which are means over all images.

    `limit` is the largest weight.
    """
    first, second = torch.linalg.vector_norm(gradients, dim=1)
    return (first / (second + FLOOR)).clamp(0.0, limit)
