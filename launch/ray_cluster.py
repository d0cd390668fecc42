"""Start a host of a Ray cluster, safe by default: `python launch/ray_cluster.py head`, and `join HOST:PORT` elsewhere.

Either stays in the foreground and ends its processes when it ends. A host that lost its head joins again by itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

# From a checkout this runs wherever it is called from, installed or not. A wheel has no gen_dist beside this folder.
if (root := Path(__file__).resolve().parent.parent).joinpath("gen_dist").is_dir():
    sys.path.insert(0, str(root))

import tyro

from gen_dist.cli import own_program, run_command, run_subcommand
from gen_dist.errors import ConfigError, UserError
from gen_dist.launch.cluster.access import (
    DASHBOARD_PORT,
    GCS_PORT,
    LOOPBACK,
    assert_reachable,
    assert_welcome,
    keep_to_loopback,
    require_token,
    token_path,
)
from gen_dist.parallel.network_interfaces import interface_of, own_address_towards

_REJOIN_SECONDS = 3.0
_START_SECONDS = 15.0
"""Who ends so soon never was part of the cluster."""

_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""A host that was cut off is given up after 12 seconds instead of a minute. What is set already wins."""


def head(
    address: str = LOOPBACK,
    port: int = GCS_PORT,
    dashboard_port: int = DASHBOARD_PORT,
    client_port: int = 10001,
    cpus: int | None = None,
) -> None:
    """Start the first host of a cluster; a token is made if there is none yet.

    Args:
        address: Of this host, as the others reach it. On 127.0.0.1 nothing is reachable from outside.
        port: That the others join by.
        dashboard_port: Of the dashboard and the job interface, on 127.0.0.1 always.
        client_port: Of Ray's remote clients, which no command here uses.
        cpus: That workers may reserve. None is all.
    """
    require_token(create=True)
    if address == LOOPBACK:
        keep_to_loopback()
    for host, needed in ((address, port), (address, client_port), (LOOPBACK, dashboard_port)):
        _assert_free(host, needed)
    words = [
        "--head",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={dashboard_port}",
    ]
    elsewhere = "" if address == LOOPBACK else f"; on the others: {own_program()} join {address}:{port}"
    jobs = f"jobs at http://{LOOPBACK}:{dashboard_port}"
    print(f"head at {address}:{port}, {jobs}, token in {token_path()}{elsewhere}", flush=True)
    code = _Ray(address, cpus, words).run()
    if code:
        raise UserError(f"Ray ended with exit code {code}; its logs are in /tmp/ray/session_latest/logs")


def join(head: tyro.conf.Positional[str], /, address: str | None = None, cpus: int | None = None) -> None:
    """Add this host to a cluster, and again whenever it lost it.

    Args:
        head: HOST:PORT of the head.
        address: Of this host, as the others reach it. None lets Ray find it.
        cpus: That workers may reserve. None is all.
    """
    require_token(create=False)
    host, port = assert_reachable(head, GCS_PORT)
    assert_welcome(host, port)
    address = address or own_address_towards(host, port, 5.0)
    started = time.monotonic()
    while True:
        ray = _Ray(address, cpus, [f"--address={host}:{port}"])
        code = ray.run()
        if ray.asked_to_end:
            return
        if time.monotonic() - started < _START_SECONDS:
            raise UserError(f"Ray ended at once with exit code {code}; its logs are in /tmp/ray/session_latest/logs")
        print(f"lost the head at {host}:{port} (exit code {code}); joining again", file=sys.stderr, flush=True)
        while not _answers(host, port):
            time.sleep(_REJOIN_SECONDS)
        time.sleep(_REJOIN_SECONDS)


class _Ray:
    """`ray start`, in the foreground."""

    def __init__(self, address: str | None, cpus: int | None, words: list[str]) -> None:
        options = [f"--node-ip-address={address}"] if address else []
        options += [f"--num-cpus={cpus}"] if cpus is not None else []
        self._interface = interface_of(address) if address else None
        self._command = [_program("ray"), "start", "--block", "--disable-usage-stats", *options, *words]
        self.asked_to_end = False

    def run(self) -> int:
        """Return once it ended, with its exit code; SIGTERM and SIGINT end it."""
        # Jobs find the Python of this environment, and not another, first in their path.
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**_HEALTH_CHECKS, **os.environ, "PATH": paths}
        if self._interface:
            # By itself gloo takes the address of the host's name, which on many systems is that of loopback.
            environment.setdefault("GLOO_SOCKET_IFNAME", self._interface)
        process = subprocess.Popen(
            self._command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # advice that would lead around the token
            start_new_session=True,
        )

        def end(_number: int, _frame: FrameType | None) -> None:
            self.asked_to_end = True
            process.terminate()

        before: dict[signal.Signals, Any] = {
            number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0 if self.asked_to_end else code


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _assert_free(address: str, port: int) -> None:
    try:
        with socket.create_server((address, port)):
            pass
    except OSError as error:
        way_out = "use another --address" if "assign" in str(error) else "end what listens there, or use another port"
        raise ConfigError(f"port {port} of {address} cannot be used: {error.strerror}; {way_out}") from None


def _answers(host: str, port: int) -> bool:
    try:
        assert_reachable(f"{host}:{port}", port)
    except ConfigError:
        return False
    return True


if __name__ == "__main__":
    run_command(lambda: run_subcommand([head, join], sys.argv[1:], own_program()))
