"""Memory layout of the encoder's output and the latents, and the range of log-variances."""

import math

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)
"""Range to which log-variances are clamped, so that one extreme activation does not end a run. NaN passes through."""


def latents_per_sample(parameters: Tensor) -> int:
    """Number of latents per sample and image, for parameters [B, 2C, ...]."""
    return math.prod(parameters.shape[1:]) // 2


def arithmetic_dtype(parameters: Tensor) -> torch.dtype:
    """Dtype of all arithmetic: float32, or float64 for float64 parameters."""
    return torch.promote_types(parameters.dtype, torch.float32)


def memory_format_of(parameters: Tensor) -> torch.memory_format:
    """Memory format of `parameters`: channels_last(_3d) if they are dense in it alone, else contiguous."""
    if not parameters.is_contiguous():
        if parameters.ndim == 4 and parameters.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if parameters.ndim == 5 and parameters.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def run_of_means(parameters: Tensor) -> int:
    """Length of a run of means in dense parameters, before as many log-variances: those of a row, or of a pixel."""
    return latents_per_sample(parameters) if parameters.is_contiguous() else parameters.shape[1] // 2


def empty_latents(parameters: Tensor, samples: int) -> Tensor:
    """Allocate latents [B * samples, C, ...] in the dtype and memory format of `parameters`."""
    rows, channels, *spatial = parameters.shape
    return torch.empty(
        (rows * samples, channels // 2, *spatial),
        dtype=parameters.dtype,
        device=parameters.device,
        memory_format=memory_format_of(parameters),
    )
