"""Runs that are killed, stopped or damaged resume exactly, or say in one line why not."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gen_dist.config import TrainConfig
from gen_dist.errors import UserError
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.run_mark import write_mark
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.runs import write_config
from tests.support.vae_runs import assert_equals_uninterrupted, config_of, in_child, quiet, state_of
from tests.support.warm_python import warm_python


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

        if not os.WIFSIGNALED(in_child(lambda path=path: _train(path), wait)):  # type: ignore[misc]
            shutil.rmtree(path)  # finished before the kill
            continue
        killed_at.append(_newest_step(path))
        assert in_child(lambda path=path: _train(path)) == 0  # type: ignore[misc]
        assert_equals_uninterrupted(path, uninterrupted)
    assert len(set(killed_at)) > kills // 2, killed_at


def _newest_step(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoint_paths(run_dir)), default=0)


def _train(path: Path) -> None:
    train(config_of(path), say=quiet)


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
        status = in_child(lambda path=path, fatal=fatal: train_and_die(path, fatal))  # type: ignore[misc]
        assert os.WIFSIGNALED(status)
        newest = checkpoints.load_newest(path, quiet)
        assert newest is not None
        assert newest[0].step in (4, 6)
        assert in_child(lambda path=path: _train(path)) == 0  # type: ignore[misc]
        assert_equals_uninterrupted(path, uninterrupted)
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
    train(config_of(path), say=said.append)
    assert str(newest) in said[0]
    assert "damaged" in said[0]
    assert "resuming" in said[1]
    assert "step 38" in said[1]
    assert_equals_uninterrupted(path, uninterrupted)


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
    config = write_config(tmp_path / "config.json", config_of(tmp_path / "run", checkpoint_every=1000))
    command = [*warm_python(), str(REPOSITORY / "launch/train.py"), "--config", str(config)]
    for _attempt in range(5):  # on a busy machine a run may end before this process gets to signal it
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        output = _signalled(command, number, tmp_path)
        if "stopped at step" in output:
            break
    assert "stopped at step" in output
    step, _ = state_of(tmp_path / "run")
    assert 9 <= step < 40
    assert f"to go on: python {command[-3]} --config {config}" in output
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 0
    assert f"resuming {tmp_path / 'run'} at step {step} of 40" in done.stderr
    assert "finished at step 40" in done.stdout
    assert_equals_uninterrupted(tmp_path / "run", uninterrupted)


def test_files_of_a_run_without_checkpoint_are_removed(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    shutil.rmtree(path / "checkpoints")
    write_mark(path)  # killed before its first checkpoint
    outcome = train(config_of(path, steps=12), say=quiet)
    assert outcome.pictures["samples"] == path / "samples/step_00000012.png"
    assert sorted(file.name for file in (path / "samples").iterdir()) == ["step_00000010.png", "step_00000012.png"]
    assert (path / "wandb-id").read_text() != (uninterrupted / "wandb-id").read_text()


def test_a_checkpoint_that_a_kill_left_too_many_is_removed(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    newest, before = checkpoints.checkpoint_paths(path)
    shutil.copytree(before, path / "checkpoints" / "step_00000001")
    train(config_of(path), say=quiet)
    assert checkpoints.checkpoint_paths(path) == [newest, before]


def test_a_checkpoint_saved_after_damage_is_kept(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", steps=12, keep_checkpoints=1, checkpoint_every=4)
    train(dataclasses.replace(config, keep_checkpoints=2), say=quiet)
    os.truncate(checkpoint_paths(tmp_path / "run")[0] / "networks.safetensors", 100)
    constant = dataclasses.replace(config, optimization=dataclasses.replace(config.optimization, decay="constant"))
    (tmp_path / "run/config.json").write_text(constant.to_json())
    train(dataclasses.replace(constant, steps=11), say=quiet)
    assert [path.name for path in checkpoint_paths(tmp_path / "run")] == ["step_00000011"]
    assert state_of(tmp_path / "run")[0] == 11


@pytest.mark.parametrize("spoilt", ["a file named samples", "no metrics", "a config of bytes"])
def test_a_damaged_run_directory_is_one_line_or_harmless(spoilt: str, uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uninterrupted, path)
    if spoilt == "no metrics":
        (path / "metrics.jsonl").unlink()
        assert train(config_of(path), say=quiet).finished
        return
    if spoilt == "a file named samples":
        shutil.rmtree(path / "samples")
        shutil.rmtree(checkpoint_paths(path)[0])
        (path / "samples").write_text("mine")
    else:
        (path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as error:
        train(config_of(path), say=quiet)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_full_disk_at_a_checkpoint_keeps_the_previous_one(uninterrupted: Path, tmp_path: Path) -> None:
    """A limit on file size makes real writes fail, as a full disk does."""
    import resource

    path = tmp_path / "run"
    train(config_of(path, steps=40), say=quiet)
    shutil.rmtree(checkpoint_paths(path)[0])

    def with_little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            train(config_of(path), say=quiet)
        except UserError as error:
            (path / "said").write_text(str(error))

    assert in_child(with_little_room) == 0
    said = (path / "said").read_text()
    assert "\n" not in said
    assert "cannot be written" in said
    assert "step_00000038" in said
    assert checkpoints.load(checkpoint_paths(path)[0])[0].step == 38
    (path / "said").unlink()
    _train(path)
    assert_equals_uninterrupted(path, uninterrupted)
