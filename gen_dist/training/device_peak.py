"""Peak arithmetic of a device: the vendor's figure for known GPUs, a measured matrix product on CPUs."""

from __future__ import annotations

import functools
import re
import time

import torch
from torch import Tensor

from gen_dist.kernels.linear import onednn_is_faster, onednn_linear

# Dense tensor-core products in 16 bits, and float32 without TF32, in TFLOP/s, from NVIDIA's data sheets of the products
# (nvidia.com/data-center: H200, H100, L40S, L4, A100, A30, A10, V100, T4). Those with a figure for sparse matrices give
# twice the dense one. The first pattern that the device's name matches counts.
_GPUS = (
    (r"H200 NVL|H100 NVL", 835.5, 60.0),
    (r"H200|GH200|H100 80GB HBM3|H100 SXM", 989.4, 66.9),
    (r"H100 PCIe", 756.0, 51.2),
    (r"L40S", 362.05, 91.6),
    (r"L4$", 121.0, 30.3),
    (r"A100", 312.0, 19.5),
    (r"A30", 165.0, 10.3),
    (r"A10$", 125.0, 31.2),
    (r"V100-SXM", 125.0, 15.7),
    (r"V100-PCIE", 112.0, 14.0),
    (r"T4$", 65.0, 8.1),
)
_WITHOUT_BF16 = re.compile("V100|T4$")
"""GPUs whose tensor cores have no bf16."""
_SIDE = 512
"""Rows and columns of the measured matrices: 3 ms on a core of 100 GFLOP/s."""
_TRIALS = 5


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second that a device can do in a dtype; None if it is an unknown GPU."""
    if device.type == "cuda":
        return vendor_peak(torch.cuda.get_device_name(device), dtype)
    return _measured(dtype, torch.get_num_threads())


def vendor_peak(name: str, dtype: torch.dtype) -> float | None:
    """Peak of a GPU by its name, in operations a second; None if it is not in the table, or a part of a GPU (MIG)."""
    if " MIG " in name:
        return None
    found = next(((half, single) for pattern, half, single in _GPUS if re.search(pattern, name)), None)
    if found is None or (dtype == torch.bfloat16 and _WITHOUT_BF16.search(name)):
        return None
    return 1e12 * (found[1] if dtype == torch.float32 else found[0])


@functools.cache
def _measured(dtype: torch.dtype, _threads: int) -> float:
    """Operations a second of a matrix product by this process's threads, in the faster of torch's libraries.

    The best of a few: other programs only take time.
    """
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)

    def product() -> Tensor:
        if dtype == torch.float32 and onednn_is_faster():
            return onednn_linear(matrix, matrix)
        return torch.mm(matrix, matrix)

    product()
    seconds = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return float(2 * _SIDE**3 / min(seconds))
