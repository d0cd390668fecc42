"""Content of one run's part of a report, gathered from its directory."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen_dist.cli import program_of
from gen_dist.config import RoleName
from gen_dist.data.forms import written
from gen_dist.data.values import scale_of_json
from gen_dist.evaluation.guide import base_name, in_order, is_of_run, metric_of
from gen_dist.pictures.curves import spelled, unit_of
from gen_dist.presets import presets
from gen_dist.records.display import brief_use
from gen_dist.records.readable import readable_duration, readable_result
from gen_dist.records.summary import last_values
from gen_dist.reports.groups import Group, data_value, readable_values, scalars, short_training
from gen_dist.reports.pairs import PAIR_PICTURES, Pairs, newest_pairs
from gen_dist.reports.panels import Panel, Single, panels_of
from gen_dist.reports.run_record import RunRecord, changes_from_preset, config_fields
from gen_dist.reports.thumbnails import thumbnails
from gen_dist.training.step_times import StepTimes

MOST_FRAMES = 40
"""Maximum number of pictures of one kind; longer series are sampled evenly."""
MUCH_SLOWER = 1.5
_PLATES = {
    "latent_manifold": "Decoded latents: {manifold}",
    "interpolations": "Walks between latents of the prior",
    "latent_scatter": "Posterior means of test images, by class",
    "class_shares": "Classes of the samples over the steps, by nearest training images",
    "scores": "Discriminator scores of real and generated images",
}
SERIES = ("samples", "reconstructions")
_HEADLINES = ("fid", "negative_elbo", "nll", "reconstruction_error")
_PARTS = {"forward": "blue", "backward": "orange", "gradients": "orange", "optimizer": "green"}


@dataclass(frozen=True)
class Frame:
    """One picture of a series over the steps."""

    label: str
    source: str
    """The picture as a data URI."""


@dataclass(frozen=True)
class Fact:
    """One line of a table: of metrics, config or environment."""

    name: str
    value: str
    note: str = ""
    changed: bool = False


@dataclass(frozen=True)
class Part:
    """A part of the training step."""

    name: str
    milliseconds: float
    share: float
    """Fraction of the step, 0..1."""
    colour: str


@dataclass(frozen=True)
class RunPage:
    """Content of one run's part of the report."""

    run: RunRecord
    anchor: str
    title: str
    description: str
    warnings: Sequence[str]
    """Warnings that come before all figures, a sentence each."""
    headline: Sequence[Fact]
    metrics: Sequence[Fact]
    missing: Sequence[Fact]
    """Unavailable metrics, each with the reason."""
    panels: Sequence[Panel]
    singles: Sequence[Single]
    series: Mapping[str, Sequence[Frame]]
    """`samples`, `reconstructions`: pictures over the steps."""
    nearest: Frame | None
    """Samples beside their nearest training images; None without an evaluation of `memorization`."""
    pairs: Pairs | None
    """Originals, reconstructions and their difference at the newest step; None without an encoder."""
    plates: Sequence[Frame]
    parts: Sequence[Part]
    step_times: StepTimes | None
    slower: str | None
    """The run's images a second, if far above those of the measured steps; else None."""
    is_preset: bool
    """True if its config names a preset of this version."""
    changed: Sequence[Fact]
    config: Sequence[Fact]
    environment: Sequence[Fact]
    commands: Sequence[tuple[str, str]]
    """Purpose and command of each."""


