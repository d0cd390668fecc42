"""Access to Ray clusters: with a token, on loopback by default, and with errors of one line.

Without a token, anyone who can reach a Ray port can run code. Call `require_token` before Ray is imported, because Ray
reads the environment only then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import psutil

import gen_dist
from gen_dist.errors import ConfigError
from gen_dist.limits import usable_cpus
from gen_dist.startup import tell

CODE = Path(gen_dist.__path__[0]).resolve().parent
"""Directory of the package gen_dist: the root of a checkout, or site-packages."""
LOOPBACK = "127.0.0.1"
GCS_PORT, DASHBOARD_PORT = 6379, 8265
_REACH_SECONDS = 5.0
_HEAD_TRIES = 5
_LONGEST_TEMPORARY = 40
"""Bytes of a $TMPDIR in which Ray's sockets still have names of at most 107 bytes, the system's limit."""

_FORWARDED = ("GEN_DIST_CACHE", "WANDB_MODE", "WANDB_PROJECT")
"""None of these variables is secret: anyone who has the token can read them."""


def token_path() -> Path:
    """File of the token: $RAY_AUTH_TOKEN_PATH, else Ray's own default."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def require_token(create: bool) -> None:
    """Make this process and its children use token authentication, and switch off Ray's usage statistics.

    Args:
        create: make a missing token, readable by its owner alone. If False, a missing token is an error.

    Raises:
        ConfigError: authentication is switched off, the token is missing, or other users can read it.
    """
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE is {mode!r}: anyone who can reach a port could run code; unset it, or set `token`"
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    try:
        if create and not path.exists():
            _make_token(path)
        if not path.read_text().strip():
            raise ConfigError(f"the token file {path} is empty; remove it, and start the head again for a new token")
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"other users can read the token in {path}; make a new one, or run `chmod 600 {path}`")
    except FileNotFoundError:
        raise ConfigError(
            f"no token in {path}; copy the head's token there (mode 600), or name its file in RAY_AUTH_TOKEN_PATH"
        ) from None
    except OSError as error:
        raise ConfigError(f"the token file {path} cannot be used: {error.strerror}") from None


def _make_token(path: Path) -> None:
    import secrets

    umask = os.umask(0o077)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    finally:
        os.umask(umask)


def shipped_code(files: Mapping[str, bytes] = MappingProxyType({}), directory: Path | None = None) -> dict[str, Any]:
    """Part of a runtime environment that brings the package gen_dist to other hosts, and nothing that lies beside it.

    Ray copies the folders that gen_dist/kernels and gen_dist/launch link to.

    Args:
        files: contents of further files in the working directory, by name. They have no place in the command of a job,
            which is one argument of a program: the system limits it to 128 KiB.
        directory: an empty directory to collect them in, needed until the job is submitted.
    """
    if files and directory:
        (directory / "gen_dist").symlink_to(CODE / "gen_dist")
        for name, content in files.items():
            (directory / name).write_bytes(content)
        return {"working_dir": str(directory), "excludes": ["__pycache__"]}
    others = [f"/{entry.name}" for entry in CODE.iterdir() if entry.name != "gen_dist"]
    return {"working_dir": str(CODE), "excludes": [*others, "__pycache__"]}


def forwarded_variables() -> dict[str, str]:
    """Environment variables of this process that processes on other hosts get as well."""
    return {name: os.environ[name] for name in _FORWARDED if name in os.environ}


