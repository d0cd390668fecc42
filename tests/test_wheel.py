"""The wheel: it contains the package and nothing else, trains without a checkout, and has types."""

import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.wheel import run_outside


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
    output = run_outside([installed / "gen-dist", "train", *options], tmp_path)
    assert "finished at step 3" in output and (tmp_path / "runs/vae-mnist/samples").is_dir()
    configs = Path(run_outside([installed / "gen-dist", "launchers"], tmp_path).strip()) / "configs"
    assert installed.parent in configs.parents
    accelerate = [installed / "python", "-m", "accelerate.commands.launch"]
    twin = ["--config_file", configs / "one_process.yaml", "-m", "gen_dist.launch.train", *options]
    assert "finished at step 3" in run_outside([*accelerate, *twin, "--run-dir", "twin"], tmp_path)
    code = """
import dataclasses, gen_dist
config = dataclasses.replace(gen_dist.preset("vae-mnist"), steps=3, device="cpu")
print(gen_dist.train(config).step, gen_dist.__file__)
"""
    step, file = run_outside([installed / "python", "-c", code], tmp_path).split()
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
    output = run_outside([*mypy, "user.py"], tmp_path)
    for kind in calls.values():
        assert f'Revealed type is "{kind}"' in output, output
