"""A file is written whole or not at all."""

from __future__ import annotations

import pytest

from gen_dist.atomic_files import write_atomically


def test_writing_atomically_replaces_whole_files(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "first ü\n")
    assert path.read_text(encoding="utf-8") == "first ü\n"
    write_atomically(path, b"\x89second")
    assert path.read_bytes() == b"\x89second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing/config.json", "")
