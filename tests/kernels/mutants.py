"""Copies of the kernels with one change to their source."""

import shutil
from pathlib import Path

from tests.kernels.kernel_compiler import REPOSITORY


def mutant(directory: Path, file: str, source: str, change: str) -> Path:
    """Copy the kernels with one change to the package `gen_dist.kernels` in the directory."""
    package = directory / "gen_dist" / "kernels"
    shutil.copytree(REPOSITORY / "kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "gen_dist" / "__init__.py").touch()
    text = (package / file).read_text()
    assert text.count(source) == 1, f"{source!r} stands {text.count(source)} times in {file}"
    (package / file).write_text(text.replace(source, change))
    return directory
