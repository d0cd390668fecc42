"""Run one program in two processes that find each other, as `accelerate launch` does, but three seconds faster.

    python tests/support/two_ranks.py PYTHON... -- WORDS...

The tests of the launcher itself (tests/parallel/test_ranks.py) use `accelerate launch`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

RANKS = 2
_CLAIMS: list[socket.socket] = []


def free_port() -> int:
    """Port that nothing listens at, below those that the system gives to whoever asks for any (Linux: from 32768 on).

    One of those could be another program's before the process listens that it is for. A UDP socket of the same number
    keeps a port from other calls, in any process, until this process ends.
    """
    while True:
        port = 30_000 + int.from_bytes(os.urandom(4), "little") % 2_768
        claim = socket.socket(type=socket.SOCK_DGRAM)
        with contextlib.suppress(OSError):
            claim.bind(("127.0.0.1", port))
            with socket.create_server(("127.0.0.1", port)):
                _CLAIMS.append(claim)
                return port
        claim.close()


def main(words: list[str]) -> int:
    """Start the processes, wait for all of them, and return the first exit code that is not 0."""
    cut = words.index("--")
    port = free_port()
    shared = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "-1"}
    started = [
        subprocess.Popen(
            [*words[:cut], *words[cut + 1 :]], env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(RANKS)
    ]
    return next((code for code in [process.wait() for process in started] if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
