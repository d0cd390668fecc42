"""Random draws and latent-space arithmetic of the training step, behind plain functions. Imports nothing of gen_dist."""

from kernels.latent import LOGVAR_RANGE, reparameterize_kl
from kernels.noise import binarize, normal

__all__ = ["LOGVAR_RANGE", "binarize", "normal", "reparameterize_kl"]
