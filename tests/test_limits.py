"""Shares of the machine: what affinity, control groups of both versions and the memory's state leave a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gen_dist.limits import free_memory_bytes, resident_bytes, usable_cpus
from gen_dist.parallel.processes import threads_by_default

SECOND = "30 23 0:26 {root} {place} rw,nosuid - cgroup2 cgroup2 rw\n"
WHOLE = "32 23 0:26 / /absent rw,nosuid - cgroup2 cgroup2 rw\n"
FIRST = "31 23 0:27 {root} {place} rw,nosuid - cgroup cgroup rw,cpu,cpuacct,memory\n"


def process_in(place: Path, files: dict[str, str], groups: str, mounts: str, root: str = "/") -> Path:
    """Directory of a process below /proc, in control groups that are mounted at `place/cgroups` with these files."""
    mounted = place / "control groups"
    for name, text in files.items():
        path = mounted / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (place / "cgroup").write_text(groups)
    escaped = str(mounted).replace(" ", "\\040")
    (place / "mountinfo").write_text("23 1 8:1 / / rw - ext4 /dev/sda rw\n" + mounts.format(root=root, place=escaped))
    return place


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("files", "groups", "mounts", "root", "cpus"),
    [
        ({"cpu.max": "200000 100000\n"}, "0::/\n", SECOND, "/", 2),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", SECOND, "/", 2),
        ({"cpu.max": "1000 100000\n"}, "0::/\n", SECOND, "/", 1),
        ({"cpu.max": "max 100000\n"}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "9900000 100000\n"}, "0::/\n", SECOND, "/", 8),
        # The narrowest of a group and of those above it.
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, "0::/a/b\n", SECOND, "/", 3),
        ({"a/b/cpu.max": "100000 100000", "a/cpu.max": "300000 100000"}, "0::/a/b\n", SECOND, "/", 1),
        # Another group's quota is not ours.
        ({"other/cpu.max": "100000 100000"}, "0::/a/b\n", SECOND, "/", 8),
        # A container whose group is mounted by itself, and one that sees its host's path.
        ({"cpu.max": "300000 100000"}, "0::/docker/1\n", SECOND, "/docker/1", 3),
        ({"cpu.max": "300000 100000"}, "0::/../2\n", SECOND, "/", 3),
        ({"cpu.max": "300000 100000"}, "0::/docker/1\n", SECOND, "/docker/2", 3),
        # A group whose name starts with dots is one of ours; another process's tree, mounted elsewhere, is not.
        ({"..x/cpu.max": "300000 100000"}, "0::/..x\n", SECOND, "/", 3),
        ({"cpu.max": "100000 100000"}, "0::/a\n", SECOND + WHOLE, "/other", 8),
        # Version 1.
        ({"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"}, "3:cpu,cpuacct:/\n", FIRST, "/", 3),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, "3:cpu,cpuacct:/\n", FIRST, "/", 8),
        ({"cpu.cfs_quota_us": "250000\n"}, "3:cpu,cpuacct:/\n", FIRST, "/", 8),
        ({"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}, "3:cpuset:/\n", FIRST, "/", 8),
        ({"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}, "3:cpu:/d\n0::/\n", FIRST + SECOND, "/d", 3),
        # What is no number is no limit.
        ({}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": ""}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "two 100000"}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "200000 0"}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "-5 100000"}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "1e5 100000"}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "9" * 5000 + " 100000"}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "\0\0\0\0"}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "200000"}, "0::/\n", SECOND, "/", 8),
        ({"cpu.max": "200000 100000"}, "garbage\n\n:::\n", SECOND, "/", 8),
        ({"cpu.max": "200000 100000"}, "0::/\n", "- - -\n30 - cgroup2\n", "/", 8),
    ],
)
def test_cpus_are_those_of_the_affinity_and_the_quota(
    files: dict[str, str], groups: str, mounts: str, root: str, cpus: int, tmp_path: Path
) -> None:
    assert usable_cpus(process_in(tmp_path, files, groups, mounts, root)) == cpus


def test_without_files_of_the_system_the_affinity_decides(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "none") == 8


def test_a_process_has_its_share_of_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEN_DIST_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 16)
    monkeypatch.setattr("gen_dist.parallel.processes.usable_cpus", lambda: 6)
    assert [threads_by_default(processes) for processes in (1, 2, 4, 8)] == [6, 3, 1, 1]


OF_FIRST = {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "1000"}


@pytest.mark.parametrize(
    ("files", "groups", "mounts", "swap", "free"),
    [
        ({}, "", "", 1024, 3 * 2**20),
        ({"memory.max": "max", "memory.current": "5"}, "0::/\n", SECOND, 1024, 3 * 2**20),
        ({"memory.max": "5000", "memory.current": "4000"}, "0::/\n", SECOND, 0, 1000),
        ({"memory.max": "5000", "memory.current": "6000"}, "0::/\n", SECOND, 0, 0),
        (
            {"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 9\ninactive_file 600\nfile x\n"},
            *("0::/\n", SECOND, 0, 1600),
        ),
        (
            {"a/memory.max": "9000", "a/memory.current": "1", "memory.max": "70", "memory.current": "1"},
            *("0::/a\n", SECOND, 0, 69),
        ),
        (OF_FIRST, "2:memory:/\n", FIRST, 0, 4000),
        (
            {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "1"},
            *("2:memory:/\n", FIRST, 1024, 3 * 2**20),
        ),
        ({"memory.max": "many", "memory.current": "1"}, "0::/\n", SECOND, 1024, 3 * 2**20),
        # Swap, as far as every group allows it.
        ({"memory.max": "5000", "memory.current": "4000"}, "0::/\n", SECOND, 1, 2024),
        (
            {
                **{"memory.max": "5000", "memory.current": "4000"},
                **{"memory.swap.max": "max", "memory.swap.current": "7"},
            },
            *("0::/\n", SECOND, 1, 2024),
        ),
        (
            {
                **{"a/memory.max": "5000", "a/memory.current": "4000", "a/memory.swap.max": "max"},
                **{"memory.swap.max": "90", "memory.swap.current": "60"},
            },
            *("0::/a\n", SECOND, 1, 1030),
        ),
        (OF_FIRST, "2:memory:/\n", FIRST, 1, 5024),
        (
            OF_FIRST | {"memory.memsw.limit_in_bytes": "5500", "memory.memsw.usage_in_bytes": "1000"},
            *("2:memory:/\n", FIRST, 1, 4500),
        ),
        (
            OF_FIRST | {"memory.memsw.limit_in_bytes": "5000", "memory.memsw.usage_in_bytes": "1300"},
            *("2:memory:/\n", FIRST, 1, 3700),
        ),
    ],
)
def test_free_memory_is_the_least_of_the_machine_and_the_groups(
    files: dict[str, str], groups: str, mounts: str, swap: int, free: int, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:  9000 kB\nMemAvailable:    2048 kB\nSwapFree:  {swap} kB\nHuge: 0\n")
    process = process_in(tmp_path, files, groups, mounts)
    assert free_memory_bytes(process, tmp_path / "meminfo") == free
    assert free_memory_bytes(tmp_path / "none", tmp_path / "none") is None


def test_a_process_knows_the_memory_that_it_has(tmp_path: Path) -> None:
    grown = bytearray(b"1") * 2**25
    assert (resident_bytes() or 0) > len(grown)
    for text in ("", "900", "900 many", "\0\0"):
        (tmp_path / "statm").write_text(text)
        assert resident_bytes(tmp_path) is None
