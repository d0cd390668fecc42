"""Jobs and tokens: what a job brings along, who may reach a cluster, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from gen_dist.launch import ray_job
from tests.conftest import REPOSITORY
from tests.launch.ray_commands import (
    belongs_to,
    config_of,
    error_of,
    head_of_cluster,
    launched,
    losses_of_run,
    run_to_end,
)
from tests.support.runs import (
    close_losses,
    make_trainer,
    run_steps,
    write_config,
)
from tests.support.two_ranks import free_port


def _python(code: str, environment: dict[str, str]) -> str:
    """Output of Python code, errors included."""
    done = run_to_end([sys.executable, "-c", code], environment, timeout=90)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_job_trains_and_no_port_opens_without_the_token(environment: dict[str, str], tmp_path: Path) -> None:
    file = write_config(tmp_path / "config.json", config_of(checkpoint_every=50, evaluate_every=50))
    token = tmp_path / "home" / ".ray" / "auth_token"
    with head_of_cluster(environment, tmp_path) as (port, dashboard, client):
        assert token.stat().st_mode & 0o777 == 0o600 and token.parent.stat().st_mode & 0o777 == 0o700
        submit = launched("ray_job.py", "submit", "--dashboard", f"http://127.0.0.1:{dashboard}", "--config", file)
        done = run_to_end(
            [*submit, "--storage", str(tmp_path / "runs"), "--run-dir", "job", "--workers", "2"], environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished at step 50" in done.stdout and "succeeded" in done.stdout
        trainer = make_trainer(config_of())
        assert losses_of_run(tmp_path / "runs" / "job") == close_losses(run_steps(trainer, 0, 50))
        at = ["--dashboard", f"http://127.0.0.1:{dashboard}"]
        assert "SUCCEEDED" in run_to_end(launched("ray_job.py", "status", *at), environment).stdout
        assert "no-such-job" in error_of(launched("ray_job.py", "logs", "no-such-job", *at), environment)

        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.pid]
        ours = {one.pid for one in psutil.process_iter() if belongs_to(one, token)}
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
        assert "no token in" in error_of([*submit, "--storage", str(tmp_path / "runs")], stranger)
        refused = guesser | {"RAY_AUTH_MODE": "token"}
        assert "refuses our token" in error_of([*submit, "--storage", str(tmp_path / "runs")], refused)
        words = ["--config", file, "--run-dir", tmp_path / "stolen", "--address", f"127.0.0.1:{port}"]
        assert "refuses our token" in error_of(launched("ray_train.py", *words), refused)
        busy = launched("ray_cluster.py", "head", "--port", port, "--dashboard-port", free_port())
        assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in error_of(busy, environment)


@pytest.mark.slow
def test_a_job_brings_its_plugin_along(environment: dict[str, str], tmp_path: Path) -> None:
    plugin = tmp_path / "my gan.py"
    # A comment in Latin-1, and more than an argument of a program may have: the file is sent as it is.
    content = (REPOSITORY / "tests/plugins/feature_matching_gan.py").read_bytes()
    plugin.write_bytes(b"# -*- coding: latin-1 -*-\n# \xfc" + 150_000 * b"x" + b"\n" + content)
    words = ["feature-matching-mnist", "--plugin", plugin, "--feature-maps", 4, 8, "--hidden-size", 8, "--steps", 4]
    words += ["--data", "synthetic", "--synthetic-images", 64, "--global-batch-size", 16, "--decay", "constant"]
    with head_of_cluster(environment, tmp_path) as (_, dashboard, _client):
        at = ["submit", "--dashboard", f"http://127.0.0.1:{dashboard}"]
        done = run_to_end(
            launched("ray_job.py", *at, *words, "--storage", tmp_path / "runs", "--run-dir", "job"), environment, 400
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
    done = run_to_end([sys.executable, "-c", code, *preset, *words], environment)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the config needs the plug-in far_gan: there is no plug-in far_gan"), done.stderr
    assert "on all hosts" in last and "builtins" not in done.stderr


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
            [*train, "--address", f"127.0.0.1:{free_port()}"],
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
            ["ray_job.py", "status", "--dashboard", f"http://127.0.0.1:{free_port()}"],
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
    assert message in error_of(launched(*command), environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})


def test_a_token_is_private_and_needed(environment: dict[str, str], tmp_path: Path) -> None:
    token, train = tmp_path / "token", launched("ray_train.py", "vae-mnist", "--address", "127.0.0.1:1")
    environment = environment | {"RAY_AUTH_TOKEN_PATH": str(token)}
    assert "no token in" in error_of(train, environment)
    token.write_text("0" * 64)
    token.chmod(0o644)
    assert f"run `chmod 600 {token}`" in error_of(train, environment)
    token.write_text("")
    token.chmod(0o600)
    assert "is empty" in error_of(train, environment)
    assert "RAY_AUTH_MODE is 'disabled'" in error_of(train, environment | {"RAY_AUTH_MODE": "disabled"})


def test_ray_is_not_needed_to_train_without_it() -> None:
    """`launch/train.py` does not import Ray, which takes seconds."""
    code = "import sys; import gen_dist.launch.cluster.options, gen_dist.training.run; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
