"""Worker of test_exit.py: pairs of processes that end right after their last collective, with starved gloo threads.

It prints the exit codes of all. Arguments: an empty directory, and the end to test: "as the product" or "as python".
"""

import atexit
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gen_dist.parallel.processes import end_process

PAIRS = 5
EXIT_CODE = 7


def _starve_gloo(rank: int) -> None:
    """Have gloo's threads run only when nothing else does, on the one CPU that they share with this process."""
    cpus = sorted(os.sched_getaffinity(0))
    cpu = {cpus[rank % len(cpus)]}
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cpu)
        if "gloo" in (thread / "comm").read_text():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def _train_and_leave(rank: int, directory: Path, end: str) -> None:
    dist.init_process_group("gloo", init_method=(directory / "rendezvous").as_uri(), rank=rank, world_size=2)
    module = DistributedDataParallel(nn.Linear(20, 20), gradient_as_bucket_view=True)
    _starve_gloo(rank)
    module(torch.ones(2, 20)).sum().backward()
    values = torch.ones(2)
    dist.all_reduce(values)
    assert values.tolist() == [2.0, 2.0]
    atexit.register((directory / f"{rank} left").touch)
    print(f"rank {rank} leaves")  # not flushed
    if end == "as the product":
        end_process(EXIT_CODE)
    sys.exit(EXIT_CODE)


def main(directory: Path, end: str) -> None:
    import torch._dynamo

    torch.set_num_threads(1)
    codes = []
    for pair in range(PAIRS):
        (directory / str(pair)).mkdir()
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                _train_and_leave(rank, directory / str(pair), end)
            children.append(child)
        codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(f"exit codes: {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