def keep_to_loopback() -> None:
    """Make a Ray that this process starts listen on 127.0.0.1 alone, and its workers communicate over it."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's only switch that moves every port
    if "lo" in psutil.net_if_addrs():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@contextlib.contextmanager
def connect(address: str | None, least_cpus: int, cpus: int) -> Iterator[None]:
    """Make this process part of a running cluster, or of its own cluster on loopback, which ends with the block.

    Args:
        address: HOST:PORT of the head. None is the cluster that runs this process as a job, else a new cluster.
        least_cpus: CPUs that the cluster must have.
        cpus: CPUs of a new cluster, even if this host has fewer; a host with more offers all of them.

    Raises:
        ConfigError: no token, or the cluster cannot be reached, refuses the token or is too small.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    require_token(create=address is None)
    host, port = (LOOPBACK, 0) if address is None else assert_reachable(address, GCS_PORT)
    if host in (LOOPBACK, "localhost"):
        keep_to_loopback()
    if address is not None:
        assert_token_accepted(host, port)
    else:
        tell("starting Ray on this host, which may take half a minute")
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    variables = forwarded_variables()
    if address is None:
        # By default Ray joins the cluster that anyone last started on this host.
        options |= {"address": "local", "_node_ip_address": LOOPBACK, "include_dashboard": False}
        # Workers import the code of this process, even if no or another version is installed.
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
        options |= {"num_cpus": max(cpus, usable_cpus()), "runtime_env": {"env_vars": variables}}
        if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPORARY:
            options["_temp_dir"] = "/tmp/ray"
    elif "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # `submit` has set the job's environment
        options |= {"address": address}
    else:
        # Other hosts get the code of this process, even if another version is installed there.
        options |= {"address": address, "runtime_env": {"env_vars": variables, **shipped_code()}}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        where = "no local cluster could be started" if address is None else f"cannot join the cluster at {address}"
        raise ConfigError(f"{where}: {reason}") from None
    with contextlib.redirect_stdout(None):  # Ray prints long messages about each worker and host that dies
        left = threading.Event()
        try:
            found = int(ray.cluster_resources().get("CPU", 0))
            if found < least_cpus:
                raise ConfigError(
                    f"the cluster has {found} CPUs, and the workers need {least_cpus}; use fewer --workers or "
                    "--cpus-per-worker"
                )
            if address is not None:
                threading.Thread(target=_end_with_head, args=(address, left), name="gen_dist-head", daemon=True).start()
            yield
        finally:
            left.set()
            ray.shutdown()


def _end_with_head(address: str, left: threading.Event) -> None:
    """End this process with one line once the head is gone. Ray would print its stack, minutes later."""
    missed = 0
    while missed < _HEAD_TRIES:
        if left.wait(1.0):
            return
        try:
            assert_reachable(address, GCS_PORT)
            missed = 0
        except ConfigError:
            missed += 1
    print(
        f"error: the head at {address} is gone; everything that was saved is still there: start the head again, then "
        "run the same command",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def assert_token_accepted(host: str, port: int) -> None:
    """Check that a head answers and accepts our token. Ray itself retries a refused token for 20 seconds, silently.

    Raises:
        ConfigError: the head refuses the token, or another program listens there.
    """
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    token = os.environ.get("RAY_AUTH_TOKEN") or token_path().read_text().strip()
    messages: Any = gcs_service_pb2  # made at run time
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive
        try:
            ask(
                messages.CheckAliveRequest(),
                timeout=_REACH_SECONDS,
                metadata=[("authorization", f"Bearer {token}")],
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(
                    f"the cluster at {host}:{port} refuses our token; copy its head's token to {token_path()}"
                ) from None
            raise ConfigError(f"{host}:{port} is not the head of a Ray cluster: {error.code().name.lower()}") from None


def assert_reachable(address: str, default_port: int) -> tuple[str, int]:
    """Return host and port of an address (HOST, HOST:PORT or a URL) after connecting to it.

    Raises:
        ConfigError: the address is invalid, or nothing listens there.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or default_port
    except ValueError:
        host, port = None, 0
    if not host:
        raise ConfigError(f"{address!r} is not an address; write HOST:PORT")
    try:
        socket.create_connection((host, port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
        raise ConfigError(f"cannot connect to {host}:{port}: {reason}; is the head up, and the port open?") from None
    return host, port
