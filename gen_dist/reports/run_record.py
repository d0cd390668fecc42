"""Record of a run, finished or not, read once from its directory for tables, comparisons and reports."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError
from gen_dist.evaluation.guide import base_name
from gen_dist.evaluation.record import Evaluation, read_evaluation
from gen_dist.inference.exported import refuse_export
from gen_dist.presets import presets
from gen_dist.records.checkpoint import newest, read_facts
from gen_dist.records.collapse import Collapse, CollapseWatch
from gen_dist.records.environment import ENVIRONMENT_SHAPE
from gen_dist.records.metrics_file import metrics_damage, metrics_of_run
from gen_dist.records.reading import Kind, config_of_run, read_object
from gen_dist.records.run_mark import refuse_lost_checkpoints
from gen_dist.records.run_paths import RunPaths
from gen_dist.records.summary import SUMMARY_SHAPE

_TELLS_NO_TWO_RUNS_APART = frozenset(
    {"seed", "run_dir", "data_root", "wandb", "track", "keep_checkpoints", "keep_best"}
)


@dataclass(frozen=True)
class RunRecord:
    """A run as recorded in its directory."""

    path: Path
    config: TrainConfig
    step: int
    """Step of the newest whole checkpoint, the one that is evaluated."""
    state: Mapping[str, Any]
    """Facts of that checkpoint: `data_digest`, `image_shape`, `class_names`, `training_seconds`."""
    metrics: Sequence[Mapping[str, Any]]
    """The objects of metrics.jsonl; none where it is missing."""
    summary: Mapping[str, Any] | None
    """summary.json, which finished runs have."""
    environment: Mapping[str, Any] | None
    """environment.json."""
    evaluation: Evaluation | None
    """Evaluation of the newest checkpoint; None if it has none."""

    damage: str | None = None
    """Damage to metrics.jsonl, as a sentence."""

    @property
    def finished(self) -> bool:
        """True if all steps are done."""
        return self.step >= self.config.steps

    @property
    def images_seen(self) -> int:
        """Training images up to the newest checkpoint, repeats counted."""
        return self.step * self.config.global_batch_size

    @property
    def training_seconds(self) -> float:
        """Wall time of training up to the newest checkpoint, without tests, pictures and checkpoints."""
        if self.summary and self.summary.get("steps") == self.step:
            return float(self.summary["training_seconds"])
        return float(self.state["training_seconds"])

    @property
    def images_per_second(self) -> float | None:
        """Mean over the training; None if it took no time."""
        return self.images_seen / self.training_seconds if self.training_seconds else None

    @property
    def family(self) -> str:
        """The objective's family; `vae` and `gan` are compared with each other."""
        return self.config.objective.family

    @property
    def collapses(self) -> list[Collapse]:
        """Signs of a collapse that hold at the newest checkpoint."""
        return CollapseWatch(self.config.steps, self.metrics).present

    def picture(self, name: str) -> Path | None:
        """One of the pictures that a finished run has, such as `interpolations`; None where it is missing."""
        path = RunPaths(self.path).final_pictures[name]
        return path if path.exists() else None

    @property
    def nearest_pairs(self) -> Path | None:
        """Picture of the samples nearest to training images, of the evaluated checkpoint; None where it is missing."""
        path = RunPaths(self.path).nearest_pairs
        measured = self.evaluation is not None and any(
            base_name(name) == "memorization" for name in self.evaluation.metrics
        )
        return path if measured and path.exists() else None

    def pictures_by_step(self, kind: str) -> dict[int, Path]:
        """`samples` or `reconstructions` by the step they were made at, in order."""
        found = {}
        for path in RunPaths(self.path).picture_series[kind].glob("step_*.png"):
            step = path.stem.removeprefix("step_")
            if step.isascii() and step.isdecimal():  # others are a user's: copies, notes
                found[int(step)] = path
        return dict(sorted(found.items()))


def read_run(path: Path, announce: Callable[[str], None] | None = None) -> RunRecord:
    """Read a run directory.

    Args:
        path: the run directory.
        announce: takes a line about a damaged checkpoint, in whose place an older one is read. None says nothing.

    Raises:
        CheckpointError: there is no run but e.g. an export, it has no checkpoint yet, or one of its files is damaged.
        ConfigError: its config.json is none of this version.
    """
    refuse_export(path)
    paths = RunPaths(path)
    config = config_of_run(path)
    state = newest(path, read_facts, announce or _silent)
    if state is None:
        refuse_lost_checkpoints(path)
        raise CheckpointError(f"{path} has no checkpoint yet; go on with gen-dist train --config {paths.config}")
    evaluation = read_evaluation(path)
    return RunRecord(
        path=path,
        config=config,
        step=state["step"],
        state=state,
        metrics=[record for record in metrics_of_run(path) if record["step"] <= state["step"]],
        summary=_read(paths.summary, SUMMARY_SHAPE),
        environment=_read(paths.environment, ENVIRONMENT_SHAPE),
        evaluation=evaluation if evaluation and evaluation.checkpoint_step == state["step"] else None,
        damage=metrics_damage(path, state),
    )


def with_evaluation(before: RunRecord, evaluation: Evaluation | None) -> RunRecord:
    """Read a run again after its evaluation. If it has a newer checkpoint by now, its files up to the evaluated one."""
    after = read_run(before.path)
    if after.evaluation or evaluation is None:
        return after
    if evaluation.checkpoint_step == after.step:
        return dataclasses.replace(after, evaluation=evaluation)
    return dataclasses.replace(
        before, evaluation=evaluation if evaluation.checkpoint_step == before.step else before.evaluation
    )


def config_fields(config: TrainConfig) -> dict[str, Any]:
    """The config, flat: `optimization.betas` -> value; kinds of network and objective under their own names."""
    flat: dict[str, Any] = {}
    fields = dataclasses.asdict(config)
    del fields["accept_changed_plugins"]  # of a start, not of the run
    fields["plugins"] = [f"{plugin.name} {plugin.sha256[:12]}" for plugin in config.plugins]
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= {name if key == "kind" else f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def changes_from_preset(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which a config differs from the preset that it names: (preset's value, its own), None if absent.

    Empty where there is no such preset. The run directory, which always differs, is ignored.
    """
    if config.preset not in presets():
        return {}
    before, after = config_fields(presets()[config.preset].config), config_fields(config)
    return {
        name: (before.get(name), after.get(name))
        for name in dict.fromkeys([*after, *before])
        if name != "run_dir" and before.get(name) != after.get(name)
    }


def decisive_fields(config: TrainConfig) -> dict[str, Any]:
    """The config, flat, without the seed and the fields that only name places."""
    return {name: value for name, value in config_fields(config).items() if name not in _TELLS_NO_TWO_RUNS_APART}


def group_by_config(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs that differ in nothing but the seed and where things are kept together, in the order given."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.step, decisive_fields(run.config)]), []).append(run)
    return list(groups.values())


def _read(path: Path, shape: Mapping[str, Kind]) -> dict[str, Any] | None:
    """Read a JSON object, without the fields that are null; None if there is no such file."""
    try:
        found = read_object(path, shape, "remove it: the report goes without it")
    except FileNotFoundError:
        return None
    return {name: value for name, value in found.items() if value is not None}


def _silent(_line: str) -> None:
    pass
