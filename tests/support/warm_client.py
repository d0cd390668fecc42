"""Client of `warm_python.py`, in place of a program that runs in another process.

It imports little, to start at once.
"""

from __future__ import annotations

import array
import marshal
import os
import select
import signal
import socket
import sys
from typing import NamedTuple

CLIENT = __file__
MESSAGE_BYTES = 2**16


class Program(NamedTuple):
    """A program to run: the words after `python`, the working directory and the environment."""

    words: list[str]
    directory: str
    environment: dict[str, str]


def read_message(client: socket.socket) -> tuple[Program, list[int]]:
    """Receive the program that a client asks for, and its standard streams."""
    streams = array.array("i")
    message, ancillary, _, _ = client.recvmsg(8, socket.CMSG_LEN(3 * streams.itemsize))
    for _, _, data in ancillary:
        streams.frombytes(data)
    content = b""
    while len(content) < int.from_bytes(message, "little"):
        content += client.recv(MESSAGE_BYTES)
    return Program(*marshal.loads(content)), list(streams)


def main(address: str, words: list[str]) -> None:
    """Let the server run a program with this process's streams; forward signals to it, and end with its exit status."""
    forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)  # one that comes before the program is known waits for it
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        content = marshal.dumps((words, os.getcwd(), dict(os.environ)))
        streams = array.array("i", [0, 1, 2])
        server.sendmsg([len(content).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        server.sendall(content)
        process = int.from_bytes(server.recv(8), "little")
        wakes, wakens = os.pipe()
        os.set_blocking(wakens, False)
        signal.set_wakeup_fd(wakens)  # else a signal just before the call that waits would be seen only after it
        for number in forwarded:
            signal.signal(number, lambda number, _frame: os.kill(process, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
        while server.fileno() not in select.select([server.fileno(), wakes], [], [])[0]:
            os.read(wakes, MESSAGE_BYTES)
        answer = server.recv(8)
    if not answer:
        sys.exit("the process that starts others has ended")
    code = int.from_bytes(answer, "little", signed=True)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
