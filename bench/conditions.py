"""What a figure was measured under: it stands beside every result, without which it means little."""

import os
from typing import Any

from gen_dist.environment import environment


def conditions() -> dict[str, Any]:
    """Processor, cores, versions, commit, threads of this process and load of the machine before the measurement.

    The commit ends in `+` where the checkout has changes; it and the load are None where they cannot be told.
    """
    found = environment()
    git = found["git"]
    return {
        "cpu": found["cpu"]["model"],
        "physical_cores": found["cpu"]["physical_cores"],
        "threads": found["torch_threads"],
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": found["versions"]["torch"],
        "numpy": found["versions"]["numpy"],
        "python": found["versions"]["python"],
        "git_commit": git["commit"] + "+" * git["dirty"] if git else None,
    }
