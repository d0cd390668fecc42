"""Facts about the start of each process, on which all have to agree before the first step.

Hosts that were given other options, another copy of the data or another version would train one wrong model together.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import gen_dist
from gen_dist.config import TrainConfig

Facts = Mapping[str, str]
"""Values with which a process was started, by name."""

_OWN_PLACES = ("data_root", "packing.cache_dir")
"""Directories that each host may have elsewhere."""
_SHOWN = 4
"""Most differences, and most ranks, that one line names."""
_WAYS_OUT = {
    "code of plug-in": "give all hosts the same plug-ins",
    "threads": "set GEN_DIST_THREADS to one number on all hosts",
    "data": "give all hosts the same data",
    "job": "another job uses this port: choose another with --main_process_port, --master-port or MASTER_PORT",
}
_VERSIONS = ("torch", "numpy", "code of gen_dist", "gen_dist", "python", "pillow", "image decoders", "torchvision")
_DECODERS = ("libjpeg_turbo", "webp", "avif", "jpg_2000", "libtiff")


def facts_of_start(config: TrainConfig, launched: int, on_cpu: bool, threads: int) -> dict[str, str]:
    """Facts that a process knows before it has joined the others: its launch, config, device and versions."""
    job = os.environ.get("SLURM_HET_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return {
        "number of processes": str(launched),
        **({"job": job} if job else {}),
        **_facts_of_config(config),
        "device type": "cpu" if on_cpu else "cuda",
        **({"threads": str(threads)} if on_cpu else {}),
        **({"precision of the launcher": launched_precision()} if config.precision == "auto" else {}),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "python": platform.python_version(),
        "gen_dist": gen_dist.__version__,
        "code of gen_dist": _digest_of_code(),
        **_facts_of_decoding(config),
    }


def _facts_of_decoding(config: TrainConfig) -> dict[str, str]:
    """Versions that decide on the values of lossy images, of a run that decodes them while it trains.

    Packed values are compared by their digest instead: another version has decoded them once, for all.
    """
    if config.packing.packed_as != "encoded" and not config.data.startswith("shards:"):
        return {}
    from PIL import __version__, features

    decoders = ", ".join(f"{name} {features.version(name)}" for name in _DECODERS if features.check(name))
    on_gpu = config.packing.decoded_on == "cuda"
    more = {"torchvision": importlib.metadata.version("torchvision")} if on_gpu else {}
    return {"pillow": __version__, "image decoders": decoders, **more}


def launched_precision() -> str:
    """Precision that `accelerate launch` was given."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _facts_of_config(config: TrainConfig) -> dict[str, str]:
    facts: dict[str, str] = {}

    def add(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            elif f"{prefix}{name}" not in _OWN_PLACES:
                facts[prefix + name] = repr(value)

    values = dataclasses.asdict(config)
    facts |= {f"code of plug-in {one['name']}": one["sha256"][:12] for one in values.pop("plugins")}
    add("", values)
    kind, colon, _ = config.data.partition(":")
    if colon:  # the digest tells if a path leads to other data
        facts["data"] = f"{kind}:"
    return facts


@functools.cache
def _digest_of_code() -> str:
    """Digest of this package's modules: a checkout's version does not tell if it was edited on one host."""
    digest = hashlib.sha256()
    root = Path(gen_dist.__path__[0])
    found = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    for path in sorted(path for path in found if path.suffix == ".py"):
        digest.update(f"{path.relative_to(root)}\n".encode(errors="backslashreplace") + path.read_bytes())
    return digest.hexdigest()[:12]


def disagreement(facts: Mapping[int, Facts]) -> str | None:
    """One line about what differs between rank 0 and others, with both values; None if nothing does.

    Args:
        facts: those of each process by rank, with rank 0. A fact that a process lacks is not compared.
    """
    main = facts[0]
    differing: dict[tuple[str, str], list[int]] = {}
    for rank, others in sorted(facts.items()):
        for name in others.keys() & main.keys():
            if others[name] != main[name]:
                differing.setdefault((name, others[name]), []).append(rank)
    if not differing:
        return None
    order = list(main)
    told = sorted(differing.items(), key=lambda one: (order.index(one[0][0]), one[1]))
    lines = [
        f"{name} is {main[name]} on rank 0 but {value} on rank {_shortened(list(map(str, ranks)))}"
        for (name, value), ranks in told
    ]
    names = {name for name, _ in differing}
    names |= {"code of plug-in" for name in names if name.startswith("code of plug-in ")}
    ways_out = [way_out for name, way_out in _WAYS_OUT.items() if name in names]
    if names & set(_VERSIONS):
        ways_out.append("install one version on all hosts")
    return (
        f"the processes disagree: {_shortened(lines, '; ')}; "
        f"{ways_out[0] if ways_out else 'start all of them with the same command'}"
    )


def _shortened(words: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return between.join(words[:_SHOWN]) + more
