"""Comparison of runs: the better one by each metric, in figures and in words."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen_dist.errors import ConfigError
from gen_dist.evaluation.guide import base_name, in_order, is_of_pixels, is_of_run, metric_of
from gen_dist.evaluation.record import Evaluation
from gen_dist.presets import presets
from gen_dist.records.readable import readable_result
from gen_dist.reports.run_record import RunRecord, decisive_fields, group_by_config, read_run, with_evaluation

ABOUT_EQUAL = 0.02
"""Relative difference below which values of single runs are reported as about equal."""


@dataclass(frozen=True)
class Group:
    """Runs of one config with different seeds, or a single run."""

    label: str
    runs: Sequence[RunRecord]

    @property
    def family(self) -> str:
        """Family of its runs: `autoencoder`, `vae`, `gan` or `vae-gan`."""
        return self.runs[0].family

    def values(self, metric: str) -> list[float]:
        """Values of one scalar metric, one for each run that has it; empty if none has."""
        found = [scalars(run).get(metric) for run in self.runs]
        return [value for value in found if value is not None]

    def reason(self, metric: str) -> str:
        """Reason why the group has no value of a metric, in one line."""
        run = self.runs[0]
        if is_of_run(metric):
            return "recorded when a run finishes" if metric == "epochs" else "not known of this run"
        if run.evaluation is None:
            return f"not evaluated yet: gen-dist evaluate {run.path}"
        reasons = {base_name(name): reason for name, reason in run.evaluation.unavailable.items()}
        if base_name(metric) in reasons:
            return reasons[base_name(metric)]
        return f"not evaluated yet: gen-dist evaluate {run.path} --metrics {base_name(metric)}"


@dataclass(frozen=True)
class Statement:
    """Comparison on one topic, in words with the figures behind them."""

    topic: str
    text: str
    metrics: Sequence[str]
    """Names of the metrics that it rests on."""
    textbook: str | None = None
    """Textbook claim on VAEs and GANs; None unless both are compared and there is a claim."""
    holds: bool | None = None
    """True if the claim holds for these runs; None if undecided."""


@dataclass(frozen=True)
class _Topic:
    title: str
    metric: str
    best: str
    """Predicate that follows the label of the best group."""
    expected: str | None = None
    """The family that textbooks expect to be better."""
    textbook: str | None = None
    only_vae: str | None = None
    """Textbook claim on a metric that only VAEs should have."""


_LIKELIHOOD = "only VAEs assign a likelihood to an image"
_TOPICS = (
    _Topic("Fidelity", "fid", "draws what is nearest to real images", "gan", "GANs draw the more realistic images"),
    _Topic("Sharpness", "sharpness", "is nearest to the data", "gan", "GANs are sharp and VAEs blurry"),
    _Topic(
        "Variety",
        "recall",
        "covers the largest part of the data",
        "vae",
        "VAEs cover the data and GANs miss some of it",
    ),
    _Topic("Smoothness", "path_length", "has the smoothest latent space", "vae", "VAEs have the smoother latent space"),
    _Topic("Likelihood", "nll", "gives test images the highest likelihood", only_vae=_LIKELIHOOD),
    _Topic("Likelihood, its bound", "negative_elbo", "gives test images the best bound on it", only_vae=_LIKELIHOOD),
    _Topic(
        "Reconstruction",
        "reconstruction_error",
        "reconstructs test images best",
        only_vae="only VAEs encode images and reconstruct them",
    ),
    _Topic("Training time", "training_seconds", "trained in the least time", "vae", "VAEs train quicker than GANs"),
    _Topic("Throughput", "images_per_second", "takes most images a second", "vae", "a VAE's step is cheaper"),
)


@dataclass(frozen=True)
class Comparison:
    """Groups of runs on the same data, with statements and notes."""

    groups: Sequence[Group]
    metrics: Sequence[str]
    """Names of the scalar metrics that any group has, in the order of the guide."""
    statements: Sequence[Statement]
    notes: Sequence[str]
    """Caveats, a sentence each."""

    def best(self, metric: str) -> Group | None:
        """The group that is best by a metric; None if undecided."""
        ranked = _ranked(self.groups, metric)
        if len(ranked) < 2 or not _comparable(ranked, metric) or not _apart(ranked[0], ranked[1], metric):
            return None
        return ranked[0]

    def as_json(self) -> dict[str, Any]:
        """Content of compare.json."""
        return {
            "format": 1,
            "data": self.groups[0].runs[0].config.data,
            "data_digest": self.groups[0].runs[0].state["data_digest"],
            "groups": [
                {
                    "label": group.label,
                    "family": group.family,
                    "runs": [str(run.path) for run in group.runs],
                    "seeds": [run.config.seed for run in group.runs],
                    "step": group.runs[0].step,
                    "metrics": {
                        name: {"values": values, "mean": statistics.fmean(values)}
                        for name in self.metrics
                        if (values := group.values(name))
                    },
                    "unavailable": {name: group.reason(name) for name in self.metrics if not group.values(name)},
                }
                for group in self.groups
            ],
            "best": {name: group.label for name in self.metrics if (group := self.best(name))},
            "statements": [
                {
                    "topic": one.topic,
                    "text": one.text,
                    "metrics": list(one.metrics),
                    "textbook": one.textbook,
                    "holds": one.holds,
                }
                for one in self.statements
            ],
            "notes": list(self.notes),
        }


def read_runs(paths: Sequence[Path], evaluate: Callable[[Path], Evaluation | None] | None = None) -> list[RunRecord]:
    """Read runs that are to be compared.

    Args:
        paths: run directories.
        evaluate: writes and returns the evaluation of a run whose newest checkpoint has none. What it returns is used
            if it could not be written, or if the run trains on meanwhile. None skips this.

    Raises:
        CheckpointError: there is no run, or none with a checkpoint.
        ConfigError: a run is named twice, or runs are of different data or were evaluated in different features.
    """
    names = [path.resolve() for path in paths]
    if twice := next((path for path in paths if names.count(path.resolve()) > 1), None):
        raise ConfigError(f"{twice} is named twice; name each run once")
    runs = [read_run(path) for path in paths]  # all of them before any is evaluated, which takes long
    _refuse_other_data(runs)
    if evaluate is not None:
        for index, run in enumerate(runs):
            if run.evaluation is None:
                runs[index] = with_evaluation(run, evaluate(run.path))
    _refuse_other_features(runs)
    return runs


def comparison_of(runs: Sequence[RunRecord]) -> Comparison:
    """Compare runs, those of one config with different seeds together."""
    grouped = group_by_config(runs)
    groups = [Group(label, group) for label, group in zip(_labels(grouped), grouped, strict=True)]
    names = dict.fromkeys(name for run in runs for name in scalars(run))
    metrics = in_order([name for name in names if not name.endswith("_data")])
    return Comparison(groups, metrics, _statements(groups, metrics), _notes(groups))


def readable_values(values: Sequence[float], metric: str) -> str:
    """Format values of one metric; several runs give mean, minimum and maximum: `105.40 (105.12 to 105.93) nats`."""
    unit, texts = metric_of(metric).unit, [readable_result(value) for value in (min(values), max(values))]
    spread = f" ({texts[0]} to {texts[1]})" if texts[0] != texts[1] else ""
    return f"{readable_result(statistics.fmean(values))}{spread} {unit}".strip()


def table_lines(comparison: Comparison) -> list[str]:
    """The comparison as lines for a terminal: a table, reasons of what is missing, statements, notes."""
    reasons: dict[str, int] = {}
    rows = [["", *(group.label for group in comparison.groups), ""]]
    for name in comparison.metrics:
        best = comparison.best(name)
        cells = []
        for group in comparison.groups:
            if values := group.values(name):
                cells.append(readable_values(values, name) + (" *" if group is best else ""))
            else:
                cells.append(f"none [{reasons.setdefault(group.reason(name), len(reasons) + 1)}]")
        metric = metric_of(name)
        rows.append([metric.label, *cells, metric.direction])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "* best, unless undecided", *(f"[{number}] {text}" for text, number in reasons.items())]
    return [*lines, "", *(_statement_line(one) for one in comparison.statements), *comparison.notes]


def markdown(comparison: Comparison, picture: str | None = None) -> str:
    """The comparison as a Markdown document; `picture` is a relative path of the picture to show."""
    labels = [_escaped(group.label) for group in comparison.groups]
    lines = [f"# {' and '.join(labels) if len(labels) < 4 else f'{len(labels)} models'} compared", ""]
    lines += [f"- {_escaped(_statement_line(one))}" for one in comparison.statements]
    lines += ["", f"| metric | {' | '.join(labels)} | |", "|---" * (len(labels) + 2) + "|"]
    for name in comparison.metrics:
        best = comparison.best(name)
        cells = []
        for group in comparison.groups:
            values = group.values(name)
            text = readable_values(values, name) if values else _escaped(group.reason(name))
            cells.append(f"**{text}**" if group is best else text)
        metric = metric_of(name)
        lines.append(f"| {metric.label} | {' | '.join(cells)} | {metric.direction} |")
    lines += ["", *map(_escaped, comparison.notes)]
    if picture:
        lines += ["", f"![samples, reconstructions, interpolations and metrics side by side]({picture})"]
    return "\n".join(lines).rstrip() + "\n"


def _escaped(text: str) -> str:
    """Escape text for Markdown: names come from files of unknown origin."""
    return html.escape(text, quote=False).replace("|", "\\|")


def _statement_line(statement: Statement) -> str:
    line = f"{statement.topic}: {statement.text}"
    if statement.textbook:
        verdict = {True: "true here", False: "not true here", None: "undecided here"}[statement.holds]
        line += f" Textbooks say: {statement.textbook}; {verdict}."
    return line


def scalars(run: RunRecord) -> dict[str, float]:
    """Scalar metrics of a run, with its training time, throughput and epochs."""
    found = {
        name: float(value)
        for name, value in (run.evaluation.metrics if run.evaluation else {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    found["training_seconds"] = run.training_seconds
    if run.images_per_second is not None:
        found["images_per_second"] = run.images_per_second
    if run.summary and run.summary.get("steps") == run.step:
        found["epochs"] = float(run.summary["epochs"])
    return found


def _labels(groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """Unique labels of the groups: the preset, with the fields that differ if presets are equal."""
    labels = []
    for group in groups:
        rivals = [other[0] for other in groups if other[0].config.preset == group[0].config.preset]
        fields = [decisive_fields(run.config) | {"trained to step": run.step} for run in rivals]
        mine = fields[rivals.index(group[0])]
        apart = [
            f"{name.split('.')[-1].replace('_', ' ')} {value}"
            for name, value in mine.items()
            if any(other.get(name) != value for other in fields)
        ]
        labels.append(group[0].config.preset + (f" ({', '.join(apart)})" if apart else ""))
    return labels


def _refuse_other_data(runs: Sequence[RunRecord]) -> None:
    first, *others = runs
    for run in others:
        if run.state["data_digest"] != first.state["data_digest"]:
            raise ConfigError(
                f"{first.path} and {run.path} do not compare: one is of {first.config.data} (digest "
                f"{first.state['data_digest'][:8]}), the other of {run.config.data} "
                f"({run.state['data_digest'][:8]}); compare runs on the same data"
            )


def _refuse_other_features(runs: Sequence[RunRecord]) -> None:
    evaluated = [(run, run.evaluation.features or {}) for run in runs if run.evaluation]
    for run, features in evaluated[1:]:
        if features.get("digest") != evaluated[0][1].get("digest"):
            raise ConfigError(
                f"{evaluated[0][0].path} and {run.path} were evaluated in other features, so that FID and the like do "
                f"not compare; evaluate one of them again in those of the other: gen-dist evaluate {run.path}"
            )


def _score(group: Group, metric: str) -> float:
    """Score of the mean over a group's runs: less is better."""
    return _score_of(statistics.fmean(group.values(metric)), group, metric)


