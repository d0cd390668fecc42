"""A run directory and its copy at a URL."""

import shutil
from pathlib import Path

import pytest

from gen_dist.errors import CheckpointError, TakenOverError
from gen_dist.records.mirror import Mirror


def _write(directory: Path, *places: str) -> None:
    for place in places:
        (directory / place).parent.mkdir(parents=True, exist_ok=True)
        (directory / place).write_text(place)


def _places(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {".writer"}


def _mirror(directory: Path, url: Path) -> Mirror:
    directory.mkdir(exist_ok=True)
    mirror = Mirror(directory, f"fsspec+local://{url}")
    mirror.claim()
    return mirror


def test_pushed_files_are_fetched_without_temporary_ones(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "bucket" / "run"
    mirror = _mirror(here, there)
    mirror.fetch()
    kept = {"metrics.jsonl", ".holder", "samples/step_1.png", "checkpoints/step_00000001/SHA256SUMS"}
    _write(here, *kept, ".lock", ".metrics.jsonl.tmp", "checkpoints/.partial-step_00000002/state.json")
    mirror.push()
    assert _places(there) == kept
    other = _mirror(tmp_path / "other", there)
    other.fetch()
    assert _places(tmp_path / "other") == kept
    assert all((tmp_path / "other" / place).read_text() == place for place in kept)


def test_only_changes_are_copied_and_only_losses_removed(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "bucket" / "run"
    mirror = _mirror(here, there)
    _write(here, "a", "b", "c")
    mirror.push()
    (there / "a").write_text("somebody else's")
    (here / "b").write_text("changed")
    (here / "c").unlink()
    mirror.push()
    assert (there / "a").read_text() == "somebody else's"
    assert (there / "b").read_text() == "changed"
    assert _places(there) == {"a", "b"}
    successor = _mirror(tmp_path / "successor", there)
    successor.fetch()
    (tmp_path / "successor" / "a").unlink()
    successor.push()
    assert _places(there) == {"b"}


def test_an_interrupted_copy_is_no_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SHA256SUMS is copied last except for the mark, and removed first."""
    here, there = tmp_path / "here", tmp_path / "bucket"
    mirror = _mirror(here, there)
    first, second = ([f"checkpoints/{step}/{name}" for name in ("SHA256SUMS", "networks")] for step in ("s1", "s2"))
    order: list[str] = []
    copy = Mirror._copy

    def noted(self: Mirror, place: str, path: Path) -> None:
        before = self._copied.get(place)
        copy(self, place, path)
        if before != self._copied[place]:
            order.append(place)

    monkeypatch.setattr(Mirror, "_copy", noted)
    _write(here, *first, "metrics.jsonl", ".holder")
    mirror.push()
    assert order == ["metrics.jsonl", "checkpoints/s1/networks", "checkpoints/s1/SHA256SUMS", ".holder"]
    order.clear()
    _write(here, *second)
    shutil.rmtree(here / "checkpoints/s1")
    mirror.push()
    assert order == ["checkpoints/s2/networks", "checkpoints/s2/SHA256SUMS"]
    assert _places(there) == {*second, "metrics.jsonl", ".holder"}
    assert not (there / "checkpoints/s1").exists()


def test_urls_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nosuch://bucket/run cannot be used as storage: "):
        Mirror(tmp_path, "nosuch://bucket/run")
    (tmp_path / "file").write_text("")
    mirror = Mirror(tmp_path / "here", f"fsspec+local://{tmp_path / 'file' / 'run'}")
    _write(tmp_path / "here", "a")
    for write in (mirror.claim, mirror.push):
        with pytest.raises(CheckpointError, match="cannot be written to: "):
            write()


def test_the_previous_writer_copies_nothing_more(tmp_path: Path) -> None:
    first = _mirror(tmp_path / "first", tmp_path / "bucket")
    _write(tmp_path / "first", "a")
    first.push()
    second = _mirror(tmp_path / "second", tmp_path / "bucket")
    second.fetch()
    _write(tmp_path / "first", "b")
    with pytest.raises(TakenOverError, match="this one stops"):
        first.push()
    _write(tmp_path / "second", "c")
    second.push()
    assert _places(tmp_path / "bucket") == {"a", "c"}
