"""The accumulation that fits is found by trying at the start, and kept by a resumed run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, MachineError
from gen_dist.parallel.processes import Processes
from gen_dist.records.metrics_file import read_metrics
from gen_dist.training import auto_accumulation
from gen_dist.training.auto_accumulation import least_that_fits, with_accumulation_that_fits
from gen_dist.training.run import train
from tests.support.limited_memory import LimitedMemory
from tests.support.runs import (
    SMALL_STYLEGAN2,
    SMALL_VQ,
    losses_of,
    make_trainer,
    run_steps,
    small_config,
    small_dataset,
)

ALONE = Processes(0, 0, 1, torch.device("cpu"))
IMAGES = 256
GIVEN: dict[str, Any] = {"auto_accumulation": False, "accumulation": 3}


def _config(**changes: Any) -> TrainConfig:
    return small_config("vae", global_batch_size=IMAGES, auto_accumulation=True, **changes)


def _found(config: TrainConfig, path: Path, *, fresh: bool = True) -> TrainConfig:
    return with_accumulation_that_fits(config, path, fresh, small_dataset(config), ALONE, lambda _line: None)


def test_the_least_accumulation_that_fits_is_found(tmp_path: Path) -> None:
    def peak(accumulation: int) -> int:
        with LimitedMemory() as memory:
            run_steps(make_trainer(_config(accumulation=accumulation)), 0, 3)
        return memory.peak

    peaks = {number: peak(number) for number in (2, 3)}
    assert peaks[3] < 0.9 * peaks[2]
    with LimitedMemory((peaks[2] + peaks[3]) // 2):
        assert _found(_config(), tmp_path).accumulation == 3


@pytest.mark.parametrize(("first", "least"), [(1, 1), (1, 2), (1, 3), (1, 7), (1, 24), (2, 3), (5, 5), (5, 11)])
def test_the_search_finds_the_least(first: int, least: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number >= least

    assert least_that_fits(range(first, 25), fits) == least
    assert len(tried) == len(set(tried))
    assert least_that_fits(range(first, 25), lambda _number: False) is None


@pytest.mark.parametrize(("wanted", "found", "tried"), [(2, 2, [1, 2]), (3, 3, [1, 2, 6, 3]), (4, 6, [1, 2, 6, 3])])
def test_cuts_through_groups_are_not_tried(wanted: int, found: int, tried: list[int], tmp_path: Path) -> None:
    """24 images in groups of 4 may be cut in 1, 2, 3 or 6. A refused cut was taken for one that lacks memory."""
    network = dataclasses.replace(SMALL_STYLEGAN2, minibatch_group=4)
    config = dataclasses.replace(small_config("gan", global_batch_size=24, auto_accumulation=True), network=network)
    numbers: list[int] = []

    def fits(number: int, *_: object) -> bool:
        numbers.append(number)
        return number >= wanted

    with mock.patch.object(auto_accumulation, "_fits", fits):
        assert _found(config, tmp_path).accumulation == found
    assert numbers == tried
    with mock.patch.object(auto_accumulation, "_fits", lambda *_: False), pytest.raises(MachineError, match="up to 6 "):
        _found(config, tmp_path)
    with pytest.raises(ConfigError, match="takes 4 images of a batch together"):
        _found(dataclasses.replace(config, accumulation=4), tmp_path)


def test_a_trial_takes_its_images_for_a_part_of_the_batch() -> None:
    """A codebook that the whole batch can fill may be larger than what one of two processes has of the batch."""
    config = small_config("latent autoencoder, codebook by gradient", global_batch_size=2)
    places = math.prod(make_trainer(config).objective.latent_shape[1:])
    config = dataclasses.replace(config, objective=dataclasses.replace(SMALL_VQ, codebook_size=2 * places))
    ranks = Processes(0, 0, 2, torch.device("cpu"))
    assert auto_accumulation._possible(config, small_dataset(config), ranks) == [1]
    assert auto_accumulation._fits(1, config, small_dataset(config), ranks)


def test_a_run_is_that_of_the_found_accumulation_and_resumes_with_it(tmp_path: Path) -> None:
    auto, given = (
        dataclasses.replace(config, steps=4, checkpoint_every=2, run_dir=str(tmp_path / name))
        for name, config in (("auto", _config()), ("given", _config().with_options(**GIVEN)))
    )
    tried: list[int] = []

    def fits(number: int, *_: object) -> bool:
        tried.append(number)
        return number >= 3

    lines: list[str] = []
    with mock.patch.object(auto_accumulation, "_fits", fits):
        train(auto, say=lines.append)
        train(given, say=lambda _line: None)
        assert json.loads((tmp_path / "auto/config.json").read_text())["accumulation"] == 3
        assert "accumulation 3 is the least that fits: at most 86 images at once in each process" in lines
        assert tried == [1, 2, 4, 3]
        shutil.rmtree(tmp_path / "auto/checkpoints/step_00000004")
        train(auto, say=lines.append)
    assert any("resuming" in line for line in lines)
    assert len(tried) == 4
    assert json.loads((tmp_path / "auto/config.json").read_text())["accumulation"] == 3
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("auto", "given"))
    assert losses_of(one) == losses_of(two)


@pytest.mark.parametrize(
    ("before", "now", "recorded", "kept"), [(1, 1, 4, 4), (4, 2, 3, 6), (2, 8, 4, 1), (8, 1, 100, IMAGES)]
)
def test_other_numbers_of_processes_keep_the_size(
    before: int, now: int, recorded: int, kept: int, tmp_path: Path
) -> None:
    """Micro-batches have as many images as before. A run that did not try tries now."""
    (tmp_path / "environment.json").write_text(json.dumps({"processes": before}))
    config = _config(accumulation=recorded)
    found: dict[str, Any] = {
        "checkpoint_paths": lambda _path: [tmp_path],
        "in_main": lambda action, _processes: action(),
        "_fits": lambda number, *_: number >= 9,
    }
    with mock.patch.multiple(auto_accumulation, **found):
        for name in ("auto", "without"):
            (tmp_path / "config.json").write_text(config.to_json())
            processes = Processes(0, 0, now if name == "auto" else 1, torch.device("cpu"))
            result = with_accumulation_that_fits(
                _config(), tmp_path, False, small_dataset(config), processes, lambda _line: None
            )
            assert result.accumulation == (kept if name == "auto" else 9)
            config = dataclasses.replace(config, auto_accumulation=False)


def test_a_network_too_large_for_one_image_is_one_line(tmp_path: Path) -> None:
    line = "no accumulation up to 256 fits in the memory of rank 0; use a smaller"
    with mock.patch.object(auto_accumulation, "_fits", lambda *_: False), pytest.raises(MachineError, match=line):
        _found(_config(), tmp_path)


def test_errors_of_other_kinds_are_not_taken_for_memory(tmp_path: Path) -> None:
    failing = mock.patch.object(auto_accumulation, "_try_steps", side_effect=RuntimeError("shapes do not match"))
    with failing, pytest.raises(RuntimeError, match="shapes"):
        _found(_config(), tmp_path)


def test_a_trial_leaves_draws_of_others_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.randn(2)
    torch.manual_seed(3)
    _found(_config(), tmp_path)
    assert torch.equal(torch.randn(2), wanted)


def test_a_trial_leaves_no_compiled_code(tmp_path: Path) -> None:
    """Else the second trial, and the run after it, would get code for any number of images."""
    sizes: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.extend(one.shape[0] for one in inputs if isinstance(one, torch.Tensor))
        return graph.forward

    def compiled_step(config: TrainConfig, *_: Any, **__: Any) -> None:
        torch.compile(torch.nn.Tanh(), backend=backend)(torch.ones(IMAGES // config.accumulation))

    torch.compiler.reset()
    with mock.patch.object(auto_accumulation, "_try_steps", compiled_step):
        for number in (1, 2, 4):
            assert auto_accumulation._fits(number, _config(compile=True), mock.Mock(), ALONE)
    assert sizes == [256, 128, 64]
    assert all(type(size) is int for size in sizes)


def test_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave out --auto-accumulation"):
        _config(shards=2)
