"""Rendezvous of the processes that a launcher started, on one host or on many."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from gen_dist.errors import ConfigError
from gen_dist.parallel.facts import Facts, disagreement
from gen_dist.parallel.network_interfaces import interface_of, own_address_towards

JOIN_SECONDS = 300
"""Longest wait of the processes for each other at the start; GEN_DIST_JOIN_SECONDS overrides it."""
_LAUNCHERS = "start processes with accelerate launch and a file in launch/configs, or with torchrun"
_ANOTHER_PORT = "choose another for all processes, with --main_process_port, torchrun's --master-port or MASTER_PORT"
_POLL_SECONDS = 0.02
_READ_SECONDS = 10.0
_LONGEST_SECONDS = 365 * 24 * 3600
_VERDICT, _READERS = "verdict", "readers"
STEP_SECONDS = 1800
"""Longest wait for another process in training, on CPUs; GEN_DIST_STEP_SECONDS overrides it. The others wait while the
main process draws and saves."""


def join(on_cpu: bool, launched: int, facts: Facts) -> None:
    """Connect all launched processes within GEN_DIST_JOIN_SECONDS, if they were started with the same facts.

    torch by itself waits for half an hour, or without end, and then shows a traceback.

    Raises:
        ConfigError: the processes could not connect, or disagree; the message has the reason.
    """
    rank, port, main = number_from("RANK"), number_from("MASTER_PORT"), os.environ.get("MASTER_ADDR")
    if not main:
        raise ConfigError(f"MASTER_ADDR is not set; {_LAUNCHERS}")
    seconds = seconds_from("GEN_DIST_JOIN_SECONDS", JOIN_SECONDS)
    step_timeout()  # refused before the others are awaited
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
    _meet(store, rank, facts, launched, deadline, f"{main}:{port}")
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
        _set_timeout(step_timeout())
    store.set_timeout(step_timeout())


def step_timeout() -> timedelta:
    """Longest wait for another process in training.

    Raises:
        ConfigError: GEN_DIST_STEP_SECONDS is not a number of seconds.
    """
    return timedelta(seconds=seconds_from("GEN_DIST_STEP_SECONDS", STEP_SECONDS))


def seconds_from(name: str, default: int) -> int:
    """Read a time from the environment.

    Raises:
        ConfigError: it is not a whole number of seconds, at least 1 and at most a year.
    """
    value = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,8}", value) or not 1 <= int(value) <= _LONGEST_SECONDS:
        raise ConfigError(f"{name} is {value!r}; it takes whole seconds from 1 to {_LONGEST_SECONDS:,}, as {default}")
    return int(value)


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


def _meet(store: Store, rank: int, facts: Facts, launched: int, deadline: float, where: str) -> None:
    """Wait until all processes have joined, and compare what they were started with.

    Rank 0 compares as the others come, and stops at the first that differs: all then end at once with one line.

    Raises:
        ConfigError: processes are absent or disagree, or the main process has ended.
    """
    keys = [f"joined {other}" for other in range(launched)]
    try:
        _claim(store, rank, where)
        store.set(keys[rank], json.dumps(facts))
        if rank == 0:
            line = _compare_as_they_come(store, keys, deadline)
            store.set(_VERDICT, line or "")
            if line:
                _wait_for_readers(store, keys)
        else:
            # A main process of another launch may be content with fewer processes.
            store.wait([keys[0], _VERDICT], timedelta(seconds=max(1.0, deadline - time.monotonic())))
            line = store.get(_VERDICT).decode() or disagreement({0: json.loads(store.get(keys[0])), rank: facts})
            store.add(_READERS, 1)
    except dist.DistStoreError:
        line = _absent(store, keys, where)
    except dist.DistNetworkError:
        raise ConfigError(f"the main process at {where} ended while others joined; see its output") from None
    if line:
        raise ConfigError(line)


def _claim(store: Store, rank: int, where: str) -> None:
    """Take this rank, unless the launcher itself sees to it, as torchrun and Accelerate do."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    own = f"process {os.getpid()} of {socket.gethostname()}"
    if (first := store.compare_set(f"claim {rank}", "", own).decode()) != own:
        error = ConfigError(f"{first} has already joined at {where} as rank {rank}: another job; {_ANOTHER_PORT}")
        error.shared = False
        raise error


def _compare_as_they_come(store: Store, keys: list[str], deadline: float) -> str | None:
    """Return the line about the first processes that disagree with rank 0; None if all have come and none does.

    Raises:
        DistStoreError: some did not come in time.
    """
    facts: dict[int, Facts] = {}
    while len(facts) < len(keys):
        came = [rank for rank, key in enumerate(keys) if rank not in facts and store.check([key])]
        facts |= {rank: json.loads(store.get(keys[rank])) for rank in came}
        if came and (line := disagreement(facts)):
            return line
        if not came:
            if time.monotonic() > deadline:
                raise dist.DistStoreError
            time.sleep(_POLL_SECONDS)
    return None


def _wait_for_readers(store: Store, keys: list[str]) -> None:
    """Wait, before this process and with it the store ends, until the others that came have read the line."""
    until = time.monotonic() + _READ_SECONDS
    while store.add(_READERS, 0) < sum(store.check([key]) for key in keys[1:]) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)


def _absent(store: Store, keys: list[str], where: str) -> str:
    absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    return (
        f"{len(keys)} processes were launched but {len(keys) - len(absent)} joined at {where} in time; absent: rank "
        f"{', '.join(absent)}; see their output, and check that every host was given the same number of processes"
    )


def _set_timeout(timeout: timedelta) -> None:
    """Set the timeout of all later collectives."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:  # before torch 2.14
        dist.distributed_c10d._set_pg_timeout(timeout)
