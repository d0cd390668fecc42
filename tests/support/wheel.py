"""The wheel of this checkout, and an environment in which it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_BUILD = """
import setuptools.build_meta, sys, tarfile, os
wheel = setuptools.build_meta.build_wheel("dist")
sdist = setuptools.build_meta.build_sdist("dist")
with tarfile.open(os.path.join("dist", sdist)) as archive:
    archive.extractall("unpacked", filter="data")
os.chdir(os.path.join("unpacked", sdist.removesuffix(".tar.gz")))
setuptools.build_meta.build_wheel(".")
"""


def run_outside(command: Sequence[object], directory: Path, timeout: float = 120, **variables: str) -> str:
    """Output of a command that cannot import this checkout, with some environment variables changed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=directory, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(tree: Path) -> None:
    """Build in an empty directory: the wheel in dist/, and the unpacked sdist with a second wheel built from it."""
    for folder in ("gen_dist", "kernels", "launch", "bench", "tests"):
        copytree(REPOSITORY / folder, tree / folder, symlinks=True, ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        copy(REPOSITORY / file, tree)
    run_outside([sys.executable, "-c", _BUILD], tree)


def install(built: Path, home: Path) -> Path:
    """Install the wheel of a built tree in a new environment; other packages are those of this environment.

    Returns:
        the directory of its scripts.
    """
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # A path in a .pth file adds the packages of this environment, but not its editable installation of gen_dist.
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n")
    (wheel,) = (built / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", home / "bin/python", "--quiet", "--disable-pip-version-check"]
    run_outside([*pip, "install", "--no-deps", "--no-index", wheel], home)
    return home / "bin"
