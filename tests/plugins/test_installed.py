"""The worked plug-ins with an installed wheel, outside of the repository: they get all that our own parts have.

The file of a plug-in is removed once a run has been trained with it: all other commands find it from the run directory.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from gen_dist.records import checkpoint as checkpoints
from tests.plugins.test_worked import WORDS, words_of, write_toy_digits
from tests.support.loaded_plugins import forgetting_plugins
from tests.support.wheel import run_outside

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SPACES = {
    "feature_matching_gan": [
        *("discriminator.feature_maps=4+8,8+4", "--metric", "samples/class_variation", "--mode", "max")
    ],
    "spatial_vae": ["network.feature_maps=4+4+8,4+8+8"],
}
"""Field that a sweep with a plug-in searches; the learning rate unless it stands here."""


class Place(NamedTuple):
    """A directory with one plug-in, in which `run` is trained with it."""

    plugin: str
    path: Path
    scripts: Path
    """Directory of the commands in the environment with the wheel."""
    variables: dict[str, str]
    """Variables of the commands: a home, cache and directory of Ray's own."""

    def command(self, command: str, *words: object) -> list[str]:
        """`train` is `gen-dist train`, `two` is `accelerate launch`; other commands are modules of launchers."""
        program = {
            "train": [f"{self.scripts}/gen-dist", "train"],
            "two": [
                f"{self.scripts}/python",
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                self._two_processes(),
            ],
        }
        launcher = [f"{self.scripts}/python", "-m", f"gen_dist.launch.{command}"]
        return [*program.get(command, launcher), *map(str, words)]

    def run(self, *words: object, directory: Path | None = None) -> str:
        """Output of a command that has to succeed."""
        return run_outside(words, directory or self.path, 280, **self.variables)

    def train(self, run: str, *words: str) -> Path:
        """Train in this process's way, or as the words say."""
        self.run(*self.command("train", *self.words(run), *words))
        return self.path / run

    def words(self, run: str, *words: str) -> list[str]:
        """Words of a training after the command, in another run directory."""
        file = self.path / "digits.toy"  # its full path: later commands run in another directory
        known = [f"toy:{file}" if word == f"toy:{file.name}" else word for word in words_of(self.plugin)]
        return [*known, "--run-dir", run, *words]

    def _two_processes(self) -> str:
        return str(next(self.scripts.parent.rglob("gen_dist/launch/configs/cpu_2_processes.yaml")))

    def of_run(self, *words: object) -> str:
        """Output of `gen-dist` in a directory without the plug-in."""
        other = self.path / "elsewhere"
        other.mkdir(exist_ok=True)
        return self.run(f"{self.scripts}/gen-dist", *words, directory=other)


@pytest.fixture(scope="module", params=WORDS)
def place(request: pytest.FixtureRequest, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Directory in which a plug-in trained a run; at the end no file of the package has changed."""
    path = tmp_path_factory.mktemp(request.param)
    shutil.copy(HERE / f"{request.param}.py", path)
    write_toy_digits(path / "digits.toy")
    package = _digests(installed.parent)
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as short,
        forgetting_plugins(),
    ):
        variables = {"HOME": str(path / "home"), "RAY_TMPDIR": short, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        (path / "home").mkdir()
        found = Place(request.param, path, installed, variables)
        found.train("run")
        yield found
    assert package and _digests(installed.parent) == package


def _digests(environment: Path) -> dict[str, str]:
    files = (file for file in environment.rglob("gen_dist/**/*") if file.is_file() and file.suffix != ".pyc")
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _networks(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in _state(run).items() if name.startswith("networks/")}


def _state(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoints.load_newest(run, lambda _line: None)
    assert found
    return {f"{group}/{name}": one for group, named in found[0].tensors.items() for name, one in named.items()}


def _assert_close(run: Path, other: Path) -> None:
    expected, found = _networks(run), _networks(other)
    assert expected and found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_run_killed_by_sigkill_resumes_bit_equal(place: Place) -> None:
    more = ("--steps", "120")
    whole = _state(place.train("whole", *more))
    command = place.command("train", *place.words("killed", *more))
    killed = subprocess.Popen(
        command,
        cwd=place.path,
        env={**os.environ, **place.variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((place.path / "killed/checkpoints").glob("step_*")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (place.path / "killed/summary.json").exists()
    resumed = _state(place.train("killed", *more))
    assert resumed.keys() == whole.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


def test_two_processes_equal_one(place: Place) -> None:
    place.run(*place.command("two", "-m", "gen_dist.launch.train", *place.words("two")))
    _assert_close(place.path / "run", place.path / "two")


def test_workers_of_ray_equal_one_process(place: Place) -> None:
    place.run(*place.command("ray_train", *place.words("ray", "--workers", "2")))
    _assert_close(place.path / "run", place.path / "ray")


def test_compiled_equals_eager(place: Place) -> None:
    _assert_close(place.path / "run", place.train("compiled", "--compile"))


def test_a_sweep_finds_trials_and_the_command_of_the_best(place: Place) -> None:
    space = SPACES.get(place.plugin, ["learning_rate=1e-3,1e-4"])
    said = place.run(*place.command("ray_sweep", *place.words("searched"), "--trials", "2", "--space", *space))
    trials = sorted((place.path / "searched-sweep").glob("trial_*"))
    assert len(trials) == 2
    assert all((trial / "plugins" / f"{place.plugin}.py").exists() for trial in trials)
    best = next(line for line in said.splitlines() if line.startswith("  gen-dist train "))
    place.run(place.scripts / "gen-dist", *shlex.split(best)[1:])
    assert (place.path / "searched-best/summary.json").exists()
    if place.plugin in SPACES:
        assert space[0].partition("=")[0].rpartition(".")[2].replace("_", "-") in best


def test_later_commands_need_only_the_run_directory(place: Place) -> None:
    second = place.train("second", "--seed", "1")
    file = place.path / f"{place.plugin}.py"
    content = file.read_bytes()
    file.unlink()
    try:
        run = place.path / "run"
        quick = ("--samples", "64", "--nll-samples", "2", "--nll-images", "4")
        for one in (run, second):
            said = place.of_run("evaluate", one, *quick)
        assert place.plugin != "roundness_metric" or "roundness" in said
        place.of_run("sample", run, "--count", "4", "--out", "samples.png")
        place.of_run("export", run, "--format", "safetensors", "--out", "exported")
        place.of_run("report", run, "--out", "report.html")
        compared = place.of_run("compare", run, second, "--out", "compared", "--no-evaluate")
        assert "step 6" in place.of_run("replay", run, "--step", "6")
        assert "images" in compared or "FID" in compared
    finally:
        file.write_bytes(content)
    load = "import gen_dist; print(gen_dist.load('exported').sample(4).shape)"
    output = place.run(place.scripts / "python", "-c", load, directory=place.path / "elsewhere")
    assert "4, 1, 28, 28" in output
