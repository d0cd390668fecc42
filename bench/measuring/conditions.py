"""Conditions of a measurement, recorded beside every figure."""

import os
from collections.abc import Mapping
from typing import Any

from gen_dist.records.environment import environment


def conditions() -> dict[str, Any]:
    """Processor, cores, versions, commit, threads of this process and load of the machine before the measurement.

    The commit ends in `+` where the checkout has changes; commit and load are None if the system cannot tell them.
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
"""Conditions that must be equal before times that were not measured in turns may be compared; `device` names a GPU."""


def fingerprint(found: Mapping[str, Any]) -> str:
    """Machine and versions of some conditions in one line. Missing fields are left out."""
    units = {"physical_cores": "{} cores", "threads": "{} threads"}
    named = ((key, found.get(key)) for key in FINGERPRINT)
    return ", ".join(
        str(value) if key in ("cpu", "device") else units.get(key, key + " {}").format(value)
        for key, value in named
        if value is not None
    )
