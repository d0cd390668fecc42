"""Real Ray clusters on this host: the same run as without Ray, killed workers, dead heads and full disks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gen_dist.config import TrainConfig
from gen_dist.records.checkpoint import checkpoint_paths, load
from gen_dist.records.metrics_file import read_metrics
from tests.launch.ray_commands import belongs_to, config_of, head_of_cluster, launched, losses_of_run, run_to_end
from tests.support.children import end_with_parent
from tests.support.runs import (
    OBJECTIVES,
    assert_same_bits,
    close_losses,
    losses_of,
    make_trainer,
    run_steps,
    small_config,
    write_config,
)
from tests.support.warm_python import warm_python


def test_two_workers_equal_one_process_which_resumes_their_run(environment: dict[str, str], tmp_path: Path) -> None:
    """Ray's workers train the first half, one process the second half, with the same options."""
    file, run = write_config(tmp_path / "config.json", config_of()), tmp_path / "runs" / "first"
    words = ["--config", file, "--checkpoint-every", 20, "--evaluate-every", 20]
    constant = ["--decay", "constant", "--workers", 2, "--storage", run.parent, "--run-dir", "first"]
    done = run_to_end(launched("ray_train.py", *words, "--steps", 40, *constant), environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 40" in done.stdout and "step 40/40" in done.stderr
    assert done.stderr.startswith("starting Ray on this host")
    assert load(checkpoint_paths(run)[0])[0].facts["world_size"] == 2
    one = [*warm_python(), *launched("train.py", *words, "--decay", "constant", "--run-dir", run)[1:]]
    done = run_to_end(one, environment)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr and "now with 1 process" in done.stderr
    trainer = make_trainer(TrainConfig.from_json((run / "config.json").read_text(), "the run"))
    assert losses_of_run(run) == close_losses(run_steps(trainer, 0, 50))


@pytest.mark.slow
def test_two_workers_equal_one_process_for_every_objective(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "logs.json"
    code = f"""
from gen_dist.launch.cluster.access import connect
with connect(None, 2, 2):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from tests.launch.ray_worker import train_objectives
    TorchTrainer(
        train_objectives,
        train_loop_config={{"objectives": {list(OBJECTIVES)}, "out": {str(out)!r}}},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="all", storage_path={str(tmp_path)!r}),
    ).fit()
"""
    done = run_to_end([sys.executable, "-c", code], environment | {"GEN_DIST_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["world_size"] == 2
    from tests.parallel.rank_worker import config_of_ranks

    for objective in OBJECTIVES:
        trainer = make_trainer(config_of_ranks(objective))
        assert losses_of(found["logs"][objective]) == close_losses(run_steps(trainer, 0, 50)), objective


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shards_have_equal_bits_on_two_and_four_workers(environment: dict[str, str], tmp_path: Path) -> None:
    config = small_config("vae-gan", steps=60, shards=8, sync_batch_norm=True, checkpoint_every=60, sample_every=60)
    words = ["--config", write_config(tmp_path / "config.json", config), "--run-dir"]
    one = [*warm_python(), *launched("train.py", *words, tmp_path / "one")[1:]]
    done = run_to_end(one, environment | {"GEN_DIST_THREADS": "1"})  # as many threads as a worker has
    assert done.returncode == 0, done.stderr
    wanted, _ = load(checkpoint_paths(tmp_path / "one")[0])
    for workers in (2, 4):
        words_of_ray = [*words, str(workers), "--workers", workers, "--storage", tmp_path]
        done = run_to_end(launched("ray_train.py", *words_of_ray), environment, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        found, _ = load(checkpoint_paths(tmp_path / str(workers))[0])
        assert found.facts["world_size"] == workers
        for group in wanted.tensors:
            assert_same_bits(dict(wanted.tensors[group]), dict(found.tensors[group]))
        assert losses_of_run(tmp_path / str(workers)) == losses_of_run(tmp_path / "one")


def _worker_ids(driver: subprocess.Popen[bytes]) -> list[int]:
    """Ids of the processes that train for a command."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(driver.pid).children(recursive=True)
        return [one.pid for one in below if any("RayTrainWorker" in word for word in one.cmdline())]
    return []


@pytest.mark.slow
def test_ten_killed_workers_leave_the_result_bit_for_bit(environment: dict[str, str], tmp_path: Path) -> None:
    config = config_of(steps=2000, checkpoint_every=25, evaluate_every=2000, log_every=25, sample_every=2000)
    file, runs = write_config(tmp_path / "config.json", config), tmp_path / "runs"
    words = ["--config", file, "--workers", 2, "--storage", runs]
    done = run_to_end(launched("ray_train.py", *words, "--run-dir", "undisturbed"), environment)
    assert done.returncode == 0, done.stderr
    chance, killed_at, run = random.Random(0), [], runs / "killed"
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            launched("ray_train.py", *words, "--run-dir", "killed"),
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
        )
        try:
            for _ in range(10):
                before = _newest_step(run)
                deadline = time.monotonic() + 300  # a start of Ray takes a minute on a busy machine
                while _newest_step(run) <= before or len(_worker_ids(driver)) < 2:
                    assert time.monotonic() < deadline and driver.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 0.3))
                os.kill(chance.choice(_worker_ids(driver)), signal.SIGKILL)
                killed_at.append(_newest_step(run))
            assert driver.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        finally:
            driver.terminate()
            driver.wait(timeout=60)
    print(f"killed after the checkpoints of steps {killed_at}")
    whole, broken = (load(checkpoint_paths(path)[0])[0] for path in (runs / "undisturbed", run))
    assert whole.step == broken.step == 2000
    for group, tensors in whole.tensors.items():
        for name, tensor in tensors.items():
            assert tensor.equal(broken.tensors[group][name]), f"{group}/{name}"
    assert losses_of_run(run) == losses_of_run(runs / "undisturbed")


def _newest_step(run: Path) -> int:
    paths = checkpoint_paths(run)
    return int(paths[0].name.removeprefix("step_")) if paths else 0


@pytest.mark.slow
def test_a_run_at_a_url_saves_on_sigterm_and_resumes(environment: dict[str, str], tmp_path: Path) -> None:
    """fsspec's local files serve as a URL: every file of the run is there, and none in the working directory."""
    config = config_of(steps=4000, checkpoint_every=100, evaluate_every=4000, log_every=50, sample_every=4000)
    file, kept = write_config(tmp_path / "config.json", config), tmp_path / "bucket"
    words = ["--config", file, "--workers", 2, "--storage", f"fsspec+local://{kept}", "--run-dir", "far"]
    run = kept / "far"
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            launched("ray_train.py", *words), env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
        )
        deadline = time.monotonic() + 120
        while _newest_step(run) < 200:
            assert time.monotonic() < deadline and driver.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        driver.terminate()
        assert driver.wait(timeout=120) == 0
    said = (tmp_path / "log").read_text()
    stopped = re.search(r"stopped at step (\d+)", said)
    assert stopped, said
    assert _newest_step(run) == int(stopped[1]) < 4000
    done = run_to_end(launched("ray_train.py", *words), environment)
    assert done.returncode == 0, done.stderr
    assert f"resuming fsspec+local://{run} at step {stopped[1]} of 4000" in done.stderr
    assert "finished at step 4000" in done.stdout and str(run) in done.stdout
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.jsonl", "summary.json", "curves.png"}
    assert len(read_metrics(run / "metrics.jsonl")) == 80
    assert len(checkpoint_paths(run)) == config.keep_checkpoints


@pytest.mark.slow
def test_a_dead_head_ends_a_run_with_one_line_and_loses_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    config = config_of(steps=10**6, checkpoint_every=100, evaluate_every=10**6, sample_every=10**6)
    file, run = write_config(tmp_path / "config.json", config), tmp_path / "run"
    with head_of_cluster(environment, tmp_path) as (port, *_):
        words = ["--config", file, "--workers", 2, "--run-dir", run, "--address", f"127.0.0.1:{port}"]
        driver = subprocess.Popen(
            launched("ray_train.py", *words),
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,
        )
        deadline = time.monotonic() + 120
        while _newest_step(run) < 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        for one in psutil.process_iter():
            if belongs_to(one, tmp_path / "home" / ".ray" / "auth_token") and "gcs_server" in one.name():
                one.kill()
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 2, errors
    assert f"error: the head at 127.0.0.1:{port} is gone" in errors.splitlines()[-1], errors
    assert load(checkpoint_paths(run)[0])[0].step >= 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_full_or_read_only_storage_loses_nothing_saved(
    environment: dict[str, str], tmp_path: Path, small_disk: Path
) -> None:
    config = config_of(steps=400, checkpoint_every=20, evaluate_every=400, sample_every=400, keep_checkpoints=30)
    file = write_config(tmp_path / "config.json", config)
    train = launched("ray_train.py", "--config", file, "--storage", small_disk, "--run-dir", "run")
    done = run_to_end(train, environment)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search(r"^error: .*No space left on device", last), done.stderr
    saved = checkpoint_paths(small_disk / "run")
    assert saved
    assert load(saved[0])[0].step == 20 * len(saved)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run_to_end(train, environment)
    assert done.returncode == 2 and "Read-only file system" in done.stderr.splitlines()[-1], done.stderr
    assert checkpoint_paths(small_disk / "run") == saved
