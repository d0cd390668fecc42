"""What a figure was measured under: it stands beside every result, without which it means little."""

import os
from collections.abc import Mapping
from typing import Any

from gen_dist.records.environment import environment


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


FINGERPRINT = ("cpu", "physical_cores", "threads", "device", "torch", "numpy", "python")
"""What has to be equal for times that were not measured in turns to be comparable at all; `device` is of GPUs."""


def fingerprint(found: Mapping[str, Any]) -> str:
    """The machine and versions of some conditions, in one line. What was not recorded is left out."""
    units = {"physical_cores": "{} cores", "threads": "{} threads"}
    named = ((key, found.get(key)) for key in FINGERPRINT)
    return ", ".join(
        str(value) if key in ("cpu", "device") else units.get(key, key + " {}").format(value)
        for key, value in named
        if value is not None
    )
