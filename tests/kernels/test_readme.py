"""The byte table of kernels/README.md equals the counts of the code."""

import re

import pytest
import torch

from bench.gpu.kernels import byte_table
from tests.conftest import REPOSITORY


def test_the_byte_table_is_what_is_counted() -> None:
    tested = re.search(r"^torch==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert tested is not None
    if not torch.__version__.startswith(tested[1]):
        pytest.skip(f"other versions of torch than {tested[1]} may run other operators")
    assert byte_table() in (REPOSITORY / "kernels/README.md").read_text()
