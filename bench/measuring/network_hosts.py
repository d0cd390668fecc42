"""Hosts on one machine: network namespaces, joined by links with a rate and a latency. Needs root on Linux.

Each host has one interface, a TAP device. `tc` (a token bucket) limits what it sends, and network_switch.py, another
process, hands every packet on after the latency: the kernel's own qdisc for that, netem, is not in all kernels.
Packets are jumbo frames, and groups of them are handed over whole, so that the switch takes little of a core.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "gd0"
"""Name of a host's interface."""
_MTU = 9000
_LARGEST_GROUP = 2**16
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x1, 0x2
_CLONE_NEWNET = 0x40000000


class NetworkError(Exception):
    """This machine does not allow network namespaces."""


@dataclass(frozen=True)
class Link:
    """Limits of each host's cable."""

    bytes_per_second: float
    latency_seconds: float
    """Seconds from one host to another, one way."""

    def __str__(self) -> str:
        return f"{8e-6 * self.bytes_per_second:g} Mbit/s, {1e3 * self.latency_seconds:g} ms"


@dataclass(frozen=True)
class Host:
    """A network namespace with an address."""

    namespace: str
    address: str

    def use_network(self) -> None:
        """Have this thread, and those that it starts, use the network of this host."""
        with open(f"/run/netns/{self.namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns failed")

    def process_ids(self) -> list[int]:
        """Ids of all processes on this host."""
        return [int(word) for word in ip("netns", "pids", self.namespace).split()]


def ip(*words: str) -> str:
    """Output of the program ip.

    Raises:
        NetworkError: it failed.
    """
    return _output("ip", *words)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError as error:
        raise NetworkError(f"there is no program {command[0]}") from error
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """Make hosts without cables. At the end all their processes end with them; hosts of killed processes go first.

    Raises:
        NetworkError: this machine does not allow it.
    """
    if os.name != "posix" or os.geteuid() != 0:
        raise NetworkError("network namespaces need root on Linux")
    _remove_left_behind()
    number = os.getpid() % 60_000
    net = f"10.{200 + number % 50}.{number // 250}"
    hosts = [Host(f"gen-dist-{os.getpid()}-{chr(ord('a') + place)}", f"{net}.{place + 1}") for place in range(count)]
    made: list[Host] = []
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
            made.append(host)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        yield hosts
    finally:
        _end_processes(made)
        for host in made:
            with contextlib.suppress(NetworkError):
                ip("netns", "del", host.namespace)


def _remove_left_behind() -> None:
    """End hosts whose maker is no more: it was killed before it could."""
    found = re.findall(r"^(gen-dist-(\d+)-[a-z])\b", ip("netns", "list"), re.MULTILINE)
    left = [Host(name, "") for name, maker in found if not Path("/proc", maker).exists()]
    _end_processes(left)
    for host in left:
        with contextlib.suppress(NetworkError):  # another one removes it, too
            ip("netns", "del", host.namespace)


def _end_processes(hosts: Sequence[Host]) -> None:
    def living() -> list[int]:
        found: list[int] = []
        for host in hosts:
            with contextlib.suppress(NetworkError):  # another process has removed it
                found += host.process_ids()
        return found

    for number_of_signal, seconds in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 2.0)):
        deadline = time.monotonic() + seconds
        for process_id in living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, number_of_signal)
        while living() and time.monotonic() < deadline:
            time.sleep(0.2)


@contextlib.contextmanager
def linked_hosts(count: int, link: Link) -> Iterator[list[Host]]:
    """Make hosts that reach each other through links of one kind.

    Raises:
        NetworkError: this machine does not allow it.
    """
    with namespaces(count) as hosts, contextlib.ExitStack() as stack:
        files = []
        for place, host in enumerate(hosts):
            descriptor = _plugged_in(host, f"gd{os.getpid()}.{place}", link)
            stack.callback(os.close, descriptor)
            files.append(descriptor)
        switch = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("network_switch.py")), str(link.latency_seconds)]
            + [str(descriptor) for descriptor in files],
            pass_fds=files,
            stdin=subprocess.PIPE,
        )
        try:
            yield hosts
        finally:
            switch.kill()
            switch.wait()


def _plugged_in(host: Host, name: str, link: Link) -> int:
    """Give a host its interface; returns the file from which its packets are read, and to which its own are written."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    except OSError as error:
        raise NetworkError(f"TAP devices may not be made here: {error}") from error
    ip("link", "set", name, "netns", host.namespace, "name", INTERFACE)
    inside = ("-n", host.namespace)
    ip(*inside, "link", "set", INTERFACE, "mtu", str(_MTU), "up")
    ip(*inside, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
    # A bucket that holds a group of packets lets it pass whole. At a low rate that would be a long time at once.
    burst = max(2 * _MTU + 2000, min(_LARGEST_GROUP + 4000, int(link.bytes_per_second * 1e-3)))
    rate = f"{8 * link.bytes_per_second:.0f}bit"
    words = f"netns exec {host.namespace} tc qdisc add dev {INTERFACE} root tbf rate {rate} burst {burst} latency 200ms"
    ip(*words.split())
    # Not BBR, whose probing takes seconds to learn a link.
    ip("netns", "exec", host.namespace, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno")
    return descriptor
