"""Network interfaces and addresses of this host."""

from __future__ import annotations

import socket

import psutil


def interface_of(address: str) -> str | None:
    """Find the name of the network interface that has an address; None if no interface of this host has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return name
    return None


def own_address_towards(host: str, port: int, seconds: float) -> str:
    """Find the address from which this host connects to a listening port of another.

    Raises:
        OSError: no answer within `seconds`.
    """
    with socket.create_connection((host, port), timeout=seconds) as probe:
        address: str = probe.getsockname()[0]
        return address
