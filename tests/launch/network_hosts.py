"""Two hosts on one machine: network namespaces joined by a cable, made and removed here. Needs root on Linux."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.children import end_with_parent

INTERFACE = "gd0"
"""Name of the cable's interface on both hosts."""


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=20)


@dataclass(frozen=True)
class Host:
    """One of the two hosts."""

    namespace: str
    address: str

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
        done = _ip("-n", self.namespace, "link", "set", INTERFACE, "up" if plugged else "down")
        assert done.returncode == 0, done.stderr

    def process_ids(self) -> list[int]:
        """Ids of all processes on this host."""
        return [int(word) for word in _ip("netns", "pids", self.namespace).stdout.split()]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Give two hosts that reach each other, and end all their processes with them.

    Skips the test on machines that do not allow network namespaces.
    """
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("two hosts on one machine need root and the program ip")
    number = os.getpid() % 60_000
    net = f"10.{200 + number % 50}.{number // 250}"
    first, second = (Host(f"gen-dist-{number}-{name}", f"{net}.{place}") for name, place in (("a", 1), ("b", 2)))
    try:
        for host in (first, second):
            if (done := _ip("netns", "add", host.namespace)).returncode:
                pytest.skip(f"network namespaces may not be made here: {done.stderr.strip()}")
        ends = [f"gd{number}a", f"gd{number}b"]
        if (done := _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])).returncode:
            pytest.skip(f"network cables may not be made here: {done.stderr.strip()}")
        for host, end in zip((first, second), ends, strict=True):
            _ip("link", "set", end, "netns", host.namespace, "name", INTERFACE)
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.set_cable(plugged=True)
        yield first, second
    finally:
        for number_of_signal, seconds in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 2.0)):
            living = [number for host in (first, second) for number in host.process_ids()]
            for process_id in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, number_of_signal)
            deadline = time.monotonic() + (seconds if living else 0.0)
            while time.monotonic() < deadline and (first.process_ids() or second.process_ids()):
                time.sleep(0.2)
        for host in (first, second):
            _ip("netns", "del", host.namespace)
            shutil.rmtree(host.directory, ignore_errors=True)
