"""The byte tables of kernels/README.md equal the counts of the code."""

import re

import pytest
import torch

from bench.gpu import group_norm_bytes
from bench.gpu.kernels import byte_table
from tests.conftest import REPOSITORY


def skip_other_versions_of_torch() -> None:
    """Skip a test of tables that other versions of torch than the tested one do not give."""
    tested = re.search(r"^torch==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert tested is not None
    if not torch.__version__.startswith(tested[1]):
        pytest.skip(f"other versions of torch than {tested[1]} may run other operators")


def test_the_byte_table_is_what_is_counted() -> None:
    skip_other_versions_of_torch()
    assert byte_table() in (REPOSITORY / "kernels/README.md").read_text()


def test_the_fused_column_of_group_norm_is_what_its_launches_move() -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    guide = (REPOSITORY / "kernels/README.md").read_text()
    for name, maps in group_norm_bytes.cases().items():
        row = re.search(rf"^\| {name} \|.*\| (.*?) \|$", guide, re.MULTILINE)
        assert row is not None, name
        assert row[1] == group_norm_bytes.cell(group_norm_bytes.of_kernels(maps), maps), name


@pytest.mark.slow
def test_the_byte_table_of_group_norm_is_what_is_counted() -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    skip_other_versions_of_torch()
    assert group_norm_bytes.byte_table() in (REPOSITORY / "kernels/README.md").read_text()
