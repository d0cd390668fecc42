"""Runs and their directories: files, kills, stops, resumption and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import MACHINE_USE, read_metrics
from gen_dist.records.reading import read_object
from gen_dist.records.removal import remove_run
from gen_dist.records.run_mark import write_mark
from gen_dist.training.outcome import DivergenceError
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.runs import assert_same_bits, small_config, write_config
from tests.support.warm_python import warm_python


def _quiet(_line: str) -> None:
    pass


def _config(run_dir: Path, **changes: object) -> TrainConfig:
    defaults = {"steps": 40, "checkpoint_every": 2, "sample_every": 10, "evaluate_every": 10, "log_every": 3}
    return small_config("vae", **{**defaults, "run_dir": str(run_dir), **changes})


def _state(run_dir: Path) -> tuple[int, dict[str, torch.Tensor]]:
    checkpoint, _ = checkpoints.load(checkpoint_paths(run_dir)[0])
    named = {f"{group}/{name}": value for group, values in checkpoint.tensors.items() for name, value in values.items()}
    return checkpoint.step, named


def _records(run_dir: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in record.items() if key not in MACHINE_USE}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(_config(path), say=_quiet)
    return path


def _assert_equals_uninterrupted(run_dir: Path, uninterrupted: Path) -> None:
    step, state = _state(run_dir)
    expected_step, expected = _state(uninterrupted)
    assert step == expected_step == 40
    assert_same_bits(state, expected)
    assert _records(run_dir) == _records(uninterrupted)
    for picture in ("samples/step_00000040.png", "reconstructions/step_00000040.png", "latent_manifold.png"):
        assert (run_dir / picture).read_bytes() == (uninterrupted / picture).read_bytes()


def _in_child(action: Callable[[], None], wait_to_kill: Callable[[], None] | None = None) -> int:
    """Run an action in a forked process and return its wait status. Kill it after `wait_to_kill`, if given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child does not use the other threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            action()
            code = 0
        finally:
            os._exit(code)
    if wait_to_kill is not None:
        wait_to_kill()
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def test_a_run_writes_its_documented_files(uninterrupted: Path) -> None:
    config = TrainConfig.from_json((uninterrupted / "config.json").read_text(), "config.json")
    assert config == _config(uninterrupted)
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
    train(_config(tmp_path / "run", log_every=1), say=_quiet)
    each = [float(str(record["train/loss"])) for record in _records(tmp_path / "run")]
    logged = [record for record in _records(uninterrupted) if "train/loss" in record]
    for record in logged[:-1]:
        step = int(str(record["step"]))
        assert record["train/loss"] == pytest.approx(sum(each[step - 3 : step]) / 3, rel=1e-12)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_resumes_exactly(kills: int, uninterrupted: Path, tmp_path: Path) -> None:
    chance = random.Random(20)
    killed_at: list[int] = []
    while len(killed_at) < kills:
        path, step, delay = tmp_path / f"run{len(killed_at)}", chance.randrange(0, 40), chance.uniform(0, 0.05)

        def wait(path: Path = path, step: int = step, delay: float = delay) -> None:
            deadline = time.monotonic() + 60
            while _newest_step(path) < step and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(delay)

        if not os.WIFSIGNALED(_in_child(lambda path=path: _train(path), wait)):  # type: ignore[misc]
            shutil.rmtree(path)  # finished before the kill
            continue
        killed_at.append(_newest_step(path))
        assert _in_child(lambda path=path: _train(path)) == 0  # type: ignore[misc]
        _assert_equals_uninterrupted(path, uninterrupted)
    assert len(set(killed_at)) > kills // 2, killed_at


def _newest_step(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoint_paths(run_dir)), default=0)


def _train(path: Path) -> None:
    train(_config(path), say=_quiet)


DEADLY: dict[str, tuple[int, ...]] = {
    **{"fsync": (1, 4, 8), "other fsyncs": (2, 3, 5, 6, 7)},
    **{"replace": (1,), "rename at removal": (2,), "unlink": (1, 4), "rmdir": (1,)},
}
"""Calls while a checkpoint is saved, by their number."""


