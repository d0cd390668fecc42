"""Nothing that is not ours is removed or overwritten, and no run that has trained starts over in silence."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError, ConfigError, UserError
from gen_dist.files import file_lock
from gen_dist.inference.loading import load
from gen_dist.parallel.processes import Processes
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.removal import remove_left_overs, remove_run
from gen_dist.records.run_directory import hold, remove_leftovers
from gen_dist.records.run_mark import RunMark, is_run, mark_of, write_mark
from gen_dist.records.run_paths import RunPaths
from tests.support.runs import small_config

OLD_RUN = Path(__file__).parents[1] / "training/old_runs/vae"
ALONE = Processes(0, 0, 1, torch.device("cpu"))


def _start(path: Path, fresh: bool = False, config: TrainConfig | None = None) -> None:
    """Prepare the directory as a start does until the first step."""
    config = config or small_config("vae", run_dir=str(path), steps=2)
    with hold(path, config, ALONE, fresh, announce=_unexpected) as holding:
        if holding.fresh:
            holding.begin()
        elif not checkpoint_paths(path):
            remove_leftovers(path)
        if not holding.fresh:
            holding.begin()


def _unexpected(line: str) -> None:
    raise AssertionError(line)


def _contents(path: Path) -> dict[str, bytes | str]:
    """Contents of all files, and targets of all links."""
    return {
        str(file.relative_to(path)): os.readlink(file) if file.is_symlink() else file.read_bytes()
        for file in path.rglob("*")
        if file.is_symlink() or file.is_file()
    }


def _write(path: Path, content: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of a version without marks."""
    shutil.copytree(OLD_RUN, tmp_path / "run")
    return tmp_path / "run"


def _config(run: Path) -> TrainConfig:
    return TrainConfig.from_json((run / "config.json").read_text(), "config.json")


FOREIGN = {
    "checkpoints of others": "checkpoints/other/weights.pt",
    "pictures": "samples/holiday.txt",
    "a folder named wandb": "wandb/notes",
    "a report": "report.html",
    "a config of others": "config.json",
    "metrics of others": "metrics.jsonl",
    "an evaluation": "evaluation.json",
    "a run.json of others": "run.json",
    "a lock of others": ".lock",
    "a holder of others": ".holder",
    "a picture": "curves.png",
}


@pytest.mark.parametrize("fresh", [False, True], ids=["resume", "fresh"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_of_others_is_refused_and_unchanged(name: str, fresh: bool, tmp_path: Path) -> None:
    _write(tmp_path / FOREIGN[name])
    _write(tmp_path / "notes.txt")
    before = _contents(tmp_path)
    with pytest.raises(UserError, match=r"another --run-dir") as error:
        _start(tmp_path, fresh)
    assert FOREIGN[name].split("/")[0] in str(error.value) and "\n" not in str(error.value)
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"of": "something else"}', "not JSON", '{"preset": 1, "data": 2}', "[" * 100_000]
)
def test_a_config_of_others_makes_no_run(content: str, tmp_path: Path) -> None:
    _write(tmp_path / "config.json", content)
    _write(tmp_path / "metrics.jsonl", '{"step": 1, "images_seen": 5}\n')
    before = _contents(tmp_path)
    with pytest.raises(ConfigError, match=r"is not a run of gen_dist but has config.json, metrics.jsonl"):
        _start(tmp_path, fresh=True)
    assert _contents(tmp_path) == before


def test_our_config_beside_metrics_of_others_makes_no_run(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    for content in ("epoch,loss\n1,2\n", "mine", '{"loss": 2}\n{"step": 1}\n'):
        (run / "metrics.jsonl").write_text(content)
        assert not is_run(run)


def test_the_current_directory_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "report.html")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"\. is not a run of gen_dist but has report.html"):
        _start(Path(), fresh=True)
    for empty in ("", " "):
        with pytest.raises(ConfigError, match="run_dir is empty"):
            TrainConfig(run_dir=empty).run_path  # noqa: B018


@pytest.mark.parametrize("fresh", [False, True])
def test_files_that_nothing_overwrites_stay_beside_a_run(fresh: bool, tmp_path: Path) -> None:
    for name in ("slurm-12.out", "notes/samples.txt", ".hidden", "my-checkpoints/a"):
        _write(tmp_path / "run" / name)
    (tmp_path / "disk").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    before = _contents(tmp_path / "run")
    _start(tmp_path / "run", fresh)
    after = _contents(tmp_path / "run")
    assert mark_of(tmp_path / "run") is not None
    expected = before.items() if not fresh else {k: v for k, v in before.items() if k != "checkpoints"}.items()
    assert expected <= after.items()


def test_a_run_of_an_old_version_gets_a_mark(run: Path) -> None:
    assert mark_of(run) is None and is_run(run)
    _start(run, config=_config(run))
    found = mark_of(run)
    assert found is not None and found.has_checkpoint


def test_starting_over_makes_another_run(run: Path) -> None:
    _start(run, fresh=True)
    first = mark_of(run)
    _start(run, fresh=True)
    second = mark_of(run)
    assert first and second and first.run != second.run
    assert not first.has_checkpoint and not second.has_checkpoint


def test_fresh_removes_what_we_wrote_and_no_more(run: Path) -> None:
    newest = checkpoint_paths(run)[0]
    foreign = [
        *("checkpoints/best/weights.pt", "checkpoints/notes.txt", f"checkpoints/{newest.name}/why.txt", "notes.txt"),
        *("samples/holiday.png", "samples/step_1.png", "reconstructions/step_00000002.txt", "wandb/notes"),
        "wandb/run-20260101_000000-anotherid/files/x",
    ]
    for name in foreign:
        _write(run / name)
    (run / "curves.png").mkdir()
    _write(run / "curves.png/mine")
    wandb_id = (run / "wandb-id").read_text()
    for name in ("samples/step_00000002.png", f"wandb/run-20260101_000000-{wandb_id}/files/x", "summary.json"):
        _write(run / name)
    (run / "wandb/latest-run").symlink_to(f"run-20260101_000000-{wandb_id}")
    remove_run(run)
    assert sorted(_contents(run)) == sorted([*foreign, "curves.png/mine", "going-on.jsonl", ".holder"])
    assert not checkpoint_paths(run)


