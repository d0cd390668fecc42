"""Metrics, sources and networks with one fault each: the check that is meant to find it does, and no other."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gen_dist.config import DataConfig, MlpConfig
from gen_dist.data.sources.source import Block, Request, register
from gen_dist.evaluation.metric import Metric
from gen_dist.networks.mlp import MlpDecoder, MlpEncoder
from gen_dist.plugins import loading
from gen_dist.plugins.tables import FILES
from gen_dist.testing.metrics import METRIC_CHECKS, MetricTrial
from gen_dist.testing.networks import NETWORK_CHECKS, NetworkTrial
from gen_dist.testing.report import Check, run_checks
from gen_dist.testing.sources import SOURCE_CHECKS, SourceTrial
from tests.support.loaded_plugins import forgetting_plugins

Faults = dict[str, tuple[Any, str, str]]
"""For each fault: the faulty part, the check that finds it, and words of its reason."""


def assert_found(name: str, checks: Sequence[Check], trial: Any, check: str, words: str) -> None:
    failed = [one for one in run_checks(name, checks, trial) if one.outcome == "failed"]
    assert [one.check for one in failed] == [check], failed
    assert words in failed[0].reason


def test_each_check_has_a_fault_that_it_finds() -> None:
    for checks, faults in ((METRIC_CHECKS, METRICS), (SOURCE_CHECKS, SOURCES), (NETWORK_CHECKS, NETWORKS)):
        assert {one.name for one in checks} == {check for _, check, _ in faults.values()}


# --- Metrics ---------------------------------------------------------------------------------------------------------


def _roughness(context: Any) -> dict[str, float]:
    return {"odd": float(context.sampled.images.float().diff().abs().mean())}


def _metric(measure: Callable[[Any], Any] = _roughness, **changes: Any) -> Metric:
    plain = Metric(name="odd", label="odd", group="pixels", better="less", meaning="A number.", needs=("samples",))
    return replace(plain, measure=measure, **changes)


METRICS: Faults = {
    "group": (_metric(group="others"), "its entry is complete", "group 'others' is not one of features"),
    "requirement": (_metric(needs=("luck",)), "its entry is complete", "needs 'luck', which is not one of"),
    "label": (_metric(label=""), "its entry is complete", "no label or no meaning"),
    "no value": (_metric(lambda _: {}), "its values are numbers", "it gives nothing, not odd"),
    "another name": (_metric(lambda _: {"odd": 1.0, "even": 2.0}), "its values are numbers", "it gives even; further"),
    "infinity": (_metric(lambda _: {"odd": [1.0, float("inf")]}), "its values are numbers", "raise UnavailableError"),
    "own error": (_metric(lambda context: {"odd": vars(context)["x"]}), "its values are numbers", "KeyError: 'x'"),
    "draws": (_metric(lambda _: {"odd": float(torch.rand(()))}), "two measurements are equal", "context.rng"),
    "direction": (_metric(better="more"), "its direction is right", "more is better, but it is"),
}


@pytest.fixture(scope="module")
def measured_model(tmp_path_factory: pytest.TempPathFactory) -> MetricTrial:
    trial = MetricTrial(_metric(), tmp_path_factory.mktemp("metric"))
    assert {one.outcome for one in run_checks("none", METRIC_CHECKS, trial)} == {"passed"}
    return trial


@pytest.mark.parametrize("fault", METRICS)
def test_a_fault_of_a_metric_is_found_by_its_check(fault: str, measured_model: MetricTrial) -> None:
    metric, check, words = METRICS[fault]
    trial = MetricTrial(metric, measured_model.folder)
    trial.__dict__["model"], trial.dataset = measured_model.model, measured_model.dataset
    assert_found(fault, METRIC_CHECKS, trial, check, words)


# --- Sources ---------------------------------------------------------------------------------------------------------


def _blocks_once(source: Any) -> Iterator[Block]:
    """Blocks of the first call alone."""
    blocks, source.__dict__["left"] = source.__dict__.get("left", source.plain.blocks(source)), iter(())
    yield from blocks


def _changed(**changes: Callable[[Block], Any]) -> Callable[[Any], Iterator[Block]]:
    def blocks(source: Any) -> Iterator[Block]:
        for block in source.plain.blocks(source):
            yield replace(block, **{name: change(block) for name, change in changes.items()})

    return blocks


def _of_what_is_there(source: Any) -> Iterator[Block]:
    """All whole images of a file, however many its header says."""
    content = np.frombuffer(Path(source.path).read_bytes()[20:], np.uint8)
    rows = content[: len(content) // 785 * 785].reshape(-1, 785)
    yield Block("train", rows[:, 1:].reshape(-1, 1, 28, 28), rows[:, 0].astype(np.int64), source.name)


def _with_error(error: Exception) -> Callable[[Any], Iterator[Block]]:
    def blocks(source: Any) -> Iterator[Block]:
        try:
            yield from source.plain.blocks(source)
        except Exception:
            raise error from None

    return blocks


def _noise(block: Block) -> Any:
    assert isinstance(block.images, np.ndarray)
    return np.random.default_rng().integers(0, 256, block.images.shape, np.uint8)


SOURCES: Faults = {
    "class names": ({"class_names": lambda _: ("a",) * 4}, "it can be packed", "class names are not unique: a, a, a"),
    "chance": ({"blocks": _changed(images=_noise)}, "packed twice it has one digest", "packed twice, its images or la"),
    "one pass": ({"blocks": _blocks_once}, "its blocks can be read twice", "`blocks` gives 1 blocks at first and 0"),
    "narrow labels": (
        {"blocks": _changed(labels=lambda block: block.labels.astype(np.int32))},
        "its blocks can be read twice",
        "labels are int32, not int64",
    ),
    "count": ({"image_count": lambda _: 7}, "its blocks can be read twice", "image_count is 7, but there are 40"),
    "fingerprint": ({"fingerprint": lambda _: str(uuid.uuid4())}, "its fingerprint is stable", "never found again"),
    "half": (
        {"blocks": _of_what_is_there, "image_count": lambda _: None},
        "a damaged file is named",
        "half of its file is read without a word",
    ),
    "nameless": ({"blocks": _with_error(IndexError("out of it"))}, "a damaged file is named", "ends in IndexError"),
}
"""Methods that replace those of the worked source."""


@pytest.fixture(scope="module")
def toy_source() -> Iterator[ModuleType]:
    with forgetting_plugins():
        loading.load(str(Path(__file__).parents[1] / "plugins/toy_source.py"))
        yield sys.modules[f"{FILES}.toy_source"]


def _source_trial(toy_source: ModuleType, name: str, methods: dict[str, Any], folder: Path) -> SourceTrial:
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    toy_source.write_toy(folder / "digits.toy", images, np.arange(40) % 4, 4)
    faulty: Any = type("Faulty", (toy_source.ToySource,), {**methods, "plain": toy_source.ToySource})

    def open_faulty(request: Request) -> Any:
        return faulty(request.path)

    register(name, open_faulty, takes_path=True)
    return SourceTrial(f"{name}:{folder / 'digits.toy'}", DataConfig(), "data", folder)


@pytest.mark.parametrize("fault", SOURCES)
def test_a_fault_of_a_source_is_found_by_its_check(fault: str, toy_source: ModuleType, tmp_path: Path) -> None:
    methods, check, words = SOURCES[fault]
    trial = _source_trial(toy_source, fault.replace(" ", "-"), methods, tmp_path)
    assert_found(fault, SOURCE_CHECKS, trial, check, words)


def test_without_a_fault_a_source_passes(toy_source: ModuleType, tmp_path: Path) -> None:
    results = run_checks("none", SOURCE_CHECKS, _source_trial(toy_source, "sound", {}, tmp_path))
    assert {one.outcome for one in results} == {"passed"}, results


# --- Networks --------------------------------------------------------------------------------------------------------

Fault = Literal["none", "shape", "places", "unused", "generator", "draws", "batch", "layout", "start"]


@dataclass(frozen=True)
class FaultyConfig(MlpConfig):
    """Fully connected networks with a fault."""

    encoder: ClassVar[str] = f"{__name__}:FaultyEncoder"
    decoder: ClassVar[str] = f"{__name__}:FaultyDecoder"
    hidden_sizes: tuple[int, ...] = (8,)
    fault: Fault = "none"


class FaultyEncoder(MlpEncoder):
    def __init__(self, config: FaultyConfig, image_shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__(config, image_shape, outputs)
        self.fault = config.fault
        if self.fault == "unused":
            self.spare = nn.Linear(2, 2)
        if self.fault == "generator":
            with torch.no_grad():
                numbers = torch.Generator()
                numbers.seed()
                next(self.parameters()).normal_(generator=numbers)

    def forward(self, images: Tensor) -> Tensor:
        if self.fault == "layout":  # the order in memory, not that of the axes
            images = images.as_strided(images.shape, torch.empty(images.shape).stride())
        outputs: Tensor = super().forward(images)
        if self.fault == "shape":
            outputs = outputs[:, :-1]
        if self.fault == "places":
            outputs = outputs[:, :, None, None]
        if self.fault == "draws":
            outputs = outputs + torch.randn_like(outputs)
        return outputs - outputs.mean(dim=0) if self.fault == "batch" else outputs


class FaultyDecoder(MlpDecoder):
    def __init__(self, config: FaultyConfig, image_shape: tuple[int, int, int], inputs: int) -> None:
        super().__init__(config, image_shape, inputs)
        self.fault = config.fault

    def start_at(self, image: Tensor) -> None:
        super().start_at(image * (2.0 if self.fault == "start" else 1.0))


NETWORKS: Faults = {
    "shape": ("shape", "outputs have their shape", "FaultyEncoder gives [B, 2] for inputs [B, 1, 28, 28], and [B, 3]"),
    "places": ("places", "outputs have their shape", "if outputs have places, latent_shape(image_shape)"),
    "unused": ("unused", "gradients reach all parameters", "parameter spare.weight of the encoder"),
    "generator": ("generator", "the seed alone decides the weights", "starts at other values for the same seed"),
    "draws": ("draws", "evaluation is deterministic", "draws random numbers in eval mode"),
    "batch": ("batch", "a row does not depend on the others", "maps a row in a batch of 3 otherwise than alone"),
    "layout": ("layout", "channels last equals contiguous", "gives other values for images that are channels_last"),
    "start": ("start", "decoders start at an image", "start_at does not move the decoded images by the colour"),
}


@pytest.mark.parametrize("fault", NETWORKS)
def test_a_fault_of_a_network_is_found_by_its_check(fault: str) -> None:
    chosen, check, words = NETWORKS[fault]
    # One channel is in the same order in both layouts.
    trial = NetworkTrial(FaultyConfig(fault=chosen), (3, 28, 28) if fault == "layout" else (1, 28, 28))
    assert_found(fault, NETWORK_CHECKS, trial, check, words)


def test_without_a_fault_a_network_passes() -> None:
    results = run_checks("none", NETWORK_CHECKS, NetworkTrial(FaultyConfig(), (3, 28, 28)))
    assert {one.outcome for one in results} == {"passed"}, results
