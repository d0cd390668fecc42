"""Command lines: the program is named as the user can type it again."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from gen_dist.cli import resume_command

SCRIPT, INSTALLED, MODULE = "launch/train.py", "/site-packages/gen_dist/launch/train.py", "gen_dist.launch.train"


@pytest.mark.parametrize(
    ("argv", "module", "command"),
    [
        (["/venv/bin/gen-dist", "train", "vae-mnist"], None, "gen-dist train vae-mnist"),
        ([SCRIPT, "vae-mnist"], None, f"python {SCRIPT} vae-mnist"),
        ([INSTALLED, "vae-mnist"], MODULE, f"python -m {MODULE} vae-mnist"),
    ],
)
def test_the_command_to_resume_works_where_the_user_is(
    argv: list[str], module: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*argv, "--fresh"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and ModuleSpec(module, None))
    assert resume_command() == command
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert resume_command() == f"the same accelerate launch command with {command.removeprefix('python ')}"
