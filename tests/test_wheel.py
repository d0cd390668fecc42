"""The wheel: it contains the package and nothing else, trains without a checkout, and has types."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

from tests.conftest import REPOSITORY

_BUILD = """
import setuptools.build_meta, sys, tarfile, os
wheel = setuptools.build_meta.build_wheel("dist")
sdist = setuptools.build_meta.build_sdist("dist")
with tarfile.open(os.path.join("dist", sdist)) as archive:
    archive.extractall("unpacked", filter="data")
os.chdir(os.path.join("unpacked", sdist.removesuffix(".tar.gz")))
setuptools.build_meta.build_wheel(".")
"""


def _run(command: Sequence[object], directory: Path, timeout: float = 120) -> str:
    """Output of a command that cannot import this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=directory, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the wheel in dist/, and with the unpacked sdist, which has a second wheel built from it."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("gen_dist", "kernels", "launch", "bench", "tests"):
        copytree(REPOSITORY / folder, tree / folder, symlinks=True, ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        copy(REPOSITORY / file, tree)
    _run([sys.executable, "-c", _BUILD], tree)
    return tree


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of a fresh environment with the wheel; other packages are those of this environment."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # A path in a .pth file adds the packages of this environment, but not its editable installation of gen_dist.
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n")
    (wheel,) = (built / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", home / "bin/python", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "install", "--no-deps", "--no-index", wheel], home)
    return home / "bin"


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_package_alone(built: Path) -> None:
    (wheel,) = (built / "dist").glob("*.whl")
    sources = {
        str(path.relative_to(REPOSITORY)): path.read_bytes()
        for top in ("gen_dist", "gen_dist/kernels", "gen_dist/launch")
        for path in (REPOSITORY / top).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert _contents(wheel) == sources


def test_the_sdist_builds_the_same_wheel(built: Path) -> None:
    wheels = [next((built / "dist").glob("*.whl")), next((built / "unpacked").rglob("*.whl"))]
    assert _contents(wheels[0]) == _contents(wheels[1])


@pytest.mark.slow
def test_the_wheel_trains_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    options = ["vae-mnist", "--steps", 3, "--device", "cpu"]
    output = _run([installed / "gen-dist", "train", *options], tmp_path)
    assert "finished at step 3" in output and (tmp_path / "runs/vae-mnist/samples").is_dir()
    configs = Path(_run([installed / "gen-dist", "launchers"], tmp_path).strip()) / "configs"
    assert installed.parent in configs.parents
    accelerate = [installed / "python", "-m", "accelerate.commands.launch"]
    twin = ["--config_file", configs / "one_process.yaml", "-m", "gen_dist.launch.train", *options]
    assert "finished at step 3" in _run([*accelerate, *twin, "--run-dir", "twin"], tmp_path)
    code = """
import dataclasses, gen_dist
config = dataclasses.replace(gen_dist.preset("vae-mnist"), steps=3, device="cpu")
print(gen_dist.train(config).step, gen_dist.__file__)
"""
    step, file = _run([installed / "python", "-c", code], tmp_path).split()
    assert step == "3" and installed.parent in Path(file).parents


def test_type_checkers_see_the_types_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    calls = {
        "gen_dist.preset('vae-mnist')": "gen_dist.config.training.TrainConfig",
        "gen_dist.load('runs/vae-mnist')": "gen_dist.inference.model.GenerativeModel",
        "gen_dist.train('vae-mnist')": "gen_dist.training.outcome.Outcome",
    }
    code = "\n".join(["import gen_dist", *(f"reveal_type({call})" for call in calls)])
    (tmp_path / "user.py").write_text(code)
    # The types of other packages take a minute and do not matter here.
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = skip\n[mypy-gen_dist.*]\nfollow_imports = silent\n")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", installed / "python", "--config-file", "mypy.ini"]
    output = _run([*mypy, "user.py"], tmp_path)
    for kind in calls.values():
        assert f'Revealed type is "{kind}"' in output, output
