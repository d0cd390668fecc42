"""Ports of tests: no two of them, of any process, get one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import two_ranks


def drawn_as(port: int) -> bytes:
    """Random bytes that make `free_port` try a port."""
    return (port - 30_000).to_bytes(4, "little")


def test_a_port_of_another_process_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from two_ranks import free_port; print(free_port(), flush=True); input()"
    support = Path(two_ranks.__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=support, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdin
        theirs = int(other.stdout.readline())
        ours = two_ranks.free_port()
        draws = iter([drawn_as(theirs), drawn_as(ours)])
        random = os.urandom
        monkeypatch.setattr(os, "urandom", lambda count: next(draws, random(count)))
        third = two_ranks.free_port()
        assert len({theirs, ours, third}) == 3 and next(draws, None) is None
        with socket.create_server(("127.0.0.1", theirs)):  # the port itself is free
            pass
        other.stdin.close()
