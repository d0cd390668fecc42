"""The worked plug-ins, from a directory outside the repository: each trains, and is read from its run alone."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gen_dist
from gen_dist.cli import NoOptions, parse_train
from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.inference.export import export
from gen_dist.parallel.facts import disagreement, facts_of_start
from gen_dist.plugins import Plugin
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.run_directory import refuse_other_config
from gen_dist.reports import write_report
from gen_dist.reports.comparison import read_runs
from gen_dist.training.replay import replay

HERE = Path(__file__).parent
SMALL = [
    "--decay",
    "constant",
    "--steps",
    "6",
    "--global-batch-size",
    "16",
    "--checkpoint-every",
    "2",
    "--log-every",
    "1",
]
WORDS = {
    "feature_matching_gan": ["feature-matching-mnist", "--feature-maps", "4", "8", "--hidden-size", "8"],
    "spatial_vae": ["spatial-vae", "--feature-maps", "4", "4", "8", "--latent-dim", "2", "--warmup-steps", "2"],
    "toy_source": ["vae-mnist", "--data", "toy:digits.toy", "--hidden-sizes", "8"],
    "roundness_metric": ["vae-mnist", "--hidden-sizes", "8"],
}
"""Words that train with each plug-in; `--data synthetic` unless they name data."""


def words_of(plugin: str) -> list[str]:
    words = ["--plugin", f"{plugin}.py", *WORDS[plugin], *SMALL, "--run-dir", "run"]
    return words if "--data" in words else [*words, "--data", "synthetic", "--synthetic-images", "64"]


@pytest.fixture(params=WORDS)
def elsewhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: Callable[[], None]
) -> str:
    """Name of a worked plug-in, whose file is in the working directory, outside the repository."""
    plugin: str = request.param
    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / f"{plugin}.py", tmp_path)
    write_toy_digits(tmp_path / "digits.toy")
    return plugin


def write_toy_digits(path: Path) -> None:
    """Write 80 images in the format of `toy_source.py`."""
    images = np.random.default_rng(0).integers(0, 256, (80, 28, 28), np.uint8)
    header = b"TOY1" + np.array([80, 28, 28, 4], "<u4").tobytes()
    rows = np.concatenate([np.arange(80, dtype=np.uint8)[:, None] % 4, images.reshape(80, -1)], axis=1)
    path.write_bytes(header + rows.tobytes())


def _config(words: list[str]) -> TrainConfig:
    return parse_train(words, "train", NoOptions())[0]


def _quiet(_line: str) -> None:
    pass


def test_a_run_is_used_without_the_plugins_file(
    elsewhere: str, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(words_of(elsewhere))
    gen_dist.train(config, say=_quiet)
    assert [plugin.name for plugin in config.plugins] == [f"{elsewhere}.py"]
    run = Path("run").absolute()
    assert (run / "plugins" / f"{elsewhere}.py").read_bytes() == (HERE / f"{elsewhere}.py").read_bytes()

    os.unlink(f"{elsewhere}.py")
    Path("other").mkdir()
    monkeypatch.chdir("other")
    forget()
    assert gen_dist.load(run).sample(4).shape == (4, 1, 28, 28)
    forget()
    measured = "roundness" if elsewhere == "roundness_metric" else "sharpness"
    found = evaluate(run, (measured,), samples=64, device="cpu", announce=_quiet)
    assert any(measured in line for line in found.lines())
    forget()
    out = export(run, "safetensors", Path("exported"), (), _quiet)
    forget()
    assert TrainConfig.from_json((out / "config.json").read_text(), str(out / "config.json")).plugins == config.plugins
    forget()
    assert replay(run, 6)
    forget()
    read = read_runs([run], None)
    assert read[0].config.to_json() == config.to_json()
    write_report(Path("report.html"), read, [None])


def test_changed_code_is_refused_unless_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin = Path(shutil.copy(HERE / "roundness_metric.py", tmp_path))
    words = words_of("roundness_metric")
    gen_dist.train(_config([*words, "--steps", "2"]), say=_quiet)
    before = plugin.read_text()
    plugin.write_text(before + "\n# changed\n")
    forget()
    with pytest.raises(
        ConfigError, match=r"plug-in roundness_metric.py has changed .*--accept-changed-plugins"
    ) as caught:
        gen_dist.train(_config(words), say=_quiet)
    assert "\n" not in str(caught.value) and "run/plugins/roundness_metric.py" in str(caught.value)
    assert Path("run/plugins/roundness_metric.py").read_text() == before

    accepted = gen_dist.train(_config([*words, "--accept-changed-plugins"]), say=_quiet)
    assert accepted.finished
    assert Path("run/plugins/roundness_metric.py").read_text() == plugin.read_text()
    forget()
    refuse_other_config(Path("run"), _config(words))  # accepted once and for all
    forget()
    for checkpoint in checkpoints.checkpoint_paths(Path("run")):  # also those from before the change
        checkpoints.load(checkpoint)


def test_processes_with_other_code_of_a_plugin_disagree() -> None:
    def facts(sha256: str) -> dict[str, str]:
        config = dataclasses.replace(gen_dist.preset("vae-mnist"), plugins=(Plugin("mine.py", sha256),))
        return facts_of_start(config, 2, True, 1)

    line = disagreement({0: facts("a" * 64), 1: facts("b" * 64)})
    assert line and "code of plug-in mine.py is aaaaaaaaaaaa on rank 0 but bbbbbbbbbbbb on rank 1" in line
    assert "give all hosts the same plug-ins" in line
