"""The dtype of the networks' arithmetic."""

from __future__ import annotations

import os

import torch

from gen_dist.config import Precision
from gen_dist.errors import ConfigError


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Choose the dtype of the networks' arithmetic: the config's, else Accelerate's at launch, else the best.

    Raises:
        ConfigError: bf16 on a GPU without it, or Accelerate was given a precision that is none of ours.
    """
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("no", "fp16", "bf16"):
            raise ConfigError(
                f"ACCELERATE_MIXED_PRECISION is {launched!r}, which this trainer lacks; launch with --mixed_precision "
                "no, fp16 or bf16, unset the variable, or use --precision"
            )
        if launched != "no":
            precision = "bf16" if launched == "bf16" else "fp16"
        else:
            precision = "bf16" if _gpu_has_bf16(device) else "float32"
    if precision == "bf16" and device.type == "cuda" and not _gpu_has_bf16(device):
        raise ConfigError("precision bf16 was asked for, but this GPU lacks it; use --precision fp16 or float32")
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _gpu_has_bf16(device: torch.device) -> bool:
    """True if this is a GPU with bf16 arithmetic in hardware; emulation is slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
