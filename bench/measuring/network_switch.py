"""Hands packets from each TAP device to the others after a latency: `network_switch.py SECONDS FILE_DESCRIPTOR ...`.

It imports nothing of the project, so that it starts at once, and runs before all others that wait for a core.
"""

import contextlib
import ctypes
import heapq
import os
import select
import sys
import time

_HEADER = 10  # struct virtio_net_hdr
_LARGEST = 2**17
_PR_SET_TIMERSLACK = 29


def main(latency: float, files: list[int]) -> None:
    """Hand on packets until standard input closes."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # by default the system wakes up to 50 us too late
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    file_of: dict[bytes, int] = {}  # by hardware address
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        timeout = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        ready, _, _ = select.select([0, *files], [], [], timeout)
        if 0 in ready:
            return
        now = time.perf_counter()
        for file in ready:
            with contextlib.suppress(BlockingIOError):
                packet = os.read(file, _LARGEST)
                to, sender = packet[_HEADER : _HEADER + 6], packet[_HEADER + 6 : _HEADER + 12]
                file_of[sender] = file
                known = file_of.get(to)
                for other in files if known is None else (known,):
                    if other != file:
                        number += 1
                        heapq.heappush(waiting, (now + latency, number, other, packet))
        while waiting and waiting[0][0] <= time.perf_counter():
            _, _, file, packet = heapq.heappop(waiting)
            with contextlib.suppress(BlockingIOError, OSError):  # a full queue drops packets, as switches do
                os.write(file, packet)


if __name__ == "__main__":
    main(float(sys.argv[1]), [int(word) for word in sys.argv[2:]])