def _score_of(value: float, group: Group, metric: str) -> float:
    match metric_of(metric).better:
        case "more":
            return -value
        case "data":
            reference = data_value(group, metric)
            return abs(math.log(value / reference)) if value > 0 and reference else math.inf
        case _:
            return value


def data_value(group: Group, metric: str) -> float | None:
    """Value of the same metric for real images; None if unknown."""
    values = group.values(f"{base_name(metric)}_data")
    return values[0] if values and values[0] > 0 else None


def _ranked(groups: Sequence[Group], metric: str) -> list[Group]:
    """Groups that have a metric, the best first; empty for a metric without a better direction."""
    if metric_of(metric).better is None:
        return []
    return sorted((group for group in groups if group.values(metric)), key=lambda group: _score(group, metric))


def _apart(better: Group, worse: Group, metric: str) -> bool:
    """True if all runs of one group beat all of the other; single runs must differ by more than ABOUT_EQUAL."""
    if len(better.runs) == len(worse.runs) == 1:
        if metric_of(metric).better == "data":  # scores are distances in logarithms: values may lie on either side
            return _score(worse, metric) - _score(better, metric) > ABOUT_EQUAL
        first, second = better.values(metric)[0], worse.values(metric)[0]
        return abs(first - second) > ABOUT_EQUAL * max(abs(first), abs(second)) and _score(better, metric) < _score(
            worse, metric
        )
    worst = max(_score_of(value, better, metric) for value in better.values(metric))
    return worst < min(_score_of(value, worse, metric) for value in worse.values(metric))


