"""Start a host of a Ray cluster, safe by default: `python launch/ray_cluster.py head`, and `join HOST:PORT` elsewhere.

Both commands stay in the foreground and end their processes with them. A host that lost its head rejoins by itself.
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
    assert_token_accepted,
    keep_to_loopback,
    require_token,
    token_path,
)
from gen_dist.parallel.network_interfaces import interface_of, own_address_towards

_REJOIN_SECONDS = 3.0
_START_SECONDS = 15.0
"""A Ray that ends within this time never joined the cluster."""

_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""A lost host is declared dead after 12 seconds instead of a minute. Variables of the environment win."""


def head(
    address: str = LOOPBACK,
    port: int = GCS_PORT,
    dashboard_port: int = DASHBOARD_PORT,
    client_port: int = 10001,
    cpus: int | None = None,
) -> None:
    """Start the first host of a cluster, and make a token if there is none.

    Args:
        address: Address of this host for the other hosts. With 127.0.0.1 no other host can connect.
        port: Port that other hosts join at.
        dashboard_port: Port of the dashboard and the job interface, always on 127.0.0.1.
        client_port: Port of Ray's remote clients, which no command here uses.
        cpus: CPUs that workers may reserve. None is all.
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
    on_others = "" if address == LOOPBACK else f"; on the other hosts: {own_program()} join {address}:{port}"
    jobs = f"jobs at http://{LOOPBACK}:{dashboard_port}"
    print(f"head at {address}:{port}, {jobs}, token in {token_path()}{on_others}", flush=True)
    code = _Ray(address, cpus, words).run()
    if code:
        raise UserError(f"Ray ended with exit code {code}; its logs are in /tmp/ray/session_latest/logs")


def join(head: tyro.conf.Positional[str], /, address: str | None = None, cpus: int | None = None) -> None:
    """Add this host to a cluster, and rejoin whenever the connection was lost.

    Args:
        head: HOST:PORT of the head.
        address: Address of this host for the other hosts. None is the one that leads to the head.
        cpus: CPUs that workers may reserve. None is all.
    """
    require_token(create=False)
    host, port = assert_reachable(head, GCS_PORT)
    assert_token_accepted(host, port)
    address = address or own_address_towards(host, port, 5.0)
    started = time.monotonic()
    while True:
        ray = _Ray(address, cpus, [f"--address={host}:{port}"])
        code = ray.run()
        if ray.asked_to_end:
            return
        if time.monotonic() - started < _START_SECONDS:
            raise UserError(f"Ray ended at once with exit code {code}; its logs are in /tmp/ray/session_latest/logs")
        print(f"lost the head at {host}:{port} (exit code {code}); rejoining", file=sys.stderr, flush=True)
        while not _answers(host, port):
            time.sleep(_REJOIN_SECONDS)
        time.sleep(_REJOIN_SECONDS)


class _Ray:
    """The command `ray start`, in the foreground."""

    def __init__(self, address: str | None, cpus: int | None, words: list[str]) -> None:
        options = [f"--node-ip-address={address}"] if address else []
        options += [f"--num-cpus={cpus}"] if cpus is not None else []
        self._interface = interface_of(address) if address else None
        self._command = [_program("ray"), "start", "--block", "--disable-usage-stats", *options, *words]
        self.asked_to_end = False

    def run(self) -> int:
        """Wait for its end and return its exit code; SIGTERM, SIGINT and SIGHUP end it."""
        # Jobs use the Python of this environment, because it is the first one in their path.
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**_HEALTH_CHECKS, **os.environ, "PATH": paths}
        if self._interface:
            # By default gloo uses the address of the host's name, which on many systems is a loopback address.
            environment.setdefault("GLOO_SOCKET_IFNAME", self._interface)
        process = subprocess.Popen(
            self._command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # it advises commands that do not use the token
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
        way_out = (
            "use another --address"
            if "assign" in str(error)
            else "end the program that listens there, or use another port"
        )
        raise ConfigError(f"port {port} of {address} cannot be used: {error.strerror}; {way_out}") from None


def _answers(host: str, port: int) -> bool:
    try:
        assert_reachable(f"{host}:{port}", port)
    except ConfigError:
        return False
    return True


if __name__ == "__main__":
    run_command(lambda: run_subcommand([head, join], sys.argv[1:], own_program()))
