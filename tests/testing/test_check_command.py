"""`gen-dist check` lists the checks of a plug-in's parts, and its exit code tells whether they passed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.warm_python import warm_python

METRIC = """
from gen_dist.evaluation.metric import Metric, register

def measure(context):
    return {"odd": VALUE}

register(Metric(name="odd", label="odd", group="pixels", better=None, meaning="A number.", measure=measure))
"""


def _check(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*warm_python(), "-m", "gen_dist.commands", "check", *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("value", "code", "words"), [("1.0", 0, "3 passed, 1 skipped"), ("float('nan')", 1, "is nan")])
def test_the_exit_code_tells_a_failure(value: str, code: int, words: str, tmp_path: Path) -> None:
    plugin = tmp_path / "odd_metric.py"
    plugin.write_text(METRIC.replace("VALUE", value))
    done = _check(plugin)
    assert done.returncode == code, done.stderr
    assert words in done.stdout


def test_a_plugin_that_is_missing_is_bad_input(tmp_path: Path) -> None:
    done = _check(tmp_path / "none.py")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "there is no plug-in" in done.stderr


def test_an_empty_plugin_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    done = _check(tmp_path / "empty.py")
    assert done.returncode == 2
    assert "registers nothing" in done.stderr
