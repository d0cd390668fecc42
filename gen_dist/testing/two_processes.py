"""The check that two processes train as one does. This module is also the program of the two."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from gen_dist.network_options import ROLES
from gen_dist.startup import end_with_parent
from gen_dist.testing.beside import started_beside
from gen_dist.testing.report import Skipped
from gen_dist.testing.trial import ObjectiveTrial, compare_trainings, run_steps, state_of


def check_two_processes_equal_one(trial: ObjectiveTrial) -> None:
    """Two processes with half of each batch train as one process with all of it."""
    with contextlib.nullcontext(trial.beside) if trial.beside else started_beside(as_json(trial)) as two:
        logs, state = two.result()
    trial.config = dataclasses.replace(trial.config, sync_batch_norm=trial.has_batch_statistics)
    compare_trainings(trial, "two processes", logs, state)


def as_json(trial: ObjectiveTrial) -> dict[str, Any]:
    """A trial as JSON, from which another process makes it with `read_trial`.

    Raises:
        Skipped: a class of it cannot be imported by another process.
    """
    config = trial.config
    parts = {name: _described(part) for name in ("objective", "network", *ROLES) if (part := getattr(config, name))}
    return {"parts": parts, "image_shape": list(trial.image_shape)}


def read_trial(described: dict[str, Any]) -> ObjectiveTrial:
    """The trial that `as_json` described."""
    parts = {name: _made(part) for name, part in described["parts"].items()}
    objective, network = parts.pop("objective"), parts.pop("network")
    return ObjectiveTrial(objective, network, tuple(described["image_shape"]), parts)


def _described(config: Any) -> dict[str, Any]:
    """A config as JSON, with the place of its class, which another process may have to load from its file."""
    kind = type(config)
    if kind.__module__ == "__main__":
        raise Skipped("other processes cannot import a class of a script or notebook; put it in a file")
    file = getattr(sys.modules[kind.__module__], "__file__", None)
    return {"module": kind.__module__, "file": file, "name": kind.__qualname__, "values": dataclasses.asdict(config)}


def _made(described: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter

    name = described["module"]
    try:
        module = importlib.import_module(name)
    except ImportError:
        spec = importlib.util.spec_from_file_location(name, described["file"])
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return TypeAdapter(getattr(module, described["name"])).validate_python(described["values"])


def main(folder: Path) -> None:
    """Train a trial in this process, one of two. The main one writes logs.json and state.safetensors."""
    from safetensors.torch import save_file

    from gen_dist.parallel.processes import end_process, start_processes
    from gen_dist.training.trainer import Trainer

    end_with_parent()
    trial = read_trial(json.loads((folder / "trial.json").read_text()))
    config = dataclasses.replace(trial.config, sync_batch_norm=trial.has_batch_statistics, device="cpu")
    processes = start_processes(config)
    trainer = Trainer(config, trial.dataset, processes)
    logs = run_steps(trainer, 0, trial.few_steps)
    state = state_of(trainer)
    if processes.is_main:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "state.safetensors")
        (folder / "logs.json").write_text(json.dumps(logs))
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
