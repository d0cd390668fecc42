"""A run is read, resumed and replayed where its data, its machine or the current directory are others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist import commands
from gen_dist.config import DataConfig, TrainConfig
from gen_dist.errors import ConfigError, DataError, UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.records.metrics_file import read_metrics
from gen_dist.records.reading import config_of_run, read_object, write_object
from gen_dist.records.run_data import open_run_data
from gen_dist.training.replay import replay
from gen_dist.training.run import train
from tests.support.runs import small_config


def _silent(_line: str) -> None:
    pass


def _images(directory: Path, seed: int = 0) -> Path:
    directory.mkdir(parents=True)
    noise = np.random.default_rng(seed)
    for place in range(12):
        Image.fromarray(noise.integers(0, 256, (8, 8), dtype=np.uint8)).save(directory / f"{place}.png")
    return directory


def _config(data: str, run: Path, **changes: object) -> TrainConfig:
    config = small_config("vae", data=data, run_dir=str(run), steps=2, global_batch_size=4, checkpoint_every=1)
    constant = dataclasses.replace(config.optimization, decay="constant")
    return dataclasses.replace(config, packing=DataConfig(image_size=8), optimization=constant, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with images and a run on them, which names them by a relative path."""
    home = tmp_path_factory.mktemp("home")
    _images(home / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(_config("folder:images", home / "run"), say=_silent)
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory; its run knows the other one as its directory."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def _digest(run: Path) -> str:
    state = next(run.glob("checkpoints/*/state.json")).read_text()
    return str(json.loads(state)["data_digest"])


def test_images_that_a_gpu_decoded_are_refused_elsewhere(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    packing = DataConfig(image_size=8, packed_as="encoded", decoded_on="cuda", cache_dir=str(tmp_path / "cache"))
    config = dataclasses.replace(config_of_run(home / "run"), packing=packing)
    with pytest.raises(DataError, match=r"were decoded on a GPU .* use a host with a GPU and CUDA$"):
        open_run_data(home / "run", config, _silent, digest=None)
    assert not (tmp_path / "cache").exists()


def test_data_that_moved_are_known_by_their_digest(home: Path) -> None:
    (home / "images").rename(home / "moved")
    for data, steps in ((f"folder:{home}/moved/", 2), ("folder:./moved", 3)):
        assert train(_config(data, home / "run", steps=steps), say=_silent).step == steps
    assert config_of_run(home / "run").data == "folder:./moved"


def test_other_data_are_refused_whatever_their_name(home: Path) -> None:
    before = {file: file.read_bytes() for file in (home / "run").rglob("*") if file.is_file()}
    _images(home / "other", seed=1)
    with pytest.raises(UserError, match="another digest"):
        train(_config("folder:other", home / "run", steps=3), say=_silent)
    with pytest.raises(ConfigError, match="holds a run of another config"):
        train(_config("mnist5k", home / "run", steps=3), say=_silent)
    for read in (
        lambda: evaluate(home / "run", ["sharpness"], samples=10, data="folder:other", announce=_silent),
        lambda: replay(home / "run", 1, _silent, data="folder:other"),
    ):
        with pytest.raises(DataError, match=r"folder:other are not those that .*run was trained on.*--data"):
            read()
    assert {file: file.read_bytes() for file in (home / "run").rglob("*") if file.is_file()} == before


def test_relative_paths_count_from_where_the_run_started(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _images(tmp_path / "images", seed=2)  # others, under the same relative path
    run = trained / "run"
    logged = read_metrics(run / "metrics.jsonl")[0]["train/loss"]
    assert replay(run, 1, _silent)["loss"] == pytest.approx(logged, rel=1e-6)
    dataset = open_run_data(run, config_of_run(run), _silent, digest=_digest(run))
    assert len(dataset.train.images) + len(dataset.test.images) == 12


def test_data_at_their_old_relative_path_are_found_after_a_move_of_all(home: Path) -> None:
    environment = read_object(home / "run/environment.json", {}, "")
    for directory in (None, "/does/not/exist", 5):
        write_object(home / "run/environment.json", environment | {"directory": directory})
        dataset = open_run_data(home / "run", config_of_run(home / "run"), _silent, digest=_digest(home / "run"))
        assert dataset.digest == _digest(home / "run")


def test_missing_data_are_one_line_with_the_option(home: Path) -> None:
    (home / "run/environment.json").unlink()
    (home / "images").rename(home / "moved")
    with pytest.raises(DataError, match=r"images.*; if the data have moved, name their place with --data or") as error:
        evaluate(home / "run", ["sharpness"], samples=10, announce=_silent)
    assert "\n" not in str(error.value)
    found = evaluate(home / "run", ["sharpness"], samples=10, data="folder:moved", announce=_silent)
    assert found.checkpoint_step == 2
    assert replay(home / "run", 2, _silent, data=f"folder:{home}/moved/")["loss"]


def test_a_comparison_takes_data_that_moved(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "run", home / "other")
    for run in (home / "run", home / "other"):
        (run / "environment.json").unlink()
    (home / "images").rename(home / "moved")
    runs = (home / "run", home / "other")
    with pytest.raises(DataError, match="if the data have moved, name their place with --data"):
        commands.compare(runs, out=home / "out", evaluate=False)
    commands.compare(runs, out=home / "out", evaluate=False, data="folder:moved")
    assert {file.name for file in (home / "out").iterdir()} == {"compare.png", "compare.md", "compare.json"}
    _images(home / "images", seed=1)
    with pytest.raises(DataError, match=r"are not those that .* was trained on"):
        commands.compare(runs, out=home / "out", evaluate=False)


def test_a_report_does_without_step_times_where_the_data_are_missing(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run/environment.json").unlink()
    shutil.rmtree(home / "images")
    commands.report((home / "run",), out=home / "report.html", evaluate=False)
    assert (home / "report.html").stat().st_size > 10_000
    assert "warning: the report has no step times" in capsys.readouterr().err


def _as_on_gpu(run: Path, device: str) -> None:
    config = config_of_run(run)
    (run / "config.json").write_text(dataclasses.replace(config, device=device).to_json())  # type: ignore[arg-type]
    environment = read_object(run / "environment.json", {}, "")
    environment["gpus"] = [{"name": "H100", "memory_gib": 80.0}]
    write_object(run / "environment.json", environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_run_of_a_gpu_is_replayed_on_a_cpu_with_a_line(device: str, home: Path) -> None:
    said: list[str] = []
    expected = replay(home / "run", 2, said.append)
    assert len(said) == 1  # where it starts from
    _as_on_gpu(home / "run", device)
    for asked in (None, "cpu", "auto"):
        said.clear()
        assert replay(home / "run", 2, said.append, device=asked) == expected
        assert "trained on a GPU and is replayed on the CPU" in said[0]
    with pytest.raises(ConfigError, match="no GPU here; use --device cpu or auto"):
        replay(home / "run", 2, said.append, device="cuda")


def test_the_command_of_a_version_without_fit_resumes_its_run(home: Path) -> None:
    command = dataclasses.replace(_config("folder:images", home / "old"), packing=DataConfig())
    train(dataclasses.replace(command, packing=DataConfig(image_size=64)), say=_silent)  # as a folder had by default
    config = json.loads((home / "old" / "config.json").read_text())
    del config["packing"]["fit"]
    config["packing"]["image_size"] = None
    (home / "old" / "config.json").write_text(json.dumps(config))
    assert train(dataclasses.replace(command, steps=3), say=_silent).step == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_of_another_precision_is_replayed_on_a_cpu(precision: str, home: Path) -> None:
    config = _config("folder:images", home / "half", precision=precision)
    train(config, say=_silent)
    logged = read_metrics(home / "half/metrics.jsonl")[1]["train/loss"]
    _as_on_gpu(home / "half", "cuda")
    if not torch.cuda.is_available():
        assert replay(home / "half", 2, _silent)["loss"] == pytest.approx(logged, rel=1e-6)
