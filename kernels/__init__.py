"""Random draws and the heaviest arithmetic of a training step, as plain functions. Imports nothing from gen_dist."""

from .convolution import DoublingConvolution, HalvingConvolution, pixel_by_pixel
from .group_norm import group_norm_silu
from .group_norm_cpu import computed_again
from .key import Key
from .latent import reparameterize_kl
from .latent_layout import LOGVAR_RANGE
from .linear import Linear
from .noise import binarize, normal
from .places import pixels_at

__all__ = [
    "LOGVAR_RANGE",
    "DoublingConvolution",
    "HalvingConvolution",
    "Key",
    "Linear",
    "binarize",
    "computed_again",
    "group_norm_silu",
    "normal",
    "pixel_by_pixel",
    "pixels_at",
    "reparameterize_kl",
]