def _comparable(groups: Sequence[Group], metric: str) -> bool:
    return len({_condition(group, metric) for group in groups}) < 2


def _condition(group: Group, metric: str) -> str:
    """Condition that must be equal for figures of a metric to compare; empty if there is none."""
    if is_of_pixels(metric):
        return _pixel_model(group, metric)
    return "; ".join(sorted({_machine(run) for run in group.runs})) if is_of_run(metric) and metric != "epochs" else ""


def _pixel_model(group: Group, metric: str) -> str:
    """Pixel model of a likelihood: as evaluated, else as trained."""
    run = group.runs[0]
    objective = run.config.objective
    told = run.evaluation.pixels if run.evaluation else {}
    of = metric.replace("bits_per_dimension", "nll")  # the same in another unit
    trained = "binarized" if getattr(objective, "dynamic_binarization", False) else "real-valued"
    return f"{told.get(of, trained)} pixels, {getattr(objective, 'likelihood', 'bernoulli')}"


def _statements(groups: Sequence[Group], metrics: Sequence[str]) -> list[Statement]:
    said = []
    for topic in _TOPICS:
        for metric in metrics:
            if base_name(metric) == topic.metric and len(groups) > 1:
                said.append(_statement(topic, metric, groups))
    return said


def _statement(topic: _Topic, metric: str, groups: Sequence[Group]) -> Statement:
    ranked = _ranked(groups, metric)
    name = metric_of(base_name(metric)).label
    figures = [readable_values(group.values(metric), metric) for group in ranked]
    of_each = [f"{figure} of {group.label}" for figure, group in zip(figures, ranked, strict=True)]
    if not _comparable(ranked, metric):
        told = [f"{each} ({_condition(group, metric)})" for each, group in zip(of_each, ranked, strict=True)]
        text = f"{name} {', '.join(told)}: these do not compare."
    elif len(ranked) == 1:
        text = f"{ranked[0].label} has a {name} of {figures[0]}."
    elif _apart(ranked[0], ranked[1], metric):
        text = f"{ranked[0].label} {topic.best}: {name} {figures[0]} against {', '.join(of_each[1:])}."
    else:
        text = f"no clear difference between the first two in {name}: {', '.join(of_each)}."
    if ranked and metric_of(metric).better == "data" and (reference := data_value(ranked[0], metric)):
        text = f"{text[:-1]}; real images have {readable_result(reference)}."
    text += "".join(
        f" {group.label} has none: {group.reason(metric).rstrip('.')}." for group in groups if group not in ranked
    )
    if _comparable(ranked, metric):
        text += _also(metric, ranked)
    textbook, holds = _textbook(topic, metric, groups)
    return Statement(topic.title, text, [metric], textbook, holds)