def run_page(run: RunRecord, times: StepTimes | None, place: int, page_pictures: int) -> RunPage:
    """Content of one run's part.

    Args:
        run: the run.
        times: times of its steps; None if not measured.
        place: place of the run on the page.
        page_pictures: number of all pictures on the page, which share its budget.

    Raises:
        CheckpointError: a picture is damaged.
    """
    group = Group(run.config.preset, [run])
    found = scalars(run)
    shown = in_order([name for name in found if not name.endswith("_data") and not is_of_run(name)])
    metrics = [
        Fact(metric_of(name).label, value_text(name, [found[name]], group), _explanation(name, run)) for name in shown
    ]
    missing = [
        Fact(metric_of(name).label, reason)
        for name, reason in (run.evaluation.unavailable if run.evaluation else {}).items()
    ]
    rate = run.images_per_second
    panels, singles = panels_of(run.metrics, run.config.objective)
    changes = changes_from_preset(run.config)
    fields = config_fields(run.config)
    return RunPage(
        run=run,
        anchor=f"run-{place + 1}",
        title=run.config.preset,
        description=_description(run),
        warnings=_warnings(run),
        headline=_headline(run, found, group),
        metrics=metrics,
        missing=missing,
        panels=panels,
        singles=singles,
        series={kind: frames for kind in SERIES if (frames := _frames(run.pictures_by_step(kind), page_pictures))},
        nearest=_nearest(run, page_pictures),
        pairs=newest_pairs(run, page_pictures),
        plates=[
            Frame(text.format(manifold=_manifold(run)), *thumbnails([file], page_pictures))
            for name, text in _PLATES.items()
            if (file := run.picture(name))
        ],
        parts=_parts(times),
        step_times=times,
        slower=f"{rate:,.0f}" if times and rate and rate > MUCH_SLOWER * times.images_per_second else None,
        is_preset=run.config.preset in presets(),
        changed=[
            Fact(name, _plain(after), f"preset: {_plain(before)}", changed=True)
            for name, (before, after) in changes.items()
        ],
        config=[Fact(name, _plain(value), changed=name in changes) for name, value in fields.items()],
        environment=_environment(run),
        commands=_commands(run),
    )


def _nearest(run: RunRecord, page_pictures: int) -> Frame | None:
    file = run.nearest_pairs
    if file is None:
        return None
    return Frame("Samples nearest to a training image", *thumbnails([file], page_pictures))


def _manifold(run: RunRecord) -> str:
    """Description of the picture of decoded latents, as the gallery draws it."""
    channels, height, width = run.state["image_shape"]
    role: RoleName = "generator" if run.config.generator else "decoder"
    of_two = run.config.roles.latent_shape(role, (channels, height, width)) == (2,)
    return "the plane of the two" if of_two else "walks along the principal directions of the posterior means"


def _description(run: RunRecord) -> str:
    channels, height, width = shape = run.state["image_shape"]
    form = scale_of_json(run.state.get("values")).form
    kind = {1: "grey ", 3: "RGB "}.get(channels, f"{channels}-channel ")
    images = f"{height} x {width} {kind}images" if form == "images" else written(form, shape)
    preset = presets().get(run.config.preset)
    start = preset.description if preset else run.config.objective.family_name
    return f"{start[0].upper()}{start[1:]}, trained on {run.config.data}: {images}, seed {run.config.seed}."


def _warnings(run: RunRecord) -> list[str]:
    short = short_training(run)
    told = [f"This run is {short}: its figures are not what it can do."] if short else []
    told += [f"{run.damage}."] if run.damage else []
    found = run.evaluation.warnings.values() if run.evaluation else ()
    told += [f"{line[:1].upper()}{line[1:]}." for line in found]
    return [*told, *(f"{collapse.text[:1].upper()}{collapse.text[1:]}." for collapse in run.collapses)]


def _headline(run: RunRecord, found: Mapping[str, float], group: Group) -> list[Fact]:
    """Figures at the top: the main metrics, time and progress."""
    best = [name for base in _HEADLINES for name in found if base_name(name) == base][:2]
    facts = [Fact(metric_of(name).label, value_text(name, [found[name]], group)) for name in best]
    if not facts:
        facts = _tested(run)
    rate = run.images_per_second
    progress = f"{run.step:,}" if run.finished else f"{run.step:,} of {run.config.steps:,}"
    return [
        *facts,
        Fact("training time", readable_duration(run.training_seconds)),
        *([Fact("images a second", f"{rate:,.0f}")] if rate else []),
        Fact("steps" if run.finished else "steps so far", progress),
        Fact("images seen", f"{run.images_seen:,}"),
    ]


def _tested(run: RunRecord) -> list[Fact]:
    """The first test metrics of a run without an evaluation, by the names that its objective has for them."""
    last = last_values(run.metrics)
    objective = run.config.objective
    return [
        Fact(", ".join(filter(None, (spelled(name, objective), unit_of(name, objective)))), readable_result(value))
        for name in objective.test_metrics[:2]
        if (value := last.get(f"test/{name}")) is not None
    ]


def value_text(name: str, values: Sequence[float], group: Group) -> str:
    """Values of a metric with its unit, and that of the data if it is to be near it."""
    if base_name(name) == "training_seconds" and len(values) == 1:
        return readable_duration(values[0])
    text = readable_values(values, name)
    reference = data_value(group, name) if metric_of(name).better == "data" else None
    return f"{text} (data {readable_result(reference)})" if reference else text


