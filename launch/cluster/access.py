"""How our commands reach Ray: with a token, on loopback unless told otherwise, and with errors of one line.

Ray without a token runs anyone's code who reaches one of its ports. Call `require_token` before Ray is imported, which
reads the environment only then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

import gen_dist
from gen_dist.errors import ConfigError

CODE = Path(gen_dist.__path__[0]).resolve().parent
"""Directory of the package gen_dist: the root of a checkout, or site-packages."""
LOOPBACK = "127.0.0.1"
GCS_PORT, DASHBOARD_PORT = 6379, 8265
_REACH_SECONDS = 5.0
_HEAD_TRIES = 5

_PASSED_ON = ("GEN_DIST_CACHE", "WANDB_MODE", "WANDB_PROJECT")
"""No secret is among them: whoever has the token can read them."""


def token_path() -> Path:
    """Where the token is kept: $RAY_AUTH_TOKEN_PATH, else Ray's own default."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def require_token(create: bool) -> None:
    """Have this process and those it starts use token authentication, and report no usage statistics.

    Args:
        create: make a token where there is none, readable by its owner alone; else that is an error.

    Raises:
        ConfigError: authentication was switched off, there is no token, or others may read it.
    """
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE is {mode!r}: anyone who reaches a port could run code; unset it, or set `token`"
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
            raise ConfigError(f"others may read the token in {path}; make a new one, or run `chmod 600 {path}`")
    except FileNotFoundError:
        raise ConfigError(
            f"no token in {path}; copy the one of the head there (mode 600), or name its file in RAY_AUTH_TOKEN_PATH"
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


def shipped_code() -> dict[str, Any]:
    """Part of a runtime environment that brings the package gen_dist to other hosts, and nothing that lies beside it.

    Ray copies the folders that gen_dist/kernels and gen_dist/launch link to.
    """
    others = [f"/{entry.name}" for entry in CODE.iterdir() if entry.name != "gen_dist"]
    return {"working_dir": str(CODE), "excludes": [*others, "__pycache__"]}


def passed_on() -> dict[str, str]:
    """Environment variables of this process that those on other hosts are to have as well."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def keep_to_loopback() -> None:
    """Have a Ray that is started from this process listen on 127.0.0.1 alone, and its workers talk over it."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's only switch that moves every port
    if "lo" in psutil.net_if_addrs():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@contextlib.contextmanager
def connect(address: str | None, least_cpus: int, cpus: int) -> Iterator[None]:
    """Within it, this process is part of a running cluster, or of one of its own on loopback that ends with it.

    Args:
        address: HOST:PORT of the head; None is the cluster that this process is a job of, else a new one.
        least_cpus: that the cluster has to have.
        cpus: of a new cluster, even where there are fewer, but never less than this host has.

    Raises:
        ConfigError: no token, or the cluster cannot be reached, refuses us or is too small.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    require_token(create=address is None)
    host, port = (LOOPBACK, 0) if address is None else assert_reachable(address, GCS_PORT)
    if host in (LOOPBACK, "localhost"):
        keep_to_loopback()
    if address is not None:
        assert_welcome(host, port)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    variables = passed_on()
    if address is None:
        # By itself Ray would join whatever cluster someone else last started on this host.
        options |= {"address": "local", "_node_ip_address": LOOPBACK, "include_dashboard": False}
        # This very code, too, even where nothing or another copy of it is installed.
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
        options |= {"num_cpus": max(cpus, os.cpu_count() or 1), "runtime_env": {"env_vars": variables}}
    elif "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # a job's environment is set by who submitted it
        options |= {"address": address}
    else:
        # The other hosts get this very code, whatever is installed there.
        options |= {"address": address, "runtime_env": {"env_vars": variables, **shipped_code()}}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        where = "no local cluster could be started" if address is None else f"cannot join the cluster at {address}"
        raise ConfigError(f"{where}: {reason}") from None
    with contextlib.redirect_stdout(None):  # Ray writes there of each worker and host that dies, at length
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
    """End this process with one line once the head is gone: Ray would dump its stack, and minutes later."""
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
        f"error: the head at {address} is gone; all that was saved is where it was: start the head again, then run the "
        "same command",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def assert_welcome(host: str, port: int) -> None:
    """Ask a head whether it lives, with our token: Ray itself would try a refused one for 20 seconds, and not say so.

    Raises:
        ConfigError: it refuses the token, or is no head.
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
                    f"the cluster at {host}:{port} refuses our token; copy the one of its head to {token_path()}"
                ) from None
            raise ConfigError(f"what listens at {host}:{port} is no head of Ray: {error.code().name.lower()}") from None


def assert_reachable(address: str, default_port: int) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT or a URL, on which something listens.

    Raises:
        ConfigError: it is no such address, or nothing answers there.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or default_port
    except ValueError:
        host, port = None, 0
    if not host:
        raise ConfigError(f"{address!r} is no address; write HOST:PORT")
    try:
        socket.create_connection((host, port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
        raise ConfigError(
            f"nothing can be reached at {host}:{port}: {reason}; is the head up, and the port open?"
        ) from None
    return host, port
