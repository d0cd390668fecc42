"""Rendezvous of the processes that a launcher started, on one host or on many."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from gen_dist.errors import ConfigError
from gen_dist.parallel.network_interfaces import interface_of, own_address_towards

JOIN_SECONDS = 300
"""Longest wait of the processes for each other at the start; GEN_DIST_JOIN_SECONDS overrides it."""
_LAUNCHERS = "start processes with accelerate launch and a file in launch/configs, or with torchrun"
_ANOTHER_PORT = "choose another for all processes, with --main_process_port, torchrun's --master-port or MASTER_PORT"
STEP_TIMEOUT = timedelta(minutes=30)  # the others wait while the main process draws and saves; torch's own for gloo


def join(on_cpu: bool, launched: int) -> None:
    """Connect all launched processes within GEN_DIST_JOIN_SECONDS.

    torch by itself waits for half an hour, or without end, and then shows a traceback.

    Raises:
        ConfigError: the processes could not connect; the message has the reason.
    """
    rank, port, main = number_from("RANK"), number_from("MASTER_PORT"), os.environ.get("MASTER_ADDR")
    if not main:
        raise ConfigError(f"MASTER_ADDR is not set; {_LAUNCHERS}")
    seconds = number_from("GEN_DIST_JOIN_SECONDS", JOIN_SECONDS)
    deadline = time.monotonic() + seconds
    # Under accelerate launch and torchrun, the launcher of the main host serves the store.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    own_address = None if serves else _reach(main, port, deadline)
    store = _open_store(main, port, serves, deadline)
    # By default gloo takes the address of this host's name, which on many systems is that of the loopback interface.
    if interface := interface_of(own_address or _reach(main, port, deadline)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # A launcher that restarts its processes serves the same store.
    store = PrefixStore(f"gen_dist {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _wait_for_all(store, rank, launched, deadline, f"{main}:{port}")
    try:
        # Only gloo connects at once; with NCCL the timeout applies to collectives.
        limit = {"timeout": timedelta(seconds=seconds)} if on_cpu else {}
        PartialState(cpu=on_cpu, store=store, rank=rank, world_size=launched, **limit)
    except RuntimeError as raised:
        if not on_cpu:
            raise
        error = ConfigError(
            f"the processes reached {main}:{port} but cannot connect to each other "
            f"({str(raised).splitlines()[0]}); set GLOO_SOCKET_IFNAME on each host to the network interface that the "
            f"others reach, now {os.environ.get('GLOO_SOCKET_IFNAME', 'the one of the host name')}"
        )
        error.shared = False
        raise error from None
    if on_cpu:
        _set_timeout(STEP_TIMEOUT)
    store.set_timeout(STEP_TIMEOUT)


def number_from(name: str, default: int | None = None) -> int:
    """Read a whole number from the environment."""
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}, not a whole number; {_LAUNCHERS}")
    return int(value)


def _reach(main: str, port: int, deadline: float) -> str:
    """Wait until the main host can be reached, and return the address from which this host connects to it."""
    while True:
        try:
            return own_address_towards(main, port, max(0.1, deadline - time.monotonic()))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the main host cannot be reached at {main}:{port}: {error.strerror or error}; "
                    "check that address, that the main process runs, and the firewall"
                ) from None
        time.sleep(0.2)


def _open_store(main: str, port: int, serves: bool, deadline: float) -> Store:
    """Open the store of the rendezvous. `serves` is True if this process serves it.

    It runs in a thread, since a foreign program at that port may never answer, and torch would wait without end.
    """
    outcome: list[Store | RuntimeError] = []

    def connect() -> None:
        try:
            left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
            outcome.append(
                TCPStore(main, port, is_master=serves, timeout=left, wait_for_workers=False, multi_tenant=True)
            )
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if outcome and isinstance(outcome[0], Store):
        return outcome[0]
    reason = str(outcome[0]).splitlines()[0] if outcome else "no answer"
    if "EADDRINUSE" in reason:
        raise ConfigError(f"port {port} is taken by another process of this host; {_ANOTHER_PORT}")
    raise ConfigError(f"the program at {main}:{port} is not the main process of a run ({reason}); {_ANOTHER_PORT}")


def _wait_for_all(store: Store, rank: int, launched: int, deadline: float, where: str) -> None:
    joined = [f"joined {other}" for other in range(launched)]
    try:
        store.set(joined[rank], "")
        store.wait(joined, timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except dist.DistStoreError:
        absent = [str(other) for other, key in enumerate(joined) if not store.check([key])]
        raise ConfigError(
            f"{launched} processes were launched but {launched - len(absent)} joined at {where} in time; absent: rank "
            f"{', '.join(absent)}; see their output, and check that every host was given the same number of processes"
        ) from None
    except dist.DistNetworkError:
        raise ConfigError(f"the main process at {where} ended while others joined; see its output") from None


def _set_timeout(timeout: timedelta) -> None:
    """Set the timeout of all later collectives."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:  # before torch 2.14
        dist.distributed_c10d._set_pg_timeout(timeout)
