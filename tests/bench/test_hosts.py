"""Hosts of the scaling benchmark: their links, and the forecast of steps from given times."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from bench.measuring import network_hosts
from bench.measuring.network_hosts import Host, Link, NetworkError, ip, linked_hosts, namespaces
from bench.scaling.clusters import ENOUGH, Profile, forecast, least_rows
from bench.scaling.cost_model import Bucket, Cluster, Network, seconds_of_slowest
from bench.scaling.hosts import forecast as forecast_of_hosts
from bench.scaling.overlap import bucket_leads
from bench.scaling.processes import Member
from gen_dist.config import MlpConfig
from tests.conftest import REPOSITORY
from tests.support.runs import make_trainer, small_config

T = TypeVar("T")
PORT = 5000
ANSWERS = 9


def _on(host: Host, work: Callable[[], T]) -> "threading.Thread":
    def run() -> None:
        host.use_network()
        work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_link_has_its_rate_and_latency() -> None:
    link = Link(bytes_per_second=10e6, latency_seconds=5e-3)
    found: dict[str, float] = {}

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            for _ in range(ANSWERS):
                connection.send(connection.recv(1))
            received, start = 0, None
            while piece := connection.recv(2**20):
                start = start or time.perf_counter()
                received += len(piece)
        found["rate"] = received / (time.perf_counter() - (start or 0.0))

    def listen() -> None:
        with socket.create_server((hosts[0].address, PORT)) as server:
            listening.set()
            answer(server)

    def ask() -> None:
        assert listening.wait(60)
        with socket.create_connection((hosts[0].address, PORT)) as connection:
            times = []
            for _ in range(ANSWERS):
                start = time.perf_counter()
                connection.send(b"?")
                connection.recv(1)
                times.append(time.perf_counter() - start)
            found["there and back"] = min(times)  # the others may have waited for a CPU
            connection.sendall(bytes(3_000_000))

    listening = threading.Event()
    try:
        with linked_hosts(2, link) as hosts:
            for thread in [_on(hosts[0], listen), _on(hosts[1], ask)]:
                thread.join(100)
    except NetworkError as error:
        pytest.skip(str(error))
    assert 2 * link.latency_seconds < found["there and back"] < 10 * link.latency_seconds
    assert 0.1 * link.bytes_per_second < found["rate"] < 1.1 * link.bytes_per_second


def test_hosts_of_a_killed_process_go_with_the_next() -> None:
    program = (
        "import os; from bench.measuring.network_hosts import namespaces\n"
        "with namespaces(1) as hosts: print(hosts[0].namespace, flush=True); os.kill(os.getpid(), 9)"
    )
    try:
        with namespaces(1) as living:
            killed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
            assert killed.returncode == -signal.SIGKILL
            assert killed.stdout.strip() in ip("netns", "list")
            with namespaces(0):
                left = ip("netns", "list")
            assert killed.stdout.strip() not in left
            assert living[0].namespace in left
    except NetworkError as error:
        pytest.skip(str(error))


def test_hosts_that_another_process_removes_meanwhile_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands that start at once find the same hosts of a killed one."""
    asked: list[tuple[str, ...]] = []

    def ip_of_a_slower_process(*words: str) -> str:
        asked.append(words)
        if words == ("netns", "list"):
            return "gen-dist-99999999-a (id: 0)\ntheirs\n"  # above any process id
        raise NetworkError(f"ip {' '.join(words)}: No such file or directory")

    monkeypatch.setattr(network_hosts, "ip", ip_of_a_slower_process)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with namespaces(0) as hosts:
        assert not hosts
    assert asked[-1] == ("netns", "del", "gen-dist-99999999-a")


def test_a_step_over_hosts_is_local_and_what_is_sent_after_it() -> None:
    times = {"gan": {8: {"at once": [0.2, 0.1, 0.3], "joined": [0.5], "overlapped": [0.4]}}}
    reductions = {"gan": [(1000, 1.0), (2000, 0.5)]}
    leads = {"gan": {8: {"first": [Bucket(500, 1.0), Bucket(500)], "second": [Bucket(2000)]}}}
    (row,) = forecast_of_hosts(times, reductions, leads, Network(0.0, 1e4), hosts=2)  # type: ignore[arg-type]
    # Two hosts send as many bytes as there are, 0.1 s for each thousand.
    assert row["joined"]["forecast"] == pytest.approx(0.2 + 0.1 + 0.5 * 0.2)
    assert row["overlapped"]["forecast"] == pytest.approx(0.2 + 0.05 + 0.5 * 0.2)
    assert row["joined"]["error"] == pytest.approx(0.4 / 0.5 - 1)


def test_between_reductions_the_slowest_host_counts() -> None:
    assert seconds_of_slowest([[1.0, 2.0, 3.0], [2.0, 1.0, 4.0]]) == 2.0 + 2.0 + 4.0


def test_stretches_of_a_block_end_where_gradients_are_averaged() -> None:
    member = Member()
    trainer = make_trainer(small_config("gan"))
    member._trainers["gan", 8, "alone"] = trainer
    member._next_step[id(trainer)] = 0
    start = time.perf_counter()
    stretches = member.stretches("gan", 8, 3)
    assert 0 < sum(stretches) <= time.perf_counter() - start
    assert len(stretches) == 3 * len(trainer.objective.phases()) + 1
    assert trainer.objective.networks
    trainer.close()


def test_leads_of_buckets_shrink_towards_the_end_of_backward() -> None:
    trainer = make_trainer(small_config("vae", network=MlpConfig(hidden_sizes=(400,), latent_dim=5)))
    leads, seconds = bucket_leads(trainer, 0, 3)
    (buckets,) = leads.values()
    assert sum(one.bytes for one in buckets) == sum(p.nbytes for p in trainer.objective.parameters())
    of_time = [one.lead_seconds for one in buckets]
    assert of_time == sorted(of_time, reverse=True)
    assert seconds > of_time[0] > of_time[-1] >= 0
    assert all(not p._post_accumulate_grad_hooks for p in trainer.objective.parameters())
    trainer.close()


def test_more_workers_need_more_images_each() -> None:
    profile = Profile({"gan": [Bucket(4_000_000)]}, {"gan": 1.0}, 1.0)
    found = forecast(profile, step_seconds=1e-3, rows=32, cluster=Cluster())
    shares, least = list(found["share"].values()), list(found["least_rows"].values())
    assert shares == sorted(shares, reverse=True)
    assert least == sorted(least)
    # One GPU of 8 sends for t seconds, and computes for 1/32 ms an image: 0.9 of its images a second at 9 t.
    sent = Cluster().all_reduce_seconds(4_000_000, 8)
    assert least[0] == -(-9 * sent * 32e3 // 1)


def test_the_least_number_of_images_is_found() -> None:
    assert [least_rows(lambda rows, of=of: float(rows >= of)) for of in (1, 2, 3, 77)] == [1, 2, 3, 77]  # type: ignore[misc]
    assert ENOUGH < 1
