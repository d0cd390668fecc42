"""environment.json describes software and hardware of a run, and contains no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from gen_dist.records.environment import environment


def test_the_environment_has_versions_but_no_secret(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    found = environment()
    text = json.dumps(found)
    assert (
        found["versions"]["gen_dist"]
        and found["versions"]["torch"]
        and found["versions"]["numpy"]
        and found["versions"]["python"].startswith("3.")
    )
    assert set(found["versions"]) == {
        "python", "gen_dist", "torch", "torchvision", "accelerate", "triton", "numpy"
    }  # fmt: skip
    assert found["cpu"]["logical_cores"] >= 1 and found["cpu"]["memory_gib"] > 0.1
    assert found["torch_threads"] >= 1 and isinstance(found["gpus"], list)
    assert found["command"] == sys.argv
    assert "hunter2" not in text
    assert os.uname().nodename not in text.replace(json.dumps(sys.argv), "") or len(os.uname().nodename) < 6


def test_the_recorded_commit_is_dirty_after_changes(tmp_path, monkeypatch):
    module = tmp_path / "checkout/gen_dist/records/environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr("gen_dist.records.environment.__file__", str(module))
    assert environment()["git"] is None

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=module.parents[2], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert environment()["git"] is None  # an installed copy inside a repository that does not track it
    git("add", "gen_dist/records/environment.py")
    git("commit", "-q", "-m", "a commit")
    (module.parent / "untracked").write_text("")
    assert environment()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    module.write_text("changed = True\n")
    assert environment()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git"] is None
