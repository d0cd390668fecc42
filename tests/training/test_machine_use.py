"""Figures of the machine's use: operations of a step, the device's peak, and the peak of memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from bench.costs.products import plain_layers
from gen_dist.data.values import ValueScale
from gen_dist.parallel.processes import start_processes
from gen_dist.records.metrics_file import MACHINE_USE, read_metrics
from gen_dist.reports.run_page import _use_of_machine
from gen_dist.training import machine_use
from gen_dist.training.device_peak import peak_flops, vendor_peak
from gen_dist.training.machine_use import MachineUse, flops_per_image
from gen_dist.training.run import train
from gen_dist.training.trainer import Trainer
from tests.support.runs import (
    OBJECTIVES,
    all_tensors,
    assert_same_bits,
    each_of,
    make_trainer,
    small_config,
    small_dataset,
)

CPU = torch.device("cpu")
QUICK = ("vae", "gan", "wgan-gp, lazy")


def _silent(_line: str) -> None:
    pass


@each_of(OBJECTIVES, left_out=set(OBJECTIVES) - set(QUICK))
def test_the_counted_operations_are_those_of_real_steps(objective: str) -> None:
    trainer = make_trainer(small_config(objective))
    counted = flops_per_image(trainer)
    images = trainer.config.global_batch_size
    without_hooks = mock.patch.multiple(ModuleTracker, __enter__=lambda self: self, __exit__=lambda *_: None)
    for step in trainer.kinds_of_steps():
        # torch's counter does not know oneDNN's layers, and its hooks on modules break penalties.
        with plain_layers(), without_hooks, FlopCounterMode(display=False) as counter:
            trainer.run_step(step)
        wanted = counter.get_total_flops() / images
        assert counted[tuple(trainer.due_at(step).items())] == pytest.approx(wanted, rel=0.01)
        assert wanted > 1000


@pytest.mark.parametrize("changes", [{"shards": 2}, {"sync_batch_norm": True}, {"compile": True}], ids=str)
def test_counting_does_not_depend_on_how_steps_are_computed(changes: dict[str, bool]) -> None:
    name = "dcgan" if "sync_batch_norm" in changes else "vae"
    plain = flops_per_image(make_trainer(small_config(name)))
    assert flops_per_image(make_trainer(small_config(name, **changes))) == plain


def test_values_of_any_type_are_counted() -> None:
    config = small_config("vae")
    plain, scale = small_dataset(config), ValueScale("float16", (0.0,), (1000.0,))
    train_split = replace(plain.train, images=plain.train.images.astype(np.float16), scale=scale)
    floats = Trainer(config, replace(plain, train=train_split), start_processes(config))
    assert flops_per_image(floats) == flops_per_image(make_trainer(config))


@each_of(QUICK[1:])
def test_counting_changes_nothing(objective: str) -> None:
    plain, counted = (make_trainer(small_config(objective)) for _ in range(2))
    torch.manual_seed(5)
    wanted = torch.randn(2)
    torch.manual_seed(5)
    MachineUse(counted, _silent, first_step=0)
    assert torch.equal(torch.randn(2), wanted)
    for trainer in (plain, counted):
        for step in range(4):
            trainer.run_step(step)
    assert_same_bits(all_tensors(counted), all_tensors(plain))


def test_figures_are_of_the_steps_since_the_last() -> None:
    trainer = make_trainer(small_config("wgan-gp, lazy"))  # the generator has its turn at every third step
    use = MachineUse(trainer, _silent, first_step=0)
    counted = flops_per_image(trainer)

    def flops(*steps: int) -> float:
        return sum(counted[tuple(trainer.due_at(step).items())] for step in steps) / len(steps)

    peak = peak_flops(CPU, torch.float32)
    assert peak is not None
    for last, steps in ((1, [0]), (3, [1, 2]), (4, [3])):
        figures = use.figures(last, 1e6)
        assert figures["tflops_per_second"] == pytest.approx(1e6 * flops(*steps) / 1e12)
        assert figures["fraction_of_peak"] == pytest.approx(1e6 * flops(*steps) / peak)
        assert 50 < figures["peak_memory_mib"] < 1e6
    assert flops(1) != flops(3)


def test_a_run_has_them_in_every_line_with_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small_config("vae", steps=6, log_every=2, run_dir=str(tmp_path / "run")), say=_silent)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert all(line[name] > 0 for name in MACHINE_USE)
        assert line["tflops_per_second"] / line["images_per_second"] == pytest.approx(
            lines[0]["tflops_per_second"] / lines[0]["images_per_second"]
        )
    (last,) = [line for line in capsys.readouterr().err.splitlines() if re.match(r"step 6/6  [\d,]+ images/s", line)]
    assert re.search(r"  [\d.e-]+ TFLOP/s \(\d+%\)  peak \d+\.\d\d GiB$", last)


def test_an_objective_that_cannot_be_counted_trains_on() -> None:
    lines: list[str] = []
    with mock.patch.object(machine_use, "flops_per_image", side_effect=RuntimeError("no copies\nof this")):
        use = MachineUse(make_trainer(small_config("vae")), lines.append, first_step=0)
    assert not lines  # if it cannot be trained either, its error is the only line
    for step in (3, 4):
        assert list(use.figures(step, 10.0)) == ["peak_memory_mib"]
    assert lines == ["warning: the arithmetic of a step is not counted: no copies of this"]


def test_the_measured_peak_is_that_of_this_machine() -> None:
    peak = peak_flops(CPU, torch.float32)
    assert peak is not None and 1e8 < peak < 1e15
    assert peak_flops(CPU, torch.float32) == peak  # measured once


@pytest.mark.parametrize(
    ("name", "bf16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51.2e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362.05e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla T4", None, 8.1e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("NVIDIA GeForce RTX 3090", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ],
)
def test_peaks_of_gpus_are_the_vendors(name: str, bf16: float | None, float32: float | None) -> None:
    found = [vendor_peak(name, dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert found == [None if one is None else pytest.approx(one) for one in (bf16, float32)]


def test_a_report_has_the_median_and_the_greatest_peak() -> None:
    rates = ((0.1, 0.2, 512.0), (0.3, 0.4, 2048.0), (0.2, 0.3, 1024.0))
    lines = [dict(zip(MACHINE_USE[1:], values, strict=True)) for values in rates]
    run: Any = SimpleNamespace(metrics=[{"step": 0}, *lines])
    assert _use_of_machine(run) == {
        "peak of memory": "2.00 GiB, in the main process",
        "arithmetic": "0.2000 TFLOP/s (30%) of the peak, median",
    }
    assert _use_of_machine(SimpleNamespace(metrics=[{"step": 0, "images_per_second": 3.0}])) == {}  # type: ignore[arg-type]
