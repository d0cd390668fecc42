"""Files are put back into a stored state whatever was done to them; rows of a run that was cut are not judged again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.inject import judged_of
from tests.faults.tree import Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A file in each of two directories, and a link."""
    for name in ("a/one", "b/two"):
        (tmp_path / "root" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / name).write_text(name)
    (tmp_path / "root" / "link").symlink_to("a/one")
    return Tree(tmp_path / "root")


def _exchange(root: Path) -> None:
    (root / "a" / "one").unlink()
    (root / "a" / "one").mkdir()


CHANGES: tuple[Callable[[Path], object], ...] = (
    lambda root: (root / "a" / "one").write_text("ONE/a"),
    lambda root: (root / "a" / "one").chmod(0o600),
    lambda root: (root / "a").chmod(0o700),
    lambda root: (root / "a" / "three").write_text("a/three"),
    lambda root: shutil.rmtree(root / "b"),
    lambda root: (root / "link").unlink(),
    lambda root: shutil.rmtree(root),
    _exchange,
)


def test_what_has_changed_is_restored_and_the_rest_stays(tree: Tree, tmp_path: Path) -> None:
    tree.store(tmp_path / "state")
    tree.restore(tmp_path / "state")
    before, kept = tree.exact(), (tree.root / "a" / "one").stat().st_ino
    (tree.root / "b" / "two").write_text("other")
    tree.restore(tmp_path / "state")
    assert (tree.root / "a" / "one").stat().st_ino == kept
    for change in CHANGES:
        change(tree.root)
        assert not tree.root.exists() or tree.exact() != before
        tree.restore(tmp_path / "state")
        assert tree.exact() == before
        for path in (tree.root, *tree.root.rglob("*")):
            stored = tmp_path / "state" / path.relative_to(tree.root)
            assert path.lstat().st_mtime_ns == stored.lstat().st_mtime_ns or path.is_symlink()


def test_a_checkpoint_is_whole_by_its_present_bytes(tree: Tree) -> None:
    folder = tree.root / "a"
    (folder / "SHA256SUMS").write_text("e" * 64 + "  one\n")
    assert not tree.is_whole(folder)
    digest = hashlib.sha256(b"a/one").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  one\n")
    assert tree.is_whole(folder)
    (folder / "one").write_text("a/onf")
    assert not tree.is_whole(folder)


def test_json_without_its_last_line_end_says_the_same(tree: Tree) -> None:
    for name, content in (("state.json", '{"step": 1}'), ("log.jsonl", '{"step": 1}'), ("grid.png", "a")):
        path = tree.root / name
        path.write_text(f"{content}\n")
        before = tree.contents()
        path.write_text(content)
        assert (tree.contents() == before) == (name == "state.json")


def test_rows_of_the_same_commit_are_not_judged_again(tmp_path: Path) -> None:
    rows = [{"scenario": "s", "fault": "f", "nth": nth, "commit": commit} for nth, commit in ((1, "c"), (2, "d"))]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)) + '\n{"scenario": "s", "fau')
    assert judged_of(tmp_path / "rows", "c") == {("s", "f", 1)}
    assert not judged_of(tmp_path / "rows", "c-dirty") and not judged_of(tmp_path / "none", "c")
