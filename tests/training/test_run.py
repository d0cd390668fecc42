"""Runs and their directories: files, resumption, refusals and divergence."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist.cli import NoOptions, parse_train
from gen_dist.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import read_metrics
from gen_dist.records.reading import read_object
from gen_dist.records.removal import remove_run
from gen_dist.training.outcome import DivergenceError
from gen_dist.training.run import train
from gen_dist.training.supervisor import Supervisor
from tests.support.runs import assert_same_bits, small_config
from tests.support.vae_runs import assert_equals_uninterrupted, config_of, quiet, records_of, state_of


def test_a_run_writes_its_documented_files(uninterrupted: Path) -> None:
    config = TrainConfig.from_json((uninterrupted / "config.json").read_text(), "config.json")
    assert config == config_of(uninterrupted)
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert torch.__version__.startswith(environment["versions"]["torch"])
    records = read_metrics(uninterrupted / "metrics.jsonl")
    assert [record["step"] for record in records] == sorted({*range(3, 41, 3), *range(10, 41, 10)})
    assert records[0]["images_seen"] == 3 * 24
    assert {"train/loss", "train/nll", "train/kl", "train/learning_rate"} <= records[0].keys()
    assert {"test/negative_elbo", "test/nll", "test/kl"} <= records[-1].keys()
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["final"]["test/negative_elbo"] == records[-1]["test/negative_elbo"]
    assert summary["images_seen"] == 40 * 24
    assert summary["best"]["test/negative_elbo"] <= summary["final"]["test/negative_elbo"]
    assert summary["names"]["test/nll"] == "reconstruction term of the negative ELBO, nats per image"
    assert set(summary["pictures"]) == {
        *("samples", "reconstructions", "interpolations", "latent_manifold", "latent_scatter"),
        *("curves", "class_shares"),
    }
    for name in summary["pictures"].values():
        with Image.open(uninterrupted / name) as picture:
            assert min(picture.size) > 100
            assert np.asarray(picture.convert("L")).std() > 5
    assert [path.name for path in checkpoint_paths(uninterrupted)] == ["step_00000040", "step_00000038"]


def test_a_logged_loss_is_the_mean_since_the_previous_line(uninterrupted: Path, tmp_path: Path) -> None:
    train(config_of(tmp_path / "run", log_every=1), say=quiet)
    each = [float(str(record["train/loss"])) for record in records_of(tmp_path / "run")]
    logged = [record for record in records_of(uninterrupted) if "train/loss" in record]
    for record in logged[:-1]:
        step = int(str(record["step"]))
        assert record["train/loss"] == pytest.approx(sum(each[step - 3 : step]) / 3, rel=1e-12)


def test_a_finished_run_started_again_lists_its_pictures(uninterrupted: Path) -> None:
    before = state_of(uninterrupted)
    environment = (uninterrupted / "environment.json").read_text()
    outcome = train(config_of(uninterrupted), say=quiet)
    assert (uninterrupted / "environment.json").read_text() == environment
    assert outcome.finished
    assert outcome.step == 40
    assert outcome.pictures["samples"] == uninterrupted / "samples/step_00000040.png"
    assert_same_bits(state_of(uninterrupted)[1], before[1])
    assert json.loads((uninterrupted / "summary.json").read_text())["images_per_second"] > 0


def test_the_environment_of_previous_starts_is_kept(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    first = read_object(path / "environment.json", {}, "")
    shutil.rmtree(checkpoint_paths(path)[0])
    train(config_of(path), say=quiet)
    last = read_object(path / "environment.json", {}, "")
    assert (last["from_step"], first["from_step"]) == (38, 0)
    assert last["earlier"] == [{name: value for name, value in first.items() if name != "earlier"}]


def test_a_run_resumed_with_other_threads_says_which_number_keeps_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"

    def started(threads: int, supervisor: Supervisor | None = None) -> str:
        monkeypatch.setenv("GEN_DIST_THREADS", str(threads))
        said: list[str] = []
        config = small_config("vae", run_dir=str(path), checkpoint_every=1, steps=3)
        assert train(config, say=said.append, supervisor=supervisor).finished
        shutil.rmtree(checkpoint_paths(path)[0])
        return "".join(line for line in said if line.startswith("resuming"))

    others = f"resuming {path} at step 2 of 3, with 2 threads in place of 1: its last bits change;"
    assert started(threads=1) == ""
    assert started(threads=1) == f"resuming {path} at step 2 of 3"
    assert started(threads=2) == f"{others} GEN_DIST_THREADS=1 keeps them"
    # Compared with the start that made the checkpoint, not with the last one.
    assert (
        started(2, Supervisor("ray", threading.Event(), lambda *_: None)) == f"{others} --cpus-per-worker 1 keeps them"
    )
    (path / "environment.json").unlink()
    assert started(threads=2) == f"resuming {path} at step 2 of 3"


def test_fresh_starts_over_and_keeps_foreign_files(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    (path / "my notes.txt").write_text("keep me")
    said: list[str] = []
    train(config_of(path), fresh=True, say=said.append)
    assert not any("resuming" in line for line in said)
    assert (path / "my notes.txt").read_text() == "keep me"
    assert_equals_uninterrupted(path, uninterrupted)


def test_a_removed_run_leaves_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    for name in ("scores.png", "evaluation.json", "report.html"):  # files of a GAN, an evaluation and a report
        (path / name).touch()
    remove_run(path)
    assert {left.name for left in path.iterdir()} <= {".lock", ".holder", "run.json"}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 5}, "seed 0 -> 5"),
        ({"global_batch_size": 32}, "global_batch_size 24 -> 32"),
        ({"learning_rate": 0.5}, "learning_rate 0.003 -> 0.5"),
        ({"data": "mnist5k"}, "data 'synthetic' -> 'mnist5k'"),
    ],
)
def test_a_run_directory_of_another_config_is_refused(
    change: dict[str, object], names: str, uninterrupted: Path
) -> None:
    with pytest.raises(ConfigError, match="holds a run of another config") as error:
        train(config_of(uninterrupted, **change), say=quiet)
    assert names in str(error.value)
    assert f"go on with --config {uninterrupted}/config.json in place of the preset, start over" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_config_of_a_run_resumes_it_where_the_preset_has_changed(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "a run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="another config") as error:
        train(config_of(Path("a run"), learning_rate=0.5), say=quiet)
    words = shlex.split(str(error.value).partition("go on with ")[2].partition(" in place")[0])
    assert words == ["--config", "a run/config.json", "--run-dir", "a run"]
    assert train(parse_train(words, "gen-dist train", NoOptions())[0], say=quiet).step == 40


def test_another_number_of_steps_alone_goes_on_in_another_directory(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another config") as error:
        train(config_of(uninterrupted, steps=999), say=quiet)
    assert str(error.value).endswith(f"another --run-dir, where --from {uninterrupted} goes on from its weights")
    assert "; with --decay cosine, the values of a step depend on the number of steps); give" in str(error.value)
    with pytest.raises(ConfigError, match=r"another --run-dir$"):
        train(config_of(uninterrupted, steps=1), say=quiet)
    config = config_of(tmp_path / "further", steps=1, start_from=str(uninterrupted))
    assert train(config, say=quiet).step == 1
    with pytest.raises(ConfigError, match=r"another --run-dir$"):
        train(config_of(uninterrupted, steps=999, seed=5), say=quiet)


def test_more_steps_would_change_what_is_scheduled_over_the_run(tmp_path: Path) -> None:
    schedule = ScheduleConfig(final_beta2=0.9)
    optimization = OptimizerConfig(decay="constant")
    config = config_of(tmp_path, steps=1, checkpoint_every=1, optimization=optimization, schedule=schedule)
    train(config, say=quiet)
    with pytest.raises(
        ConfigError, match=r"steps 1 -> 2; with --final-beta2 0\.9 over the whole run, the values"
    ) as error:
        train(dataclasses.replace(config, steps=2), say=quiet)
    assert str(error.value).endswith(
        f"where --from {tmp_path} goes on from its weights; with --schedule-images a run may go on for more steps"
    )
    with pytest.raises(ConfigError, match=r"with --decay cosine, the values .*another --run-dir$"):
        train(dataclasses.replace(config, steps=2, optimization=OptimizerConfig(decay="cosine")), say=quiet)
    assert not dataclasses.replace(schedule, schedule_images=48).spans_the_run
    assert not ScheduleConfig().spans_the_run


def test_more_steps_extend_a_run_of_constant_learning_rate(tmp_path: Path) -> None:
    def config(steps: int) -> TrainConfig:
        constant = OptimizerConfig(decay="constant")
        return config_of(tmp_path / f"run{steps // 100}", steps=steps, optimization=constant)

    train(config(12), say=quiet)
    with pytest.raises(ConfigError, match="already at step 12, past steps 8"):
        train(config(8), say=quiet)
    assert train(config(16), say=quiet).step == 16
    train(dataclasses.replace(config(16), run_dir=str(tmp_path / "at once")), say=quiet)
    assert_same_bits(state_of(tmp_path / "run0")[1], state_of(tmp_path / "at once")[1])


def test_more_steps_must_not_change_the_learning_rate(uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match="steps 40 -> 44"):
        train(config_of(uninterrupted, steps=44), say=quiet)


@pytest.mark.parametrize("change", ["steps", "images"])
def test_a_refused_start_leaves_the_run_as_it_was(change: str, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", steps=12, optimization=OptimizerConfig(decay="constant"))
    train(config, say=quiet)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    other = {"steps": 6} if change == "steps" else {"packing": DataConfig(synthetic_images=300)}
    with pytest.raises(UserError, match="past steps 6" if change == "steps" else "another digest"):
        train(dataclasses.replace(config, **other), say=quiet)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run/.lock", is_singleton=False),
        pytest.raises(ConfigError, match="another process is training"),
    ):
        _in_thread_of_its_own(lambda: train(config_of(tmp_path / "run"), say=quiet))


def _in_thread_of_its_own(action: Callable[[], object]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


def test_divergence_names_step_network_and_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    optimization = OptimizerConfig(optimizer="sgd", warmup_steps=30)  # the rate grows until the loss explodes
    config = config_of(path, optimization=optimization, learning_rate=100.0, checkpoint_every=1, log_every=50)
    with pytest.raises(DivergenceError) as error:
        train(config, say=quiet)
    assert isinstance(error.value, UserError)
    assert "step" in str(error.value)
    assert "with --fresh or another --run-dir" in str(error.value)
    newest = checkpoint_paths(path)[0]
    assert f"(newest good checkpoint: {newest})" in str(error.value)
    checkpoint, _ = checkpoints.load(newest)
    for group in ("networks", "optimizer-vae"):
        assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.tensors[group].values())


def test_an_update_that_breaks_the_weights_is_never_saved(tmp_path: Path) -> None:
    """The last loss is finite, but the update after it is not."""
    optimization = OptimizerConfig(ema_decay=0.5)
    config = config_of(tmp_path / "run", steps=1, learning_rate=1e39, optimization=optimization)
    with pytest.raises(DivergenceError, match=r"encoder and decoder are broken.*newest good checkpoint: none yet"):
        train(config, say=quiet)
    assert not checkpoint_paths(tmp_path / "run")


def test_a_run_begun_in_float32_goes_on_in_fp16(tmp_path: Path) -> None:
    constant = OptimizerConfig(decay="constant")
    train(config_of(tmp_path / "run", steps=6, optimization=constant), say=quiet)
    assert train(config_of(tmp_path / "run", steps=10, optimization=constant, precision="fp16"), say=quiet).finished


def test_a_run_on_data_too_large_to_be_resident_is_the_same_run(uninterrupted: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    train(dataclasses.replace(config, packing=dataclasses.replace(config.packing, resident_budget_mib=0)), say=quiet)
    assert_equals_uninterrupted(tmp_path / "run", uninterrupted)


def _mixed_folder(path: Path) -> Path:
    """Images of six formats and modes in two classes. One in seven is truncated."""
    chance = np.random.default_rng(0)
    for index in range(56):
        picture = Image.fromarray(chance.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8))
        name, mode = [("png", "RGB"), ("jpg", "RGB"), ("png", "L"), ("gif", "P"), ("jpg", "CMYK"), ("webp", "RGBA")][
            index % 7 % 6
        ]
        file = path / ("cats", "dogs")[index % 2] / f"{index}.{name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.convert(mode).save(file)
        if index % 7 == 6:
            os.truncate(file, file.stat().st_size // 2)
    return path


def _parquet(path: Path) -> Path:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for index in range(60):
        content = io.BytesIO()
        colours = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(colours).save(content, format="JPEG")
        rows.append({"bytes": content.getvalue(), "path": None})
    pq.write_table(pa.table({"img": rows, "label": [index % 10 for index in range(60)]}), path)
    return path


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_a_run_on_a_users_own_images_ends_with_its_pictures(source: str, tmp_path: Path) -> None:
    path = _mixed_folder(tmp_path / "mixed") if source == "folder" else _parquet(tmp_path / "train.parquet")
    config = config_of(tmp_path / "run", data=f"{source}:{path}", steps=6)
    said: list[str] = []
    outcome = train(dataclasses.replace(config, packing=DataConfig()), say=said.append)
    assert outcome.finished
    assert all(picture.exists() for picture in outcome.pictures.values())
    if source == "folder":
        assert any("left out 8 unreadable images" in line for line in said)
    with Image.open(outcome.pictures["samples"]) as samples:
        assert samples.mode == "RGB"
