"""Classes of diffusers, if it is installed, and outputs that equal theirs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from gen_dist.config import AutoencoderKlConfig

SMALL = AutoencoderKlConfig(feature_maps=(8, 16), blocks=1, groups=4, latent_dim=2)


def diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="needs `pip install -e '.[diffusers]'`")


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Assert that the largest difference is below 1e-5 of the range of the outputs."""
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-5 * float(other.max() - other.min())