def _also(metric: str, ranked: Sequence[Group]) -> str:
    """Qualification of a statement: the epochs behind a training time, or a KID that contradicts FID."""
    if metric == "training_seconds":
        epochs = {group.label: group.values("epochs") for group in ranked}
        told = [f"{readable_values(values, 'epochs')} epochs of {label}" for label, values in epochs.items() if values]
        return f" That was for {', '.join(told)}." if told else ""
    if base_name(metric) != "fid" or not ranked:
        return ""
    kid = metric.replace("fid", "kid")  # of as many samples
    others = _ranked(ranked, kid)
    if len(others) < 2 or others[0] is ranked[0] or not _apart(others[0], others[1], kid):
        return ""
    figures = [f"{readable_values(one.values(kid), kid)} of {one.label}" for one in others]
    return f" {metric_of('kid').label}, on the same features, disagrees: {', '.join(figures)}."


def _textbook(topic: _Topic, metric: str, groups: Sequence[Group]) -> tuple[str | None, bool | None]:
    """Textbook claim on VAEs and GANs, and its truth for the best VAE and the best GAN of the groups."""
    vaes = [group for group in groups if group.family == "vae"]
    gans = [group for group in groups if group.family == "gan"]
    if not vaes or not gans:
        return None, None
    if topic.only_vae:
        return topic.only_vae, all(one.values(metric) for one in vaes) and not any(one.values(metric) for one in gans)
    vaes, gans = _ranked(vaes, metric), _ranked(gans, metric)
    if not topic.textbook or not vaes or not gans:
        return None, None
    better, worse = (vaes[0], gans[0]) if topic.expected == "vae" else (gans[0], vaes[0])
    if not _comparable([better, worse], metric):
        return topic.textbook, None
    if _apart(better, worse, metric):
        return topic.textbook, _score(better, metric) < _score(worse, metric)
    return topic.textbook, False if _apart(worse, better, metric) else None


