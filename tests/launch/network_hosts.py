"""Two hosts on one machine: network namespaces joined by a cable, made and removed here. Needs root on Linux."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest

from bench.measuring.network_hosts import INTERFACE, NetworkError, ip, namespaces
from bench.measuring.network_hosts import Host as NetworkHost
from tests.support.children import end_with_parent


class Host(NetworkHost):
    """One of the two hosts."""

    @property
    def enter(self) -> list[str]:
        """Words before a command that make it run on this host."""
        # Hosts must not share memory. `ip netns exec` gives each command its own mounts.
        own_memory = 'mount -t tmpfs -o size=8g tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", own_memory, "sh"]

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on this host, in its own session, with its output in a file."""
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self.enter, *command],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def directory(self) -> Path:
        """Directory for sockets of this host's programs, whose paths must be short; removed with the host."""
        return Path("/tmp") / self.namespace

    def set_cable(self, plugged: bool) -> None:
        """Plug the cable in, or pull it. While it is out, packets are lost without an error."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "up" if plugged else "down")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Give two hosts that reach each other, and end all their processes with them.

    Skips the test on machines that do not allow network namespaces.
    """
    directories: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            try:
                first, second = (Host(*astuple(one)) for one in stack.enter_context(namespaces(2)))
                _join((first, second))
            except NetworkError as error:
                pytest.skip(f"no two hosts on this machine: {error}")
            directories += [first.directory, second.directory]
            yield first, second
    finally:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


def _join(hosts: tuple[Host, Host]) -> None:
    """Join two hosts by a cable."""
    ends = [f"gd{os.getpid()}{name}" for name in ("a", "b")]
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for host, end in zip(hosts, ends, strict=True):
        ip("link", "set", end, "netns", host.namespace, "name", INTERFACE)
        ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
        host.set_cable(plugged=True)
