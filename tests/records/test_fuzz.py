"""Damaged files of a run: no traceback but our errors, in the readers of commands and in the page of a report.

Bytes of any file change at random, and values in its JSON become others of JSON's kinds. Sums of a checkpoint are made
anew in half of the tries, so that its readers meet the damage and not the digests alone.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gen_dist.errors import UserError
from gen_dist.inference.loading import load
from gen_dist.plugins.loading import load as load_plugin
from gen_dist.presets import get_preset
from gen_dist.records.run_directory import wandb_id_of
from gen_dist.reports.page import report_html
from gen_dist.reports.run_record import read_run
from gen_dist.training.replay import replay
from gen_dist.training.run import train
from tests.faults.scenarios import PLUGIN
from tests.records.test_run_mark import OLD_RUN
from tests.support.fuzzing import MINUTES, for_minutes, strange_json, tried, write_sums
from tests.support.loaded_plugins import forgetting_plugins


def run_files_in(path: Path) -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """Files of a run, and all that reads them on one damaged file."""
    run = path / "run"
    shutil.copytree(OLD_RUN, run)
    files = {entry.relative_to(run).as_posix(): entry.read_bytes() for entry in run.rglob("*") if entry.is_file()}

    def read(name: str, content: bytes) -> None:
        chance = random.Random(hashlib.sha256(content).digest())
        if chance.random() < 0.5:
            content = strange_json(files[name], chance)
        (run / name).write_bytes(content)
        checkpoint = (run / name).parent
        sums = checkpoint / "SHA256SUMS"
        if checkpoint != run and name != sums.relative_to(run).as_posix() and chance.random() < 0.5:
            write_sums(checkpoint)
        try:
            for reader in (_sample, _report, wandb_id_of):
                _one_line(reader, run)
        finally:
            (run / name).write_bytes(files[name])
            if checkpoint != run:
                sums.write_bytes(files[sums.relative_to(run).as_posix()])

    return files, read


def run_with_plugin_in(path: Path, forget: Callable[[], None]) -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """Files of a run in shards with a network of a plug-in, and all that reads them and the copy of the plug-in."""
    file, run = path / "mine.py", path / "run"
    file.write_text(PLUGIN)
    load_plugin(str(file))
    preset = get_preset("mine").with_options(hidden_sizes=(8,), latent_dim=2, steps=4, global_batch_size=8, shards=2)
    train(
        preset.with_options(data="synthetic", synthetic_images=64, checkpoint_every=2, run_dir=str(run)), say=_unheard
    )
    file.unlink()
    files = {entry.relative_to(run).as_posix(): entry.read_bytes() for entry in run.rglob("*") if entry.is_file()}
    files = {name: content for name, content in files.items() if not name.endswith(".png")}

    def read(name: str, content: bytes) -> None:
        chance = random.Random(hashlib.sha256(content).digest())
        if name.endswith("json") and chance.random() < 0.5:
            content = strange_json(files[name], chance)
        (run / name).write_bytes(content)
        checkpoint = (run / name).parent
        if checkpoint.parent.name == "checkpoints" and not name.endswith("SUMS") and chance.random() < 0.7:
            write_sums(checkpoint)
        try:
            for reader in (_sample, _replay, _report) if chance.random() < 0.2 else (_sample, _replay):
                forget()
                _one_line(reader, run)
        finally:
            for other, whole in files.items():
                (run / other).write_bytes(whole)

    return files, read


def _replay(run: Path) -> None:
    replay(run, 3, _unheard)


def _one_line(reader: Callable[[Path], object], run: Path) -> None:
    try:
        reader(run)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700, error


def _sample(run: Path) -> None:
    load(run, announce=_unheard).sample(2)


def _report(run: Path) -> None:
    assert "<b>" not in report_html([read_run(run)], [None], None)


def _unheard(_line: str) -> None:
    pass


def test_damaged_files_of_a_run_are_read_or_one_line(tmp_path: Path) -> None:
    files, read = run_files_in(tmp_path)
    assert tried(files, read, iter(range(25))) == 25


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_readers_of_a_run_are_fuzzed_for_minutes(tmp_path: Path) -> None:
    for_minutes("files of a run", *run_files_in(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_readers_of_a_run_with_a_plugin_are_fuzzed_for_minutes(tmp_path: Path) -> None:
    with forgetting_plugins() as forget:
        for_minutes("files of a run in shards with a plug-in", *run_with_plugin_in(tmp_path, forget))
