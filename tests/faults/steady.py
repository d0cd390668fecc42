"""What forks find ready: imports of commands, and clocks and identities by which equal starts write equal bytes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import itertools
import random
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from gen_dist.files import write_atomically

TICK_SECONDS = 1 / 1024


def get_ready() -> None:
    """Import what commands import, measure the machine once, and let commands do less of what no file is touched by.

    Charts are blank, pictures have few images, samples are checked on few, and each command line is parsed once: this
    is most of the time of a small run, and calls no system call on the run's files. The pauses of `files.retrying` are
    short: a fault passes, or stays, by the number of calls.
    """
    import pyarrow.parquet  # noqa: F401
    import torch
    import tyro

    import gen_dist.commands
    import gen_dist.evaluation.evaluator
    import gen_dist.inference.encoding
    import gen_dist.inference.export
    import gen_dist.reports.comparison
    import gen_dist.reports.page
    import gen_dist.training.replay
    import gen_dist.training.run  # noqa: F401
    from gen_dist import files
    from gen_dist.evaluation import bootstrap, context, sample_checks
    from gen_dist.evaluation.metrics import memorization
    from gen_dist.pictures import charts, gallery, grids
    from gen_dist.records import environment
    from gen_dist.training import device_peak, machine_use

    device_peak.peak_flops(torch.device("cpu"), torch.float32)
    git_state = environment._git_state()
    changed: dict[ModuleType, dict[str, Any]] = {
        files: {"_PAUSES": tuple(seconds / 50 for seconds in files._PAUSES)},
        environment: {"_git_state": lambda: git_state},
        machine_use: {"peak_memory_bytes": lambda _device: 2**28, "flops_per_image": lambda _trainer: {}},
        charts: dict.fromkeys(("save_scatter", "save_class_shares", "save_scores"), _save_blank_chart),
        gallery: {"save_curves": _save_blank_chart, "GRID_IMAGES": 4, "SCATTER_IMAGES": 20, "INTERPOLATIONS": 2}
        | {"INTERPOLATION_STEPS": 3, "MANIFOLD_SIDE": 3, "TRAVERSAL_DIRECTIONS": 2, "TRAVERSAL_STEPS": 3},
        grids: {"PLEASANT_WIDTH": 1},
        context: {"TRAINING_IMAGES": 200},
        memorization: {"IMAGES": 100},
        bootstrap: {"REPLICATES": 10},
        sample_checks: {"SAMPLES": 20, "SAMPLES_PER_CLASS": 2, "REFERENCE_IMAGES": 100, "TEST_IMAGES": 50},
        tyro: {"cli": _remembering(tyro.cli)},
        tyro.extras: {"subcommand_cli_from_dict": _remembering(tyro.extras.subcommand_cli_from_dict)},
    }
    for module, values in changed.items():
        for name, value in values.items():
            assert hasattr(module, name), f"{module.__name__} has no {name}"
            setattr(module, name, value)
    keep_for_forks()


def _save_blank_chart(path: Path, **_: object) -> None:
    written = io.BytesIO()
    Image.new("L", (1, 1)).save(written, "PNG")
    write_atomically(path, written.getvalue())


def _remembering(parse: Callable[..., Any]) -> Callable[..., Any]:
    """A parser of tyro's that gives what it gave for the same words and defaults before."""
    parsed: dict[tuple[str, ...], Any] = {}

    def remembered(form: Any, *, args: Sequence[str], prog: str, **options: Any) -> Any:
        key = prog, *args, repr(options)
        if key not in parsed:
            parsed[key] = parse(form, args=args, prog=prog, **options)
        return parsed[key]

    return remembered


def parse_first(words: Sequence[str]) -> None:
    """Parse a command line, so that forks need not. One with plug-ins is left to them: what it means is in a file."""
    import tyro

    from gen_dist import cli, commands

    if "--plugin" in words:
        return
    if words[0] == "train":
        cli.parse_train(words[1:], "gen-dist train", cli.NoOptions())
    else:
        forms = {one.__name__.replace("_", "-"): cli._deferred(one) for one in commands.FUNCTIONS}
        tyro.extras.subcommand_cli_from_dict(forms, args=list(words), prog="gen-dist")


def import_also(names: Iterable[str]) -> None:
    """Import modules that a command has imported in a fork. Those of plug-ins are left to the forks."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    keep_for_forks()


def keep_for_forks() -> None:
    """Take what there is out of garbage collection: a fork's collections then copy none of its pages."""
    gc.collect()
    gc.freeze()


def be_steady(seed: int) -> None:
    """In this process, let clocks go on by a tick a call, and draw identities from a seed.

    Then files differ between two starts only if what the starts did differs. Starts of one command after another need
    different seeds: equal identities would say that they are one start.
    """
    ticks, chance = itertools.count(1), random.Random(seed)

    def seconds() -> float:
        return next(ticks) * TICK_SECONDS

    time.perf_counter = time.monotonic = seconds
    uuid.uuid4 = lambda: uuid.UUID(int=chance.getrandbits(128), version=4)
    secrets.token_hex = lambda nbytes=None: chance.randbytes(nbytes or 32).hex()
