"""Precision of torch's arithmetic in float32: read, put back, and set to all 24 bits of it.

Torch has two interfaces: the names of the time before 2.9 (`allow_tf32`, `get_float32_matmul_precision`), and
`fp32_precision` of each backend. The older names raise RuntimeError where a user set the newer ones to something that
the older cannot say. Torch is not imported here, since `--help` does without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_FULL = ("none", "ieee")
_CONVOLUTIONS = slice(2, 4)
"""Places of cuDNN's convolutions and recurrent networks among the owners."""
DEFAULT = ("highest", True, *(2 * ("none",)), *(2 * ("tf32",)), *(5 * ("none",)))
"""Values of `read` after the import of torch."""


def read() -> tuple[Any, ...]:
    """Give the values of both interfaces. None stands for one that the older interface cannot say."""
    products, convolutions = _or_none(_torch().get_float32_matmul_precision), _or_none(_convolutions_may_be_tf32)
    return (products, convolutions, *(owner.fp32_precision for owner in _owners()))


def put_back(values: tuple[Any, ...]) -> None:
    """Set what differs from `values`, which `read` gave."""
    products, convolutions, *precisions = values
    if convolutions is None:  # it then contradicted the newer interface
        convolutions = precisions[_CONVOLUTIONS] != ["tf32", "tf32"]
    if products not in (None, _or_none(_torch().get_float32_matmul_precision)):
        _torch().set_float32_matmul_precision(products)
    for owner, value in zip(_owners(), precisions, strict=True):
        if owner.fp32_precision != value:
            _set(owner, value)
    if convolutions != _or_none(_convolutions_may_be_tf32):
        cudnn = _torch().backends.cudnn
        cudnn.allow_tf32 = convolutions  # sets the two below as well
        for owner, value in zip((cudnn.conv, cudnn.rnn), precisions[_CONVOLUTIONS], strict=True):
            _set(owner, value)


def use_all_bits(of_cudnn: bool) -> None:
    """Have float32 mean float32, whatever was set by the user, a launcher or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.

    Both interfaces then say so, and none of them raises.

    Args:
        of_cudnn: convolutions and recurrent networks on GPUs, too. Torch's default for them, which is TF32 unless a
            parent says otherwise, can be given back as TF32 alone.
    """
    cudnn = _torch().backends.cudnn
    for owner in _owners():
        if owner.fp32_precision not in _FULL and (of_cudnn or owner not in (cudnn.conv, cudnn.rnn)):
            owner.fp32_precision = "ieee"
    if _or_none(_torch().get_float32_matmul_precision) != "highest":
        _torch().set_float32_matmul_precision("highest")
    if of_cudnn and _or_none(_convolutions_may_be_tf32) is not False:
        cudnn.allow_tf32 = False


def _set(owner: Any, value: str) -> None:
    """Set a precision, unless the owner inherits it: its own would hide that of its parent from now on."""
    owner.fp32_precision = "none"
    if owner.fp32_precision != value:
        owner.fp32_precision = value


def _owners() -> list[Any]:
    """Holders of a precision, each before those that inherit it."""
    backends = _torch().backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    on_gpu = [cudnn, cudnn.conv, cudnn.rnn, backends.cuda.matmul]
    return [backends, *on_gpu, mkldnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _convolutions_may_be_tf32() -> bool:
    return bool(_torch().backends.cudnn.allow_tf32)


def _or_none(value: Callable[[], Any]) -> Any:
    try:
        return value()
    except RuntimeError:  # the interfaces disagree
        return None


def _torch() -> Any:
    return sys.modules["torch"]
