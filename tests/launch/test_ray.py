"""Real Ray clusters on this host: the same run as without Ray, killed workers, closed ports, and errors of one line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from gen_dist.config import TrainConfig
from gen_dist.launch import ray_job
from gen_dist.records.checkpoint import checkpoint_paths, load
from gen_dist.records.metrics_file import read_metrics
from tests.conftest import REPOSITORY
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

RAY = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "OMP_NUM_THREADS": "1"}
SECONDS = 240


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of commands, with this test's own token, cache, home, and directory for Ray's logs and sockets."""
    own = {"HOME": str(tmp_path / "home"), "GEN_DIST_CACHE": str(tmp_path / "packed"), "PYTHONPATH": str(REPOSITORY)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    (tmp_path / "home").mkdir()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as short:
        yield kept | RAY | own | {"RAY_TMPDIR": short}


def _launch(script: str, *words: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / "launch" / script), *map(str, words)]


def _run(command: list[str], environment: dict[str, str], timeout: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. After the timeout, end it and the processes that it started."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _error_of(command: list[str], environment: dict[str, str]) -> str:
    """Error line of a command that fails; it must be the only output."""
    done = _run([*warm_python(), *command[1:]], environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert not done.stdout and done.stderr.count("\n") == 1, done.stdout + done.stderr
    return done.stderr.removesuffix("\n")


def _config(**changes: object) -> TrainConfig:
    return small_config("vae", **changes)


def _losses(run: Path) -> list[float]:
    return losses_of(read_metrics(run / "metrics.jsonl"))


def test_two_workers_equal_one_process_which_resumes_their_run(environment: dict[str, str], tmp_path: Path) -> None:
    """Ray's workers train the first half, one process the second half, with the same options."""
    file, run = write_config(tmp_path / "config.json", _config()), tmp_path / "runs" / "first"
    words = ["--config", file, "--checkpoint-every", 20, "--evaluate-every", 20]
    constant = ["--decay", "constant", "--workers", 2, "--storage", run.parent, "--run-dir", "first"]
    done = _run(_launch("ray_train.py", *words, "--steps", 40, *constant), environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 40" in done.stdout and "step 40/40" in done.stderr
    assert load(checkpoint_paths(run)[0])[0].facts["world_size"] == 2
    one = [*warm_python(), *_launch("train.py", *words, "--decay", "constant", "--run-dir", run)[1:]]
    done = _run(one, environment)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr and "now with 1 processes" in done.stderr
    trainer = make_trainer(TrainConfig.from_json((run / "config.json").read_text(), "the run"))
    assert _losses(run) == close_losses(run_steps(trainer, 0, 50))


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
    done = _run([sys.executable, "-c", code], environment | {"GEN_DIST_THREADS": "1"})
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
    one = [*warm_python(), *_launch("train.py", *words, tmp_path / "one")[1:]]
    done = _run(one, environment | {"GEN_DIST_THREADS": "1"})  # as many threads as a worker has
    assert done.returncode == 0, done.stderr
    wanted, _ = load(checkpoint_paths(tmp_path / "one")[0])
    for workers in (2, 4):
        words_of_ray = [*words, str(workers), "--workers", workers, "--storage", tmp_path]
        done = _run(_launch("ray_train.py", *words_of_ray), environment, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        found, _ = load(checkpoint_paths(tmp_path / str(workers))[0])
        assert found.facts["world_size"] == workers
        for group in wanted.tensors:
            assert_same_bits(dict(wanted.tensors[group]), dict(found.tensors[group]))
        assert _losses(tmp_path / str(workers)) == _losses(tmp_path / "one")


def _worker_ids(driver: subprocess.Popen[bytes]) -> list[int]:
    """Ids of the processes that train for a command."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(driver.pid).children(recursive=True)
        return [one.pid for one in below if any("RayTrainWorker" in word for word in one.cmdline())]
    return []


@pytest.mark.slow
def test_ten_killed_workers_leave_the_result_bit_for_bit(environment: dict[str, str], tmp_path: Path) -> None:
    config = _config(steps=2000, checkpoint_every=25, evaluate_every=2000, log_every=25, sample_every=2000)
    file, runs = write_config(tmp_path / "config.json", config), tmp_path / "runs"
    words = ["--config", file, "--workers", 2, "--storage", runs]
    done = _run(_launch("ray_train.py", *words, "--run-dir", "undisturbed"), environment)
    assert done.returncode == 0, done.stderr
    chance, killed_at, run = random.Random(0), [], runs / "killed"
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            _launch("ray_train.py", *words, "--run-dir", "killed"),
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
    assert _losses(run) == _losses(runs / "undisturbed")


def _newest_step(run: Path) -> int:
    paths = checkpoint_paths(run)
    return int(paths[0].name.removeprefix("step_")) if paths else 0


@pytest.mark.slow
def test_a_run_at_a_url_saves_on_sigterm_and_resumes(environment: dict[str, str], tmp_path: Path) -> None:
    """fsspec's local files serve as a URL: every file of the run is there, and none in the working directory."""
    config = _config(steps=4000, checkpoint_every=100, evaluate_every=4000, log_every=50, sample_every=4000)
    file, kept = write_config(tmp_path / "config.json", config), tmp_path / "bucket"
    words = ["--config", file, "--workers", 2, "--storage", f"fsspec+local://{kept}", "--run-dir", "far"]
    run = kept / "far"
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            _launch("ray_train.py", *words), env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
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
    done = _run(_launch("ray_train.py", *words), environment)
    assert done.returncode == 0, done.stderr
    assert f"resuming fsspec+local://{run} at step {stopped[1]} of 4000" in done.stderr
    assert "finished at step 4000" in done.stdout and str(run) in done.stdout
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.jsonl", "summary.json", "curves.png"}
    assert len(read_metrics(run / "metrics.jsonl")) == 80
    assert len(checkpoint_paths(run)) == config.keep_checkpoints


@contextlib.contextmanager
def _head(environment: dict[str, str], directory: Path) -> Iterator[tuple[int, int, int]]:
    """Run a head on loopback, and give its port and the ports of its dashboard and of remote clients."""
    port, dashboard, client = _free_port(), _free_port(), _free_port()
    with (directory / "head.log").open("wb") as log:
        words = ["head", "--port", port, "--dashboard-port", dashboard, "--client-port", client, "--cpus", 2]
        head = subprocess.Popen(
            _launch("ray_cluster.py", *words), env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
        )
    try:
        deadline = time.monotonic() + 90
        while not (_listens(port) and _listens(dashboard)):
            assert time.monotonic() < deadline and head.poll() is None, (directory / "head.log").read_text()
            time.sleep(0.2)
        yield port, dashboard, client
    finally:
        head.terminate()
        head.wait(timeout=60)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _python(code: str, environment: dict[str, str]) -> str:
    """Output of Python code, errors included."""
    done = _run([sys.executable, "-c", code], environment, timeout=90)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_job_trains_and_no_port_opens_without_the_token(environment: dict[str, str], tmp_path: Path) -> None:
    file = write_config(tmp_path / "config.json", _config(checkpoint_every=50, evaluate_every=50))
    token = tmp_path / "home" / ".ray" / "auth_token"
    with _head(environment, tmp_path) as (port, dashboard, client):
        assert token.stat().st_mode & 0o777 == 0o600 and token.parent.stat().st_mode & 0o777 == 0o700
        submit = _launch("ray_job.py", "submit", "--dashboard", f"http://127.0.0.1:{dashboard}", "--config", file)
        done = _run([*submit, "--storage", str(tmp_path / "runs"), "--run-dir", "job", "--workers", "2"], environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished at step 50" in done.stdout and "succeeded" in done.stdout
        trainer = make_trainer(_config())
        assert _losses(tmp_path / "runs" / "job") == close_losses(run_steps(trainer, 0, 50))
        at = ["--dashboard", f"http://127.0.0.1:{dashboard}"]
        assert "SUCCEEDED" in _run(_launch("ray_job.py", "status", *at), environment).stdout
        assert "no-such-job" in _error_of(_launch("ray_job.py", "logs", "no-such-job", *at), environment)

        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.pid]
        ours = {one.pid for one in psutil.process_iter() if _belongs_to(one, token)}
        doors = [one for one in listening if one.pid in ours]
        assert {port, dashboard} <= {one.laddr.port for one in doors}
        assert {one.laddr.ip for one in doors} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

        # Ray's drivers find a cluster on loopback only with this variable.
        stranger = environment | {"HOME": str(tmp_path / "stranger"), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        stranger["RAY_AUTH_MODE"] = "disabled"
        (tmp_path / "stranger").mkdir()
        guesser = stranger | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        # The owner of the token gets in at each port, so that only the token keeps the others out.
        owner = environment | {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token.read_text(),
        }
        let_in = _gets_in(owner, port, dashboard, client, [one.laddr.port for one in doors])
        for door in (f"IN {dashboard} /api/jobs/ ", "GCS: IN", "driver: IN", "client: IN"):
            assert any(line.startswith(door) for line in let_in), (door, let_in)
        for who in (stranger, guesser):
            assert not _gets_in(who, port, dashboard, client, [one.laddr.port for one in doors])
        stranger.pop("RAY_AUTH_MODE")
        assert "no token in" in _error_of([*submit, "--storage", str(tmp_path / "runs")], stranger)
        refused = guesser | {"RAY_AUTH_MODE": "token"}
        assert "refuses our token" in _error_of([*submit, "--storage", str(tmp_path / "runs")], refused)
        words = ["--config", file, "--run-dir", tmp_path / "stolen", "--address", f"127.0.0.1:{port}"]
        assert "refuses our token" in _error_of(_launch("ray_train.py", *words), refused)
        busy = _launch("ray_cluster.py", "head", "--port", port, "--dashboard-port", _free_port())
        assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in _error_of(busy, environment)


@pytest.mark.slow
def test_a_job_brings_its_plugin_along(environment: dict[str, str], tmp_path: Path) -> None:
    plugin = tmp_path / "my gan.py"
    # A comment in Latin-1, and more than an argument of a program may have: the file is sent as it is.
    content = (REPOSITORY / "tests/plugins/feature_matching_gan.py").read_bytes()
    plugin.write_bytes(b"# -*- coding: latin-1 -*-\n# \xfc" + 150_000 * b"x" + b"\n" + content)
    words = ["feature-matching-mnist", "--plugin", plugin, "--feature-maps", 4, 8, "--hidden-size", 8, "--steps", 4]
    words += ["--data", "synthetic", "--synthetic-images", 64, "--global-batch-size", 16, "--decay", "constant"]
    with _head(environment, tmp_path) as (_, dashboard, _client):
        at = ["submit", "--dashboard", f"http://127.0.0.1:{dashboard}"]
        done = _run(
            _launch("ray_job.py", *at, *words, "--storage", tmp_path / "runs", "--run-dir", "job"), environment, 400
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 4" in done.stdout and "succeeded" in done.stdout
    assert (tmp_path / "runs/job/plugins/my gan.py").read_bytes() == plugin.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["ray_train.py", "ray_sweep.py --metric samples/diversity --trials 2 --space learning_rate=1e-4,1e-3"]
)
def test_a_module_that_rays_processes_lack_is_named(script: str, environment: dict[str, str], tmp_path: Path) -> None:
    """Only the command itself finds the plug-in's module."""
    (tmp_path / "modules").mkdir()
    content = (REPOSITORY / "tests/plugins/feature_matching_gan.py").read_text()
    (tmp_path / "modules" / "far_gan.py").write_text(content)
    name, *words = script.split()
    code = f"""
import runpy, sys
sys.path[:0] = [{str(tmp_path / "modules")!r}, {str(REPOSITORY / "launch")!r}]
runpy.run_path({str(REPOSITORY / "launch" / name)!r}, run_name="__main__")
"""
    preset = ["feature-matching-mnist", "--plugin", "far_gan", "--data", "synthetic"]
    preset += ["--run-dir", str(tmp_path / "run")]
    done = _run([sys.executable, "-c", code, *preset, *words], environment)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the config needs the plug-in far_gan: there is no plug-in far_gan"), done.stderr
    assert "on all hosts" in last and "builtins" not in done.stderr


def _belongs_to(process: psutil.Process, token: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("HOME") == str(token.parent.parent)
    return False


def _gets_in(
    environment: dict[str, str], port: int, dashboard: int, client_port: int, doors: Sequence[int]
) -> list[str]:
    """Ports of a cluster that let us in, by name."""
    let_in = []
    # Requests to each HTTP server among the ports; a refusal is 401 or 403.
    paths = ["/api/jobs/", "/api/version", "/nodes?view=summary", "/api/actors", "/api/job_agent/jobs/", "/logs"]
    code = f"""
import json, os, urllib.request, urllib.error
token = os.environ.get("RAY_AUTH_TOKEN")
headers = {{"Authorization": f"Bearer {{token}}"}} if token else {{}}
for door in {sorted(set(doors))}:
    for path in {paths}:
        for data in (None, b'{{"entrypoint": "true"}}'):
            request = urllib.request.Request(f"http://127.0.0.1:{{door}}{{path}}", data, headers)
            request.add_header("Content-Type", "application/json")
            try:
                answer = urllib.request.urlopen(request, timeout=5)
                print("IN", door, path, answer.status, answer.read(80))
            except urllib.error.HTTPError as error:
                print("refused", door, path, error.code)
            except Exception as error:
                print("no HTTP", door, path, type(error).__name__)
"""
    answers = _python(code, environment)
    # Figures for Prometheus are not secret, and that interface executes nothing.
    let_in += [line for line in answers.splitlines() if line.startswith("IN ") and "b'# HELP" not in line]
    gcs = f"""
from ray._raylet import GcsClient
print("IN", GcsClient(address="127.0.0.1:{port}").internal_kv_keys(b"", None, 10))
"""
    driver = f"""
import ray
ray.init(address="127.0.0.1:{port}")
print("IN", ray.get(ray.remote(lambda: 1).remote()))
"""
    client = driver.replace(f"127.0.0.1:{port}", f"ray://127.0.0.1:{client_port}")
    for name, attempt in (("GCS", gcs), ("driver", driver), ("client", client)):
        said = _python(attempt, environment)
        let_in += [f"{name}: {line}" for line in said.splitlines() if line.startswith("IN ")]
    return let_in


def _addresses() -> dict[str, Callable[[], tuple[list[str], str]]]:
    train = ["ray_train.py", "vae-mnist"]
    return {
        "a port where nothing listens": lambda: (
            [*train, "--address", f"127.0.0.1:{_free_port()}"],
            "Connection refused; is the head up",
        ),
        "a host that does not exist": lambda: ([*train, "--address", "nowhere.invalid"], "nowhere.invalid:6379"),
        "a storage of no known kind": lambda: ([*train, "--storage", "nosuch://bucket"], "choose another --storage"),
        "no address": lambda: ([*train, "--address", ":"], "is not an address"),
        "too many workers to be": lambda: ([*train, "--min-workers", "3"], "min_workers 3 is not in 1 .. 2"),
        "a group that shards do not fit": lambda: (
            [*train, "--shards", "8", "--workers", "4", "--min-workers", "2"],
            "8 shards cannot be shared out evenly among 3 workers, and a group may have 2 to 4",
        ),
        "no worker": lambda: ([*train, "--workers", "0"], "workers 0 is less than 1"),
        "a job that would be lost": lambda: (["ray_job.py", "submit", "vae-mnist"], "name a --storage"),
        "a head far away": lambda: (["ray_cluster.py", "head", "--address", "203.0.113.1"], "use another --address"),
        "a job without a head": lambda: (
            ["ray_job.py", "status", "--dashboard", f"http://127.0.0.1:{_free_port()}"],
            "Connection refused; is the head up",
        ),
    }


class _StartingCluster:
    """Client of a cluster whose agents are not up yet at the first tries."""

    def __init__(self, reason: str) -> None:
        self.reasons = [f"Request failed with status code 500: {reason}"] * 2

    def submit_job(self, entrypoint: str) -> str:
        if self.reasons:
            raise RuntimeError(self.reasons.pop())
        return f"job of {entrypoint}"


def test_a_job_waits_for_the_agents_of_a_new_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    starting = _StartingCluster("No available agent to submit job, please try again later.")
    assert ray_job._submitted(starting, entrypoint="train") == "job of train"
    assert capsys.readouterr().err.count("waiting for the cluster") == 1
    with pytest.raises(RuntimeError, match="disk"):
        ray_job._submitted(_StartingCluster("the disk is full"), entrypoint="train")


@pytest.mark.parametrize("mistake", _addresses())
def test_a_mistake_gives_one_line(mistake: str, environment: dict[str, str], tmp_path: Path) -> None:
    command, message = _addresses()[mistake]()
    (tmp_path / "token").write_text("0" * 64)
    (tmp_path / "token").chmod(0o600)
    assert message in _error_of(_launch(*command), environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})


def test_a_token_is_private_and_needed(environment: dict[str, str], tmp_path: Path) -> None:
    token, train = tmp_path / "token", _launch("ray_train.py", "vae-mnist", "--address", "127.0.0.1:1")
    environment = environment | {"RAY_AUTH_TOKEN_PATH": str(token)}
    assert "no token in" in _error_of(train, environment)
    token.write_text("0" * 64)
    token.chmod(0o644)
    assert f"run `chmod 600 {token}`" in _error_of(train, environment)
    token.write_text("")
    token.chmod(0o600)
    assert "is empty" in _error_of(train, environment)
    assert "RAY_AUTH_MODE is 'disabled'" in _error_of(train, environment | {"RAY_AUTH_MODE": "disabled"})


@pytest.mark.slow
def test_a_dead_head_ends_a_run_with_one_line_and_loses_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    config = _config(steps=10**6, checkpoint_every=100, evaluate_every=10**6, sample_every=10**6)
    file, run = write_config(tmp_path / "config.json", config), tmp_path / "run"
    with _head(environment, tmp_path) as (port, *_):
        words = ["--config", file, "--workers", 2, "--run-dir", run, "--address", f"127.0.0.1:{port}"]
        driver = subprocess.Popen(
            _launch("ray_train.py", *words),
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,
        )
        deadline = time.monotonic() + 120
        while _newest_step(run) < 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        for one in psutil.process_iter():
            if _belongs_to(one, tmp_path / "home" / ".ray" / "auth_token") and "gcs_server" in one.name():
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
    config = _config(steps=400, checkpoint_every=20, evaluate_every=400, sample_every=400, keep_checkpoints=30)
    file = write_config(tmp_path / "config.json", config)
    train = _launch("ray_train.py", "--config", file, "--storage", small_disk, "--run-dir", "run")
    done = _run(train, environment)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search(r"^error: .*No space left on device", last), done.stderr
    saved = checkpoint_paths(small_disk / "run")
    assert saved
    assert load(saved[0])[0].step == 20 * len(saved)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = _run(train, environment)
    assert done.returncode == 2 and "Read-only file system" in done.stderr.splitlines()[-1], done.stderr
    assert checkpoint_paths(small_disk / "run") == saved


def test_ray_is_not_needed_to_train_without_it() -> None:
    """`launch/train.py` does not import Ray, which takes seconds."""
    code = "import sys; import gen_dist.launch.cluster.options, gen_dist.training.run; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
