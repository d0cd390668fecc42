"""Damage, a file that cannot be read just now, and another version are told apart in every file of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from gen_dist.config import OptimizerConfig
from gen_dist.errors import DamagedError, OtherVersionError, UnreadableError, UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.record import read_evaluation
from gen_dist.inference.loading import load
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths, load_newest
from gen_dist.records.environment import ENVIRONMENT_SHAPE
from gen_dist.records.metrics_file import read_metrics
from gen_dist.records.reading import COUNT, config_of_run, read_object, write_object
from gen_dist.records.run_directory import record_start, refuse_other_config, wandb_id_of
from gen_dist.records.summary import SUMMARY_SHAPE
from gen_dist.reports.run_record import read_run
from gen_dist.training.run import train
from tests.records.test_run_mark import OLD_RUN, _config
from tests.support.runs import small_config

TRANSIENT = ("EIO", "ESTALE", "ETIMEDOUT")
LASTING = ("EACCES", "EMFILE", "ENOMEM")


def _silent(_line: str) -> None:
    pass


def _unexpected(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    return tmp_path / "run"


def _in_newest(run: Path, name: str) -> Path:
    return checkpoint_paths(run)[0] / name


def _rewrite_sums(checkpoint: Path) -> None:
    names = sorted(file.name for file in checkpoint.iterdir() if file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (checkpoint / "SHA256SUMS").write_text("".join(lines))


def _change(run: Path, name: str, **values: object) -> None:
    """Change JSON fields of a file in every checkpoint, with the right digests."""
    for checkpoint in checkpoint_paths(run):
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(content | values))
        _rewrite_sums(checkpoint)


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": config_of_run,
    "metrics.jsonl": lambda run: read_metrics(run / "metrics.jsonl"),
    "evaluation.json": read_evaluation,
    "summary.json": read_run,
    "environment.json": read_run,
    "wandb-id": wandb_id_of,
    "networks.safetensors": load,
    "state.json": load,
    "SHA256SUMS": lambda run: load_newest(run, _unexpected),
    "optimizer-vae.safetensors": lambda run: load_newest(run, _unexpected),
}


def _fail_to_read(monkeypatch: pytest.MonkeyPatch, name: str, code: str, times: float = float("inf")) -> None:
    """Let the system refuse to open a file of this name, some times."""
    real, left = os.open, times

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        nonlocal left
        if os.path.basename(path) == name and left > 0:
            left -= 1
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("code", [*TRANSIENT, *LASTING])
@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_just_now_is_not_damaged(
    name: str, code: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_to_read(monkeypatch, name, code)
    with pytest.raises(UnreadableError) as error:
        READERS[name](run)
    said = str(error.value).replace(str(run), "")
    assert f"{name} cannot be read just now: {os.strerror(getattr(errno, code))}; " in said
    assert "damaged" not in said and "--fresh" not in said and "\n" not in said


@pytest.mark.parametrize("name", READERS)
def test_a_hiccup_of_a_file_system_is_not_noticed(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_to_read(monkeypatch, name, random.Random(name).choice(TRANSIENT), times=2)
    assert READERS[name](run)


@pytest.mark.parametrize("code", ["EMFILE", "ESTALE", "ENOMEM"])
def test_a_file_that_torch_cannot_map_is_not_damaged(code: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, code)

    def refuse(file: Path) -> None:
        raise RuntimeError(f"unable to open file <{file}> in read-only mode: {os.strerror(number)} ({number})")

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    with pytest.raises(UnreadableError, match=rf"safetensors cannot be read just now: {os.strerror(number)}; "):
        load(run)


def test_a_file_that_safetensors_cannot_open_is_not_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> None:
        raise FileNotFoundError(f"No such file or directory: {file}")  # its words for too many open files

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    with pytest.raises(UnreadableError, match="it could not be opened"):
        load(run)


def test_checkpoints_that_cannot_be_listed_are_not_absent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UnreadableError, match="checkpoints cannot be read just now: Permission denied; let this user"):
        load(run)


def test_an_unreadable_checkpoint_is_not_passed_over_for_an_older_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = checkpoint_paths(run)[0]
    shutil.copytree(newest, newest.with_name("step_00000013"))
    _fail_to_read(monkeypatch, "networks.safetensors", "EACCES", times=1)
    with pytest.raises(UnreadableError, match=r"step_00000013/networks.safetensors"):
        load_newest(run, _unexpected)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("config.json", {"brand_new_option": 1}, "brand_new_option: Unexpected keyword argument"),
        ("config.json", {"objective": {"kind": "diffusion"}}, "'diffusion'"),
        ("config.json", {"precision": "fp8"}, "precision: Input should be"),
        ("state.json", {"format": 3}, "a newer gen_dist wrote it"),
        ("state.json", {"format": 1}, "an older gen_dist wrote it"),
    ],
)
def test_a_checkpoint_of_another_version_is_named_so(
    name: str, values: dict[str, object], said: str, run: Path
) -> None:
    _change(run, name, **values)
    for read in (load, lambda path: load_newest(path, _unexpected)):
        with pytest.raises(OtherVersionError) as error:
            read(run)
        told = str(error.value).replace(str(run), "")
        assert said in told and "damaged" not in told and "--fresh" not in told


def test_a_run_of_another_version_is_named_so(run: Path) -> None:
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(content | {"brand_new_option": 1}))
    for read in (config_of_run, read_run, lambda path: refuse_other_config(path, _config(OLD_RUN))):
        with pytest.raises(
            OtherVersionError, match=r"brand_new_option.*of a newer version.*that environment.json names"
        ):
            read(run)
    (run / "evaluation.json").write_text('{"format": 2}')
    with pytest.raises(OtherVersionError, match="another version"):
        read_evaluation(run)


DEEP = "[" * 100_000
WRONG_TEXTS = ["", "[]", "3", '"x"', "null", "{", "\0", "\xff", DEEP, "9" * 5000, '{"a": NaN}', '{"step": 1e999}']
NAMES = ["config.json", "evaluation.json", "summary.json", "environment.json", "metrics.jsonl", "wandb-id"]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_another_shape_are_one_line(name: str, run: Path) -> None:
    for text in WRONG_TEXTS:
        (run / name).write_text(text, encoding="latin-1")
        if name == "metrics.jsonl":  # the last line may be torn
            (run / name).write_text(f'{text}\n{{"step": 1}}\n', encoding="latin-1")
        if text in ("3", "null", "9" * 5000) and name == "wandb-id":
            continue  # an id like any other
        if name == "environment.json" and text.endswith("}"):
            continue  # it need not have any field
        with pytest.raises(UserError) as error:
            READERS[name](run)
        assert "\n" not in str(error.value)
        assert not isinstance(error.value, UnreadableError)


WRONG_VALUES: list[object] = [None, True, -1, 1.5, 10**30, "x", [], [[]], ["x", 1], {}, {"a": []}, {"a": {}}]


RECORDS: dict[str, Callable[[Path], object]] = {
    "evaluation.json": read_evaluation,
    "summary.json": lambda run: read_object(run / "summary.json", SUMMARY_SHAPE, "remove it"),
    "environment.json": lambda run: read_object(run / "environment.json", ENVIRONMENT_SHAPE, "remove it"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_field_of_another_kind_is_one_line_or_harmless(name: str, run: Path) -> None:
    content, refused = json.loads((run / name).read_text()), 0
    for field in content:
        for value in WRONG_VALUES:
            (run / name).write_text(json.dumps(content | {field: value}))
            try:
                RECORDS[name](run)
            except DamagedError as error:
                assert "\n" not in str(error) and f"{name} is damaged: {field} is not " in str(error)
                refused += 1
    assert refused > 20
    first = "metrics" if name == "evaluation.json" else "versions" if name == "environment.json" else "steps"
    (run / name).write_text(json.dumps(content | {first: 3.5}))
    with pytest.raises(DamagedError, match=name):
        read_run(run)


@pytest.mark.parametrize("field", ["step", "data_digest", "image_shape", "class_names", "training_seconds"])
def test_a_state_of_another_shape_is_one_line(field: str, run: Path) -> None:
    for value in (None, "x" if field != "data_digest" else 1, [1], {"a": 1}, -1):
        _change(run, "state.json", **{field: value})
        with pytest.raises(DamagedError, match="none of the 1 checkpoints"):
            load(run, announce=_silent)
        with pytest.raises(DamagedError, match=rf"state.json: {field} is not"):
            checkpoints.load(checkpoint_paths(run)[0])


def test_an_environment_of_another_shape_stops_no_run(run: Path) -> None:
    for text in WRONG_TEXTS:
        (run / "environment.json").write_text(text, encoding="latin-1")
        record_start(run, _config(OLD_RUN), 3, "id", 1)
        assert read_object(run / "environment.json", ENVIRONMENT_SHAPE, "")["from_step"] == 3


def test_weights_of_other_networks_are_one_line(run: Path) -> None:
    network = json.loads((run / "config.json").read_text())["network"]
    _change(run, "config.json", network=network | {"latent_dim": 3})
    with pytest.raises(DamagedError, match="other networks than its config") as error:
        load(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_what_is_no_file_is_one_line_without_waiting(kind: str, run: Path) -> None:
    for name in ("config.json", "evaluation.json", "metrics.jsonl"):
        (run / name).unlink()
        if kind == "pipe":
            os.mkfifo(run / name)
        elif kind == "directory":
            (run / name).mkdir()
        else:
            (run / name).symlink_to("/dev/zero")
        with pytest.raises(UnreadableError, match="cannot be read just now"):
            READERS[name](run)
    _in_newest(run, "SHA256SUMS").unlink()
    os.mkfifo(checkpoint_paths(run)[0] / "SHA256SUMS")
    with pytest.raises(UnreadableError, match="not a regular file"):
        load(run)


def test_flipped_and_cut_files_are_found_in_every_reader(run: Path) -> None:
    """The sample of `make test`: each error is one of ours, and a checkpoint that loads is the one that was saved."""
    whole = checkpoints.load(checkpoint_paths(run)[0])[0]
    chance = random.Random(0)
    for _ in range(100):
        name = chance.choice(list(READERS))
        path = run / name if (run / name).exists() else _in_newest(run, name)
        before = path.read_bytes()
        after = bytearray(before)
        if chance.random() < 0.3:
            del after[chance.randrange(len(after)) :]
        else:
            after[chance.randrange(len(after))] ^= 1 << chance.randrange(8)
        path.write_bytes(after)
        if path.parent == run:
            with contextlib.suppress(UserError):
                READERS[name](run)
        else:
            try:
                assert checkpoints.load(path.parent)[0].facts == whole.facts
            except DamagedError as error:
                assert str(path.parent) in str(error) and "\n" not in str(error)
        path.write_bytes(before)


def test_networks_beyond_the_weights_take_no_memory(run: Path) -> None:
    state = _in_newest(run, "state.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"image_shape": [1, 10_000, 6_000]}))
    _rewrite_sums(state.parent)
    with pytest.raises(DamagedError, match="of other networks than its config: that has more than"):
        load(run)


@pytest.mark.parametrize("name", ["environment.json", "summary.json", "evaluation.json", "run.json"])
def test_a_changed_digit_in_a_file_of_a_run_is_damage(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    write_object(file, {"steps": 1234, "named": "é", "more": [{"1": 0.1}]})
    assert read_object(file, {"steps": COUNT}, "")["steps"] == 1234
    file.write_text(file.read_text().replace("1234", "1235"))
    with pytest.raises(DamagedError, match="its content has another digest than it says"):
        read_object(file, {"steps": COUNT}, "")


@pytest.mark.parametrize("damage", ["a digit", "cut", "gone"])
def test_changed_metrics_before_a_checkpoint_are_told(damage: str, tmp_path: Path) -> None:
    config = small_config("vae", run_dir=str(tmp_path / "run"), steps=4, optimization=OptimizerConfig())
    train(config, say=_silent)
    file = tmp_path / "run/metrics.jsonl"
    text = file.read_text()
    file.write_text(text.replace('"step": 2', '"step": 1') if damage == "a digit" else text[: text.index("\n") + 1])
    if damage == "gone":
        file.unlink()
    told: list[str] = []
    train(dataclasses.replace(config, steps=6), say=told.append)
    assert any("metrics.jsonl is damaged, or was edited: its first " in line for line in told)
    assert read_run(tmp_path / "run").damage is None  # told once, and recorded anew


def test_an_unreadable_config_leaves_no_metric_of_a_plugin_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD_RUN, run)
    (run / "config.json").unlink()
    (run / "config.json").mkdir()
    with pytest.raises(UnreadableError, match=r"config\.json cannot be read just now"):
        evaluate(run, ["sharpness"], announce=lambda _line: None)