def _notes(groups: Sequence[Group]) -> list[str]:
    notes = []
    single = [group.label for group in groups if len(group.runs) == 1]
    if single:
        notes.append(f"One run each of {' and '.join(single)}: other seeds give slightly different figures.")
    for group in groups:
        config = group.runs[0].config
        of_preset = presets()[config.preset].config.steps if config.preset in presets() else config.steps
        if config.steps < of_preset:
            notes.append(f"{group.label} is configured for {config.steps:,} steps; its preset has {of_preset:,}.")
    if unfinished := [run for group in groups for run in group.runs if not run.finished]:
        states = ", ".join(f"{run.path} is at step {run.step:,} of {run.config.steps:,}" for run in unfinished)
        notes.append(f"Not finished: {states}.")
    machines = {_machine(run) for group in groups for run in group.runs}
    if len(machines) > 1:
        notes.append(f"Trained on different machines ({'; '.join(sorted(machines))}): times do not compare.")
    return notes


def _machine(run: RunRecord) -> str:
    environment = run.environment or {}
    gpus = [gpu["name"] for gpu in environment.get("gpus", [])]
    processes, threads = environment.get("processes", 1), environment.get("torch_threads")
    device = ", ".join(gpus) or f"{(environment.get('cpu') or {}).get('model')}, {threads} threads"
    return f"{device}, {processes} {'process' if processes == 1 else 'processes'}"