@pytest.mark.parametrize("call", [pytest.param(call, marks=[pytest.mark.slow] * ("other" in call)) for call in DEADLY])
def test_killed_while_writing_a_checkpoint_it_resumes_exactly(call: str, uninterrupted: Path, tmp_path: Path) -> None:
    """The process dies at the third checkpoint, in turn at each fsync, rename and removal."""

    def train_and_die(path: Path, fatal: int) -> None:
        save, calls = checkpoints.save, 0

        def count_then_kill(function: Callable[..., object]) -> Callable[..., object]:
            def wrapped(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapped

        def save_at_third(run_path: Path, checkpoint: checkpoints.Checkpoint, config: TrainConfig, keep: int) -> Path:
            if checkpoint.step == 6:
                if "fsync" in call:
                    os.fsync = count_then_kill(os.fsync)  # type: ignore[assignment]
                elif call in ("unlink", "rmdir"):
                    setattr(os, call, count_then_kill(getattr(os, call)))
                else:
                    os.replace = count_then_kill(os.replace)  # type: ignore[assignment]
            return save(run_path, checkpoint, config, keep)

        checkpoints.save = save_at_third
        _train(path)

    for fatal in DEADLY[call]:
        path = tmp_path / f"run{fatal}"
        status = _in_child(lambda path=path, fatal=fatal: train_and_die(path, fatal))  # type: ignore[misc]
        assert os.WIFSIGNALED(status)
        newest = checkpoints.load_newest(path, _quiet)
        assert newest is not None
        assert newest[0].step in (4, 6)
        assert _in_child(lambda path=path: _train(path)) == 0  # type: ignore[misc]
        _assert_equals_uninterrupted(path, uninterrupted)
        assert not list((path / "checkpoints").glob(".*"))


def test_system_files_in_a_checkpoint_are_ignored(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    newest = checkpoint_paths(tmp_path / "run")[0]
    for name in (".DS_Store", "._state.json", "Thumbs.db", ".nfs000000000001"):
        (newest / name).write_bytes(b"\0")
    assert checkpoints.load(newest)[0].step == 40


@pytest.mark.parametrize("damage", ["flip a bit", "cut off", "remove a file", "empty sums", "sums cut at a line"])
def test_a_damaged_checkpoint_is_named_and_the_previous_used(damage: str, uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    newest = checkpoint_paths(path)[0]
    file = newest / "optimizer-vae.safetensors"
    if damage == "flip a bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut off":
        os.truncate(file, 1000)
    elif damage == "remove a file":
        (newest / "state.json").unlink()
    else:
        lines = (newest / "SHA256SUMS").read_text().splitlines(keepends=True)
        (newest / "SHA256SUMS").write_text("" if damage == "empty sums" else "".join(lines[:2]))
    said: list[str] = []
    train(_config(path), say=said.append)
    assert str(newest) in said[0]
    assert "damaged" in said[0]
    assert "resuming" in said[1]
    assert "step 38" in said[1]
    _assert_equals_uninterrupted(path, uninterrupted)


def _signalled(command: list[str], number: signal.Signals, directory: Path) -> str:
    """Output of a run in `directory`/run that receives a signal after its third line of metrics."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory)
    metrics = directory / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_resumes(
    number: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.json", _config(tmp_path / "run", checkpoint_every=1000))
    command = [*warm_python(), str(REPOSITORY / "launch/train.py"), "--config", str(config)]
    for _attempt in range(5):  # on a busy machine a run may end before this process gets to signal it
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        output = _signalled(command, number, tmp_path)
        if "stopped at step" in output:
            break
    assert "stopped at step" in output
    step, _ = _state(tmp_path / "run")
    assert 9 <= step < 40
    assert f"to go on: python {command[-3]} --config {config}" in output
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 0
    assert f"resuming {tmp_path / 'run'} at step {step} of 40" in done.stderr
    assert "finished at step 40" in done.stdout
    _assert_equals_uninterrupted(tmp_path / "run", uninterrupted)


def test_a_finished_run_started_again_lists_its_pictures(uninterrupted: Path) -> None:
    before = _state(uninterrupted)
    environment = (uninterrupted / "environment.json").read_text()
    outcome = train(_config(uninterrupted), say=_quiet)
    assert (uninterrupted / "environment.json").read_text() == environment
    assert outcome.finished
    assert outcome.step == 40
    assert outcome.pictures["samples"] == uninterrupted / "samples/step_00000040.png"
    assert_same_bits(_state(uninterrupted)[1], before[1])
    assert json.loads((uninterrupted / "summary.json").read_text())["images_per_second"] > 0


def test_the_environment_of_previous_starts_is_kept(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    first = read_object(path / "environment.json", {}, "")
    shutil.rmtree(checkpoint_paths(path)[0])
    train(_config(path), say=_quiet)
    last = read_object(path / "environment.json", {}, "")
    assert (last["from_step"], first["from_step"]) == (38, 0)
    assert last["earlier"] == [{name: value for name, value in first.items() if name != "earlier"}]


def test_files_of_a_run_without_checkpoint_are_removed(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    shutil.rmtree(path / "checkpoints")
    write_mark(path)  # killed before its first checkpoint
    outcome = train(_config(path, steps=12), say=_quiet)
    assert outcome.pictures["samples"] == path / "samples/step_00000012.png"
    assert sorted(file.name for file in (path / "samples").iterdir()) == ["step_00000010.png", "step_00000012.png"]
    assert (path / "wandb-id").read_text() != (uninterrupted / "wandb-id").read_text()


def test_a_checkpoint_that_a_kill_left_too_many_is_removed(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    newest, before = checkpoints.checkpoint_paths(path)
    shutil.copytree(before, path / "checkpoints" / "step_00000001")
    train(_config(path), say=_quiet)
    assert checkpoints.checkpoint_paths(path) == [newest, before]


def test_fresh_starts_over_and_keeps_foreign_files(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    (path / "my notes.txt").write_text("keep me")
    said: list[str] = []
    train(_config(path), fresh=True, say=said.append)
    assert not any("resuming" in line for line in said)
    assert (path / "my notes.txt").read_text() == "keep me"
    _assert_equals_uninterrupted(path, uninterrupted)


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
        train(_config(uninterrupted, **change), say=_quiet)
    assert names in str(error.value)
    assert "\n" not in str(error.value)


def test_more_steps_would_change_what_is_scheduled_over_the_run(tmp_path: Path) -> None:
    schedule = ScheduleConfig(final_beta2=0.9)
    optimization = OptimizerConfig(decay="constant")
    config = _config(tmp_path, steps=1, checkpoint_every=1, optimization=optimization, schedule=schedule)
    train(config, say=_quiet)
    with pytest.raises(ConfigError, match="steps 1 -> 2"):
        train(dataclasses.replace(config, steps=2), say=_quiet)
    assert not dataclasses.replace(schedule, schedule_images=48).spans_the_run
    assert not ScheduleConfig().spans_the_run


def test_more_steps_extend_a_run_of_constant_learning_rate(tmp_path: Path) -> None:
    def config(steps: int) -> TrainConfig:
        constant = OptimizerConfig(decay="constant")
        return _config(tmp_path / f"run{steps // 100}", steps=steps, optimization=constant)

    train(config(12), say=_quiet)
    with pytest.raises(ConfigError, match="already at step 12, past steps 8"):
        train(config(8), say=_quiet)
    assert train(config(16), say=_quiet).step == 16
    train(dataclasses.replace(config(16), run_dir=str(tmp_path / "at once")), say=_quiet)
    assert_same_bits(_state(tmp_path / "run0")[1], _state(tmp_path / "at once")[1])


def test_more_steps_must_not_change_the_learning_rate(uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match="steps 40 -> 44"):
        train(_config(uninterrupted, steps=44), say=_quiet)


@pytest.mark.parametrize("change", ["steps", "images"])
def test_a_refused_start_leaves_the_run_as_it_was(change: str, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", steps=12, optimization=OptimizerConfig(decay="constant"))
    train(config, say=_quiet)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    other = {"steps": 6} if change == "steps" else {"packing": DataConfig(synthetic_images=300)}
    with pytest.raises(UserError, match="past steps 6" if change == "steps" else "another digest"):
        train(dataclasses.replace(config, **other), say=_quiet)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run/.lock", is_singleton=False),
        pytest.raises(ConfigError, match="another process is training"),
    ):
        _in_thread_of_its_own(lambda: train(_config(tmp_path / "run"), say=_quiet))


def _in_thread_of_its_own(action: Callable[[], object]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


def test_divergence_names_step_network_and_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    optimization = OptimizerConfig(optimizer="sgd", warmup_steps=30)  # the rate grows until the loss explodes
    config = _config(path, optimization=optimization, learning_rate=100.0, checkpoint_every=1, log_every=50)
    with pytest.raises(DivergenceError) as error:
        train(config, say=_quiet)
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
    config = _config(tmp_path / "run", steps=1, learning_rate=1e39, optimization=optimization)
    with pytest.raises(DivergenceError, match=r"encoder and decoder are broken.*newest good checkpoint: none yet"):
        train(config, say=_quiet)
    assert not checkpoint_paths(tmp_path / "run")


def test_a_checkpoint_saved_after_damage_is_kept(tmp_path: Path) -> None:
    config = _config(tmp_path / "run", steps=12, keep_checkpoints=1, checkpoint_every=4)
    train(dataclasses.replace(config, keep_checkpoints=2), say=_quiet)
    os.truncate(checkpoint_paths(tmp_path / "run")[0] / "networks.safetensors", 100)
    constant = dataclasses.replace(config, optimization=dataclasses.replace(config.optimization, decay="constant"))
    (tmp_path / "run/config.json").write_text(constant.to_json())
    train(dataclasses.replace(constant, steps=11), say=_quiet)
    assert [path.name for path in checkpoint_paths(tmp_path / "run")] == ["step_00000011"]
    assert _state(tmp_path / "run")[0] == 11


def test_a_run_begun_in_float32_goes_on_in_fp16(tmp_path: Path) -> None:
    constant = OptimizerConfig(decay="constant")
    train(_config(tmp_path / "run", steps=6, optimization=constant), say=_quiet)
    assert train(_config(tmp_path / "run", steps=10, optimization=constant, precision="fp16"), say=_quiet).finished


@pytest.mark.parametrize("spoilt", ["a file named samples", "no metrics", "a config of bytes"])
def test_a_damaged_run_directory_is_one_line_or_harmless(spoilt: str, uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    if spoilt == "no metrics":
        (path / "metrics.jsonl").unlink()
        assert train(_config(path), say=_quiet).finished
        return
    if spoilt == "a file named samples":
        shutil.rmtree(path / "samples")
        shutil.rmtree(checkpoint_paths(path)[0])
        (path / "samples").write_text("mine")
    else:
        (path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as error:
        train(_config(path), say=_quiet)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_full_disk_at_a_checkpoint_keeps_the_previous_one(uninterrupted: Path, tmp_path: Path) -> None:
    """A limit on file size makes real writes fail, as a full disk does."""
    import resource

    path = tmp_path / "run"
    train(_config(path, steps=40), say=_quiet)
    shutil.rmtree(checkpoint_paths(path)[0])

    def with_little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            train(_config(path), say=_quiet)
        except UserError as error:
            (path / "said").write_text(str(error))

    assert _in_child(with_little_room) == 0
    said = (path / "said").read_text()
    assert "\n" not in said
    assert "cannot be written" in said
    assert "step_00000038" in said
    assert checkpoints.load(checkpoint_paths(path)[0])[0].step == 38
    (path / "said").unlink()
    _train(path)
    _assert_equals_uninterrupted(path, uninterrupted)


def test_a_run_on_data_too_large_to_be_resident_is_the_same_run(uninterrupted: Path, tmp_path: Path) -> None:
    config = _config(tmp_path / "run")
    train(dataclasses.replace(config, packing=dataclasses.replace(config.packing, resident_budget_mib=0)), say=_quiet)
    _assert_equals_uninterrupted(tmp_path / "run", uninterrupted)


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
    config = _config(tmp_path / "run", data=f"{source}:{path}", steps=6)
    said: list[str] = []
    outcome = train(dataclasses.replace(config, packing=DataConfig()), say=said.append)
    assert outcome.finished
    assert all(picture.exists() for picture in outcome.pictures.values())
    if source == "folder":
        assert any("left out 8 unreadable images" in line for line in said)
    with Image.open(outcome.pictures["samples"]) as samples:
        assert samples.mode == "RGB"
