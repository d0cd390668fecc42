"""The training step's random draws and heaviest arithmetic behind plain functions. Imports nothing of gen_dist."""

from .convolution import DoublingConvolution, HalvingConvolution, pixel_by_pixel
from .key import Key
from .latent import LOGVAR_RANGE, reparameterize_kl
from .linear import Linear
from .noise import binarize, normal

__all__ = [
    "LOGVAR_RANGE",
    "DoublingConvolution",
    "HalvingConvolution",
    "Key",
    "Linear",
    "binarize",
    "normal",
    "pixel_by_pixel",
    "reparameterize_kl",
]
