"""The set-up: light imports, no foreign `kernels`, enforced layers without cycles, pinned versions, launch files."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sysconfig.get_path("scripts"))
HEAVY = {"accelerate", "matplotlib", "numpy", "pyarrow", "ray", "torch", "torchvision", "triton", "wandb"}


def run(command: Sequence[str | Path], directory: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory, with `paths` first in Python's search path, in this order."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"}
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["gen_dist", "gen_dist.config", "gen_dist.presets"])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    result = run([sys.executable, "-c", f"import {module}, sys; print(*sys.modules)"], tmp_path, ROOT)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert module in loaded
    assert not loaded & HEAVY


def test_public_names_come_from_their_modules(tmp_path: Path) -> None:
    code = (
        "import gen_dist, gen_dist.inference.loading, gen_dist.training.run\n"
        "assert gen_dist.load is gen_dist.inference.loading.load and gen_dist.train is gen_dist.training.run.train\n"
        "assert dir(gen_dist) == ['TrainConfig', '__version__', 'load', 'preset', 'train']\n"
        "assert isinstance(gen_dist.preset('vae-mnist'), gen_dist.TrainConfig)\n"
        "gen_dist.absent"
    )
    result = run([sys.executable, "-c", code], tmp_path, ROOT)
    assert result.stderr.splitlines()[-1] == "AttributeError: module 'gen_dist' has no attribute 'absent'"


@pytest.mark.parametrize("name", ["kernels/__init__.py", pytest.param("kernels.py", marks=pytest.mark.slow)])
def test_a_foreign_kernels_package_is_never_imported(name: str, tmp_path: Path) -> None:
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("raise SystemExit('the foreign kernels was imported')")
    code = "import gen_dist.training.trainer, gen_dist.kernels, sys; print('kernels' in sys.modules)"
    result = run([sys.executable, "-c", code], tmp_path, tmp_path, ROOT)
    assert result.stdout.split() == ["False"], result.stderr


@pytest.mark.parametrize(
    "module", ["gen_dist.data.cache", "gen_dist.kernels", "gen_dist.launch.train", "bench", "tests.test_setup"]
)
def test_a_warning_that_our_own_code_causes_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="careless"):
        warnings.warn_explicit("careless", UserWarning, f"{module}.py", 1, module)


def test_poisoned_memory_is_seen_in_torch_and_numpy(poisoned_memory: None) -> None:
    assert torch.empty_like(torch.ones(3)).isnan().all() and torch.ones(3).new_empty(3).isnan().all()
    assert np.isnan(np.empty(3, np.float32)).all()


def test_import_layers_hold() -> None:
    result = run([TOOLS / "lint-imports", "--no-cache"], ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("gen_dist/kernels/noise.py", "import gen_dist.errors", "The layers of gen_dist"),
        ("gen_dist/training/run.py", "import gen_dist.launch.train", "The layers of gen_dist"),
        ("gen_dist/objectives/losses.py", "import tests.test_setup", "Nothing imports tests"),
        ("gen_dist/objectives/losses.py", "import gen_dist.parallel.processes", "The layers of gen_dist"),
        ("gen_dist/networks/mlp.py", "import gen_dist.objectives.losses", "The layers of gen_dist"),
        ("gen_dist/unheard_of.py", "import math", "The layers of gen_dist"),
        (
            "gen_dist/launch/cluster/options.py",
            "import gen_dist.launch.sweep.halving",
            "No import cycle between rooms or files",
        ),
        ("bench/gate/verdicts.py", "import bench.gate.gate", "No import cycle between rooms or files"),
        ("gen_dist/presets.py", "import torch", "A config is made without torch"),
        ("gen_dist/training/trainer.py", "import accelerate", "Only the room gen_dist.parallel knows Accelerate"),
    ],
)
def test_import_across_layers_is_refused(file: str, line: str, broken: str, tmp_path: Path) -> None:
    for package in ("gen_dist", "bench"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as text:
        text.write(f"\n{line}\n")
    result = run([TOOLS / "lint-imports", "--no-cache"], tmp_path, tmp_path)
    assert result.returncode == 1
    assert broken in re.findall(r"^(.+?) BROKEN", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("file", "text", "refused"),
    [
        ("gen_dist/training/trainer.py", "import torch.distributed as dist\n\ndist.barrier()\n", True),
        ("gen_dist/parallel/processes.py", "import torch.distributed as dist\n\ndist.barrier()\n", False),
        ("gen_dist/records/checkpoint.py", "import torch\n\ntorch.load('weights')\n", True),
    ],
)
def test_banned_names_are_refused(file: str, text: str, refused: bool) -> None:
    options = ["--no-cache", "--select", "TID251", "--stdin-filename", file, "-"]
    command = [str(TOOLS / "ruff"), "check", *options]
    result = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == int(refused), result.stdout + result.stderr
    assert ("TID251" in result.stdout) == refused


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    for wanted in [project["dependencies"], *project["optional-dependencies"].values()]:
        for requirement in map(Requirement, wanted):
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        *[("one_process", 1), ("cpu_2_processes", 2), ("cpu_4_processes", 4), ("one_host_8_gpus", 8)],
        *[("hosts_cpu", 2), ("hosts_8_gpus", 16)],
    ],
)
def test_accelerate_reads_launch_config(name: str, processes: int) -> None:
    # It refuses unknown keys.
    config = load_config_from_file(str(ROOT / "launch" / "configs" / f"{name}.yaml"))
    assert config.num_processes == processes
    assert config.mixed_precision is None
