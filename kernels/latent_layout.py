"""How the encoder's output and the latents lie in memory, and the range of log-variances."""

import math

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this range, so that one wild activation does not end a run. NaN passes through."""


def latents_per_sample(parameters: Tensor) -> int:
    """Latents of one sample of one image, from parameters [B, 2C, ...]."""
    return math.prod(parameters.shape[1:]) // 2


def arithmetic_dtype(parameters: Tensor) -> torch.dtype:
    """The dtype that everything is computed in."""
    return torch.promote_types(parameters.dtype, torch.float32)


def memory_format_of(parameters: Tensor) -> torch.memory_format:
    """channels_last or channels_last_3d where `parameters` are dense in it and not contiguous as well."""
    if not parameters.is_contiguous():
        if parameters.ndim == 4 and parameters.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if parameters.ndim == 5 and parameters.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def run_of_means(parameters: Tensor) -> int:
    """How many means lie side by side in dense parameters, before as many log-variances: a row's, or a pixel's."""
    return latents_per_sample(parameters) if parameters.is_contiguous() else parameters.shape[1] // 2


def empty_latents(parameters: Tensor, samples: int) -> Tensor:
    """Memory for latents [B * samples, C, ...], dtype and memory format of `parameters`."""
    rows, channels, *spatial = parameters.shape
    return torch.empty(
        (rows * samples, channels // 2, *spatial),
        dtype=parameters.dtype,
        device=parameters.device,
        memory_format=memory_format_of(parameters),
    )
