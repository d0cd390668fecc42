"""`ray_pack.py` on real Ray clusters of this host, and training on what it made."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gen_dist.config import DataConfig
from gen_dist.launch.cluster.mailbox import settings_of_file_systems, take_settings
from gen_dist.launch.packing.options import PackOptions
from gen_dist.launch.packing.running import in_this_process, pack
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import read_metrics
from tests.launch.ray_commands import error_of, launched, run_to_end
from tests.support.children import end_with_parent
from tests.support.runs import close_losses, losses_of, small_config, write_config
from tests.support.shards import encoded, served, wait_for
from tests.support.warm_python import warm_python

IMAGES = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(IMAGES):
        path = tmp_path / "images" / f"class{number % 3}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, 16))
    return tmp_path / "images"


def made(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_makes_the_shards_of_one_process_after_a_kill(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    words = {"image_size": 12, "images_per_shard": 5}
    twin = tmp_path / "twin"
    pack(PackOptions(source=f"folder:{folder}", out=str(twin), **words), in_this_process, lambda _: None)  # type: ignore[arg-type]
    out = tmp_path / "out"
    command = launched("ray_pack.py", f"folder:{folder}", "--out", out, "--image-size", 12, "--images-per-shard", 5)
    first = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent
    )
    wait_for(lambda: len(list(out.glob("reports/*.json"))) >= 2, 240)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1)  # its cluster ends
    kept = {path: path.stat().st_mtime_ns for path in out.glob("reports/*.json")}
    done = run_to_end(command, environment)
    assert done.returncode == 0, done.stderr
    assert f"packed folder:{folder}: {IMAGES} images in 12 shards" in done.stderr
    assert made(out) == made(twin)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    (folder / "class0" / "000.png").write_bytes(b"\x89PNG damaged")
    said = [f"folder:{folder}", "--out", tmp_path / "other", "--unreadable-images", "error"]
    done = run_to_end(launched("ray_pack.py", *said), environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: folder:{folder}: class0/000.png is unreadable ")
    assert "Traceback" not in done.stderr
    assert "image_size" in error_of(launched("ray_pack.py", *said, "--image-size", 2), environment)


@pytest.fixture
def guarded(folder: Path, tmp_path: Path) -> Iterator[str]:
    """Pattern of shards of the folder behind a server on this machine."""
    out = tmp_path / "packed"
    options = PackOptions(source=f"folder:{folder}", out=str(out), images_per_shard=20)
    pack(options, in_this_process, lambda _: None)
    with served(out) as server:
        server.fails = lambda number: 503 if number % 7 == 0 else 0
        yield f"shards:{server.url}/train-{{00000..00002}}.tar"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_on_remote_shards_as_one_process(
    guarded: str, environment: dict[str, str], tmp_path: Path
) -> None:
    config = small_config("vae", data=guarded, packing=DataConfig(test_fraction=0.1), steps=12)
    words = ["--config", write_config(tmp_path / "config.json", config), "--run-dir"]
    done = run_to_end(launched("ray_train.py", *words, tmp_path / "two", "--workers", 2), environment)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_to_end([*warm_python(), *launched("train.py", *words, tmp_path / "one")[1:]], environment)
    assert done.returncode == 0, done.stderr
    one, two = (losses_of(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    assert two == close_losses(one)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_stop_while_their_server_is_gone(folder: Path, environment: dict[str, str], tmp_path: Path) -> None:
    pack(PackOptions(source=f"folder:{folder}", out=str(tmp_path / "out")), in_this_process, lambda _: None)
    run = tmp_path / "run"
    with served(tmp_path / "out") as server:
        data = f"shards:{server.url}/train-00000.tar"
        packing = DataConfig(test_fraction=0.1, cache_gib=1e-9)  # nothing is kept: each batch is fetched
        config = small_config("vae", data=data, packing=packing, steps=100_000, checkpoint_every=100_000, log_every=1)
        words = ["--config", write_config(tmp_path / "config.json", config), "--run-dir", run, "--workers", 2]
        driver = subprocess.Popen(
            launched("ray_train.py", *words),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=end_with_parent,
        )
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) > 3, 240)
        server.fails = lambda _: 503
        time.sleep(3)  # batches that were on their way have come
        asked = time.monotonic()
        driver.terminate()
        said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    stopped = re.search(r"stopped at step (\d+)", said)
    assert stopped and int(stopped[1]) == read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert time.monotonic() - asked < 60
    assert checkpoint_paths(run)


def test_settings_of_file_systems_reach_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.config

    monkeypatch.setenv("FSSPEC_HTTPS", '{"headers": {"Authorization": "word"}}')
    monkeypatch.setattr(fsspec.config, "conf", {})
    sent = settings_of_file_systems()
    assert sent["FSSPEC_HTTPS"].endswith('"word"}}')
    monkeypatch.delenv("FSSPEC_HTTPS")
    monkeypatch.setenv("FSSPEC_S3", '{"key": "own"}')
    take_settings({**sent, "FSSPEC_S3": '{"key": "theirs"}'})
    assert fsspec.config.conf == {"https": {"headers": {"Authorization": "word"}}, "s3": {"key": "own"}}


def test_help_of_packing_imports_neither_ray_nor_torch() -> None:
    code = "import sys; import gen_dist.launch.packing.options; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
