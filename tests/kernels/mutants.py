"""Mutation tests: copies of the kernels with one change to their source, which a check must notice.

A mutant is compiled and executed like the kernels themselves. It is noticed if a check that they pass fails, or if the
executor refuses an operation, such as an access out of bounds.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.kernels.kernel_compiler import REPOSITORY
from tests.kernels.ptx.program import PtxError

Mutation = tuple[str, str, str, str]
"""File, source that occurs there once, its replacement, and the check that must fail."""
Checks = Mapping[str, Callable[[Path], None]]
"""Checks by name, of the kernels in a directory."""


def mutant(directory: Path, file: str, source: str, change: str) -> Path:
    """Copy the kernels with one change to the package `gen_dist.kernels` in the directory."""
    package = directory / "gen_dist" / "kernels"
    shutil.copytree(REPOSITORY / "kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "gen_dist" / "__init__.py").touch()
    text = (package / file).read_text()
    assert text.count(source) == 1, f"{source!r} stands {text.count(source)} times in {file}"
    (package / file).write_text(text.replace(source, change))
    return directory


def is_noticed(checks: Checks, check: str, directory: Path) -> bool:
    """True if the kernels in the directory fail a check."""
    try:
        checks[check](directory)
    except (AssertionError, PtxError):
        return True
    return False


def mutation_tests(
    checks: Checks, quick: Sequence[Mutation], others: Sequence[Mutation]
) -> tuple[Callable[..., None], ...]:
    """Three tests: the kernels themselves pass; each quick mutation is noticed; each other one is, and is slow.

    Checks that no quick mutation needs are slow as well.
    """
    needed = {check for *_, check in quick}

    @pytest.mark.parametrize(
        "check", [check if check in needed else pytest.param(check, marks=pytest.mark.slow) for check in checks]
    )
    def test_the_kernels_themselves_pass(check: str, tmp_path: Path) -> None:
        file, source, *_ = quick[0]
        assert not is_noticed(checks, check, mutant(tmp_path, file, source, source))

    @pytest.mark.parametrize(("file", "source", "change", "check"), quick)
    def test_a_mutation_is_noticed(file: str, source: str, change: str, check: str, tmp_path: Path) -> None:
        assert is_noticed(checks, check, mutant(tmp_path, file, source, change))

    @pytest.mark.slow
    @pytest.mark.parametrize(("file", "source", "change", "check"), others)
    def test_each_other_mutation_is_noticed(file: str, source: str, change: str, check: str, tmp_path: Path) -> None:
        assert is_noticed(checks, check, mutant(tmp_path, file, source, change))

    return test_the_kernels_themselves_pass, test_a_mutation_is_noticed, test_each_other_mutation_is_noticed