def _explanation(name: str, run: RunRecord) -> str:
    metric = metric_of(name)
    pixels = run.evaluation.pixels.get(name) if run.evaluation else None
    sentences = [metric.meaning, f"{metric.direction[:1].upper()}{metric.direction[1:]}." if metric.direction else ""]
    if interval := run.evaluation.intervals.get(name) if run.evaluation else None:
        sentences.append(f"95 % interval: {' to '.join(map(readable_result, interval))}.")
    return " ".join(filter(None, [*sentences, f"Of {pixels} pixels." if pixels else ""]))


def _shown_steps(pictures: Mapping[int, Path]) -> list[int]:
    """Steps whose pictures are shown: all of them, or MOST_FRAMES spread evenly, with the first and the last."""
    steps = list(pictures)
    count = min(MOST_FRAMES, len(steps))
    return [steps[round(place * (len(steps) - 1) / max(count - 1, 1))] for place in range(count)]


def _frames(pictures: Mapping[int, Path], page_pictures: int) -> list[Frame]:
    steps = _shown_steps(pictures)
    sources = thumbnails([pictures[step] for step in steps], page_pictures)
    return [Frame(f"step {step:,}", source) for step, source in zip(steps, sources, strict=True)]


def pictures_of(run: RunRecord) -> int:
    """Number of pictures that the page shows of a run."""
    return sum(len(_shown_steps(run.pictures_by_step(kind))) for kind in SERIES) + len(_PLATES) + PAIR_PICTURES + 1


def _parts(times: StepTimes | None) -> list[Part]:
    if times is None:
        return []
    whole = times.step_seconds
    several = len({name.split("/")[0] for name in times.seconds if "/" in name}) > 1
    parts = []
    for name, seconds in times.seconds.items():
        phase, _, kind = name.rpartition("/")
        label = f"{phase} {kind}" if several and phase else kind
        parts.append(Part(label, 1e3 * seconds, seconds / whole if whole else 0.0, _PARTS.get(kind, "ink")))
    return parts


def _environment(run: RunRecord) -> list[Fact]:
    told = run.environment
    if told is None:
        return []
    versions = {name: version for name, version in (told.get("versions") or {}).items() if version}
    cpu, git = told.get("cpu") or {}, told.get("git") or {}
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in told.get("gpus", [])]
    facts = {
        "processor": f"{cpu.get('model')}, {cpu.get('physical_cores')} cores, {cpu.get('memory_gib')} GiB",
        "GPUs": "; ".join(gpus) or "none",
        "processes": f"{told.get('processes')}, of {told.get('torch_threads')} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        **_use_of_machine(run),
        "platform": str(told.get("platform")),
        "commit": f"{git['commit'][:12]}{', with uncommitted changes' if git['dirty'] else ''}" if git else "",
        "data digest": run.state["data_digest"],
        "starts": "; ".join(
            f"at step {start.get('from_step')}" for start in reversed([told, *told.get("earlier", [])])
        ),
    }
    return [Fact(name, value) for name, value in facts.items() if value]


def _use_of_machine(run: RunRecord) -> dict[str, str]:
    """Arithmetic a second and peak of memory, as metrics.jsonl has them."""
    lines = [line for line in run.metrics if line.get("peak_memory_mib") is not None]
    if not lines:
        return {}
    found = {"peak of memory": f"{max(line['peak_memory_mib'] for line in lines) / 1024:.2f} GiB, in the main process"}
    middle = {
        name: statistics.median(values)
        for name in ("tflops_per_second", "fraction_of_peak")
        if (values := [line[name] for line in lines if line.get(name) is not None])
    }
    if middle:
        found["arithmetic"] = f"{brief_use(middle)[0]}{' of the peak' if 'fraction_of_peak' in middle else ''}, median"
    return found


def _commands(run: RunRecord) -> list[tuple[str, str]]:
    path = shlex.quote(str(run.path))
    again = f"{path}-again"
    command = (run.environment or {}).get("command")
    return [
        *([("original command", f"{program_of(command[0])} {shlex.join(command[1:])}")] if command else []),
        ("repeat the run", f"gen-dist train --config {path}/config.json --run-dir {again}"),
        ("evaluate it", f"gen-dist evaluate {path}"),
        ("draw new images", f"gen-dist sample {path} --count 64"),
        ("replay a step", f"gen-dist replay {path} --step {max(run.step, 1)}"),
        ("write this report", f"gen-dist report {path}"),
    ]


def _plain(value: Any) -> str:
    """A value of the config in the command line's format."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)