@pytest.mark.parametrize("name", ["checkpoints", "samples", "wandb", "report.html", "checkpoints/step_00000099"])
def test_fresh_unlinks_links_and_follows_none(name: str, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(OLD_RUN, other)
    for place in ("samples/step_00000001.png", "wandb/x", "report.html"):
        _write(other / place)
    target = other / name if name.count("/") == 0 else checkpoint_paths(other)[0]
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(target)
    before = _contents(other)
    remove_run(run)
    assert _contents(other) == before
    assert not os.path.lexists(run / name)


@pytest.mark.parametrize("call", ["unlink", "rmdir", "replace"])
def test_a_removal_that_fails_says_so_and_can_be_repeated(
    call: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(os, call), 0

    def fail(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += "checkpoints" in str(args[0])
        if calls == 2 or (calls and call != "unlink"):
            raise PermissionError(errno.EACCES, "Permission denied", args[0])
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=r"only partly removed: .*Permission denied; fix that.*--fresh"):
            _start(run, fresh=True)
    assert (run / "metrics.jsonl").exists()
    _start(run, fresh=bool(checkpoint_paths(run)))  # without a checkpoint, --fresh is not needed again
    assert sorted(_contents(run)) == [".holder", ".lock", "going-on.jsonl", "run.json"]


def _unmount(run: Path) -> None:
    (run / "checkpoints").rename(run.parent / "disk")
    (run / "checkpoints").symlink_to(run.parent / "not mounted")


def _empty(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


def _keep_foreign(run: Path) -> None:
    _empty(run)
    _write(run / "checkpoints/step_00000012/notes.txt")


def _without_summary(run: Path) -> None:
    """As a run of an old version looks that was stopped: only metrics tell that it had a checkpoint."""
    _empty(run)
    (run / "summary.json").unlink()
    (run / "evaluation.json").unlink()


LOST: dict[str, Callable[[Path], None]] = {
    "a dangling link": _unmount,
    "an empty directory": _empty,
    "no directory": lambda run: shutil.rmtree(run / "checkpoints"),
    "foreign files alone": _keep_foreign,
    "no summary either": _without_summary,
}


@pytest.mark.parametrize("marked", [False, True], ids=["old", "marked"])
@pytest.mark.parametrize("name", LOST)
def test_a_run_whose_checkpoints_are_gone_is_refused(name: str, marked: bool, run: Path) -> None:
    if marked:
        write_mark(run, RunMark("abc", has_checkpoint=True))
    LOST[name](run)
    before = _contents(run)
    with pytest.raises(CheckpointError, match=r"mount") as error:
        _start(run, config=_config(run))
    assert "\n" not in str(error.value)
    assert {place: content for place, content in _contents(run).items() if place != ".lock"} == before
    with pytest.raises(CheckpointError, match="mount"):
        load(run, announce=_unexpected)
    _start(run, fresh=True)
    assert not (run / "metrics.jsonl").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_anew(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    write_mark(run)
    _start(run, config=_config(run))
    assert sorted(_contents(run)) == [".holder", ".lock", "going-on.jsonl", "run.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"run": 5}', '{"gen_dist_run": 5, "format": 1, "has_checkpoint": 1}'])
def test_a_mark_of_another_shape_is_one_line(content: str, run: Path) -> None:
    (run / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run.json is not the mark of a run: .*; move it away"):
        _start(run, config=_config(run))


def test_a_mark_of_a_newer_version_is_named_so(run: Path) -> None:
    mark = {"gen_dist_run": "a", "format": 9, "has_checkpoint": True, "more": 1}
    (run / "run.json").write_text(json.dumps(mark))
    with pytest.raises(CheckpointError, match="a newer gen_dist wrote it"):
        _start(run, config=_config(run))


def test_what_kills_leave_is_removed_and_nothing_else(run: Path) -> None:
    newest = checkpoint_paths(run)[0]
    left = [
        *(".config.json.tmp", ".metrics.jsonl.tmp-0123456789abcdef", ".run.json.tmp-0123456789abcdef"),
        *("samples/.step_00000002.png.tmp-0123456789abcdef", "samples/.step_00000002.png.tmp"),
        *("checkpoints/.partial-step_00000014/x.safetensors", "checkpoints/.removed-step_00000001/state.json"),
    ]
    foreign = [
        ".mine.tmp",
        "samples/.hidden",
        "checkpoints/.removed-mine",
        "checkpoints/.removed-step_00000002/why.txt",
    ]
    for name in (*left, *foreign):
        _write(run / name)
    before = _contents(run)
    remove_left_overs(run)
    after = _contents(run)
    assert before.keys() - after.keys() == {*left, foreign[-1]}
    assert after.keys() - before.keys() == {"checkpoints/step_00000002/why.txt"}
    assert checkpoint_paths(run)[0] == newest


@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_said(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with file_lock(tmp_path / ".lock", said.append) as held:
        assert held
    assert len(said) == 1 and "has no locks" in said[0]
    with hold(tmp_path / "run", small_config("vae"), ALONE, False, announce=said.append) as holding:
        holding.begin()
    assert RunPaths(tmp_path / "run").mark.exists() and len(said) == 2


def test_a_lock_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ConfigError, match="cannot be written to: Cannot allocate memory"):
        _start(tmp_path / "run")
